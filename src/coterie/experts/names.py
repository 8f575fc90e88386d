"""Names of experts that mean the same in every bank."""

BASE = "base"
"""The adapter that was trained on all data."""
BACKBONE = "backbone"
"""The base model itself, as an expert that changes nothing."""
NULL = "null"
"""An expert that changes nothing, for texts that are near to no domain."""

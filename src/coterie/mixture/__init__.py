"""The three places put together: a bank, a router and a combiner on one base model."""

from coterie.mixture.completion import Completion, Trace
from coterie.mixture.core import Mixture, Prompt, as_example
from coterie.mixture.loading import RouterParts, load_router, read_mixture_record

__all__ = [
    "Completion",
    "Mixture",
    "Prompt",
    "RouterParts",
    "Trace",
    "as_example",
    "load_router",
    "read_mixture_record",
]

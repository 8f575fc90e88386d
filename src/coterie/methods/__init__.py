"""The published methods: one table, the loop that fits ELREA's, and what is trained for the others."""

from coterie.methods.fitting import elrea, fit_elrea
from coterie.methods.stages import BACKBONE, BASE
from coterie.methods.table import METHODS, Bench, load_bench, make_bench, method_named

__all__ = ["BACKBONE", "BASE", "METHODS", "Bench", "elrea", "fit_elrea", "load_bench", "make_bench", "method_named"]

"""The published methods: their table, the loops that fit them, and what is trained for the others."""

from coterie.methods.bench import Bench
from coterie.methods.domains import build_bank, fit_token_level, token_level
from coterie.methods.fitting import elrea, fit_elrea
from coterie.methods.of_clusters import CLUSTER_METHODS
from coterie.methods.of_domains import DOMAIN_METHODS
from coterie.methods.of_tasks import TASK_METHODS
from coterie.methods.stages import BACKBONE, BASE
from coterie.methods.table import METHODS, listed, load_bench, make_bench

__all__ = [
    "BACKBONE",
    "BASE",
    "CLUSTER_METHODS",
    "DOMAIN_METHODS",
    "METHODS",
    "TASK_METHODS",
    "Bench",
    "build_bank",
    "elrea",
    "fit_elrea",
    "fit_token_level",
    "listed",
    "load_bench",
    "make_bench",
    "token_level",
]

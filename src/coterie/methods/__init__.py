"""The published methods: their table, the loops that fit them, and what is trained for the others."""

from coterie.methods.common import BACKBONE, BASE
from coterie.methods.elrea.fit import elrea, fit_elrea
from coterie.methods.elrea.methods import CLUSTER_METHODS
from coterie.methods.family import Bench
from coterie.methods.kshot.methods import TASK_METHODS
from coterie.methods.registry import METHODS, listed, load_bench, make_bench
from coterie.methods.token_level.fit import build_bank, fit_token_level, token_level
from coterie.methods.token_level.methods import DOMAIN_METHODS

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

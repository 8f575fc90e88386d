"""The published methods: the loops that fit them, their table, and what is trained for the others."""

from coterie.methods.common import BACKBONE, BASE
from coterie.methods.elrea.fit import elrea, fit_elrea
from coterie.methods.elrea.methods import CLUSTER_METHODS
from coterie.methods.family import Bench
from coterie.methods.kshot.choose_adapters import select, select_adapters
from coterie.methods.kshot.fit import fit_kshot, kshot
from coterie.methods.kshot.gather_rows import gather, gather_rows
from coterie.methods.kshot.methods import TASK_METHODS
from coterie.methods.registry import METHODS, listed, load_bench, make_bench
from coterie.methods.symbolic.fit import fit_symbolic, is_symbolic, load_symbolic, symbolic
from coterie.methods.symbolic.profile import profile_pool
from coterie.methods.symbolic.run import generate_symbolic, plan_symbolic
from coterie.methods.token_level.fit import fit_from_adapters, fit_token_level, from_adapters, token_level
from coterie.methods.token_level.methods import DOMAIN_METHODS

# The families' functions share their names with the wings that they come from; this runs last, so the functions win.
__all__ = [
    "BACKBONE",
    "BASE",
    "CLUSTER_METHODS",
    "DOMAIN_METHODS",
    "METHODS",
    "TASK_METHODS",
    "Bench",
    "elrea",
    "fit_elrea",
    "fit_from_adapters",
    "fit_kshot",
    "fit_symbolic",
    "fit_token_level",
    "from_adapters",
    "gather",
    "gather_rows",
    "generate_symbolic",
    "is_symbolic",
    "kshot",
    "listed",
    "load_bench",
    "load_symbolic",
    "make_bench",
    "plan_symbolic",
    "profile_pool",
    "select",
    "select_adapters",
    "symbolic",
    "token_level",
]

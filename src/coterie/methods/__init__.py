"""The published methods: the loops that fit them, their table, and what is trained for the others."""

from coterie.methods.add_adapters import add_to_bank, bank_add, bank_remove, verify_bank
from coterie.methods.elrea.fit import elrea, fit_elrea
from coterie.methods.family import Family, Method, MethodGrid
from coterie.methods.influence import influence, write_influence
from coterie.methods.kshot.choose_adapters import select, select_adapters
from coterie.methods.kshot.fit import fit_kshot, kshot
from coterie.methods.kshot.gather_rows import gather, gather_rows
from coterie.methods.registry import FAMILIES, listed, load_grid, make_grid, train_extras
from coterie.methods.symbolic.fit import fit_symbolic, is_symbolic, load_symbolic, symbolic
from coterie.methods.symbolic.profile import profile_pool
from coterie.methods.symbolic.run import generate_symbolic, plan_symbolic
from coterie.methods.token_level.fit import fit_token_level, token_level
from coterie.methods.token_level.from_adapters import fit_from_adapters, from_adapters

# The families' functions share their names with the wings that they come from; this runs last, so the functions win.
__all__ = [
    "FAMILIES",
    "Family",
    "Method",
    "MethodGrid",
    "add_to_bank",
    "bank_add",
    "bank_remove",
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
    "influence",
    "is_symbolic",
    "kshot",
    "listed",
    "load_grid",
    "load_symbolic",
    "make_grid",
    "plan_symbolic",
    "profile_pool",
    "select",
    "select_adapters",
    "symbolic",
    "token_level",
    "train_extras",
    "verify_bank",
    "write_influence",
]

"""The published methods: a method fills three places, the bank, the router and the combiner."""

from collections.abc import Callable, Sequence
from typing import Any

from coterie.errors import CoterieError
from coterie.methods.elrea.methods import CLUSTER_METHODS
from coterie.methods.elrea.run import open_recipe
from coterie.methods.extras import Recipe, load_ingredient, prepare
from coterie.methods.family import ALONE, Bench, Table, needs_of
from coterie.methods.kinds import KINDS
from coterie.methods.kshot.methods import TASK_METHODS
from coterie.methods.kshot.run import open_task_recipe
from coterie.methods.symbolic.fit import LINE_UPS
from coterie.methods.symbolic.fit import METHOD as SYMBOLIC
from coterie.methods.token_level.methods import DOMAIN_METHODS
from coterie.mixture import Mixture
from coterie.settings.groups import ExtrasSettings

METHODS: dict[str, Table] = {"elrea": CLUSTER_METHODS, "token-level": DOMAIN_METHODS, "kshot-moe": TASK_METHODS}
"""The methods that work on what each of these has fitted."""

RECIPES: dict[str, Callable[[Mixture, ExtrasSettings], Recipe]] = {"elrea": open_recipe, "kshot-moe": open_task_recipe}
"""How more is trained for what each of these has fitted; the methods on the others need nothing."""


def methods_on(fitted: str) -> Table:
    """Return the methods that work on what this one has fitted.

    Raises:
        CoterieError: when none is known for it.
    """
    if fitted not in METHODS:
        raise CoterieError(f"nothing is known to compare with {fitted!r}; give a folder made by {' or '.join(METHODS)}")
    return METHODS[fitted]


def usual_methods(mixture: Mixture) -> list[str]:
    """Return the methods that are compared where none are named: the mixture's own and its simplest rivals."""
    if mixture.method == "elrea":
        return ["backbone", "base", "elrea", "uniform-weights"]
    if mixture.method == "kshot-moe":
        return ["backbone", "best-by-shots", "uniform-weights", "arrow", "kshot-moe"]
    alone = [f"{ALONE}:{name}" for name in Bench(mixture, {}, methods_on(mixture.method)).fitted]
    return ["backbone", *alone, "per-dataset", "uniform-weights", "token-level", "arrow", "spectr", "oracle"]


def make_bench(mixture: Mixture, names: Sequence[str], grid: ExtrasSettings) -> Bench:
    """Train what these methods still lack, once, into the mixture's folder, and load it.

    Raises:
        CoterieError: for an unknown method, or when something cannot be trained.
    """
    table = methods_on(mixture.method)
    needed = needs_of(names, table)
    return Bench(mixture, prepare(RECIPES[mixture.method](mixture, grid), needed, KINDS) if needed else {}, table)


def load_bench(mixture: Mixture, names: Sequence[str]) -> Bench:
    """Load what these methods need; nothing is trained.

    Raises:
        CoterieError: for an unknown method, or when something was not trained yet.
    """
    table = methods_on(mixture.method)
    needed = needs_of(names, table)
    for name in needed:
        if mixture.folder is None or not (mixture.folder / "methods" / name).is_dir():
            raise CoterieError(
                f"{', '.join(names)} needs {name}, which was not trained yet; "
                f"type: coterie eval {mixture.folder} --methods base,{','.join(names)} --data ... --output ..."
            )
    return Bench(mixture, {name: load_ingredient(mixture, name) for name in needed}, table)


def listed() -> list[dict[str, Any]]:
    """Return every method as a row: on what it works, where its experts come from, who finds them, where they meet."""
    rows: list[dict[str, Any]] = [
        {"on": fitted, "method": name, "bank": m.bank, "router": m.router, "combiner": m.combiner}
        | {"trains": list(m.needs), "paper": m.paper}
        for fitted, table in METHODS.items()
        for name, m in table.items()
    ]
    recruited = {"on": SYMBOLIC, "bank": "any experts + skill profiles", "trains": [], "paper": "arXiv 2503.05641"}
    return rows + [
        {**recruited, "method": name, "router": router, "combiner": combiner}
        for name, (router, combiner) in LINE_UPS.items()
    ]

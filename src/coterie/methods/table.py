"""The published methods: a method fills three places, the bank, the router and the combiner."""

from collections.abc import Sequence

from coterie.errors import CoterieError
from coterie.methods.bench import ALONE, Bench, Table, needs_of
from coterie.methods.ingredients import load_ingredient, prepare
from coterie.methods.of_clusters import CLUSTER_METHODS
from coterie.methods.of_domains import DOMAIN_METHODS
from coterie.methods.recipe import open_recipe
from coterie.mixture import Mixture
from coterie.settings import GridSettings

METHODS: dict[str, Table] = {"elrea": CLUSTER_METHODS, "token-level": DOMAIN_METHODS}
"""The methods that work on what each of these has fitted."""


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
    alone = [f"{ALONE}:{name}" for name in Bench(mixture, {}, methods_on(mixture.method)).fitted]
    return ["backbone", *alone, "per-dataset", "uniform-weights", "token-level", "arrow", "spectr", "oracle"]


def make_bench(mixture: Mixture, names: Sequence[str], grid: GridSettings) -> Bench:
    """Train what these methods still lack, once, into the mixture's folder, and load it.

    Raises:
        CoterieError: for an unknown method, or when something cannot be trained.
    """
    table = methods_on(mixture.method)
    needed = needs_of(names, table)
    return Bench(mixture, prepare(open_recipe(mixture, grid), needed) if needed else {}, table)


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

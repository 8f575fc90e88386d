"""A method of the table, and the bench on which several of them work side by side."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum

from coterie.combiners.base import Combiner
from coterie.combiners.logits import LogitCombiner
from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import ExpertBank
from coterie.methods.common import BACKBONE, NULL
from coterie.methods.extras import Ingredient
from coterie.methods.kinds import KINDS
from coterie.mixture import Mixture
from coterie.routers.base import Router
from coterie.routers.centroid import CentroidRouter
from coterie.routers.derived import keep_top
from coterie.routers.fixed import one_hot
from coterie.routers.token import TokenLevel
from coterie.settings.groups import NEVER, rerouting_interval

ELREA = "arXiv 2502.00089"


@dataclass(frozen=True)
class Bench:
    """A fitted mixture, and what was trained beyond it, side by side on one bank.

    Attributes:
        own: what was fitted.
        ingredients: what was trained beyond it, by name.
        table: the methods that go with what was fitted, by name.
    """

    own: Mixture
    ingredients: Mapping[str, Ingredient]
    table: "Table"

    @cached_property
    def mixture(self) -> Mixture:
        """The mixture with all experts in its bank, and the base model itself as one that changes nothing."""
        bank = self.own.bank
        for ingredient in self.ingredients.values():
            bank = ExpertBank((*bank.names, *ingredient.bank.names), (*bank.adapters, *ingredient.bank.adapters))
        mixture = replace(self.own, bank=bank.with_expert(BACKBONE, {}))
        _ = mixture.layers  # stacked before any cell is made of it, so that all cells share one copy
        return mixture

    @property
    def fitted(self) -> tuple[str, ...]:
        """The names of the experts that were fitted first, `base` among them where there is one."""
        return tuple(name for name in self.own.bank.names if name != NULL)

    def experts(self, ingredient: str) -> tuple[str, ...]:
        """The names of an ingredient's experts."""
        return self.ingredients[ingredient].bank.names

    def router(self, ingredient: str) -> Router:
        """An ingredient's router."""
        router = self.ingredients[ingredient].router
        assert router is not None  # the ingredients that are asked for one have one
        return router

    def training_seconds(self, name: str) -> float:
        """The seconds of training that a method needs beyond the fitted mixture, of what is loaded here."""
        needs = {part for need in needs_of([name], self.table) for part in (*KINDS[need].needs, need)}
        return fsum(ingredient.seconds for part, ingredient in self.ingredients.items() if part in needs)

    def cell(self, name: str) -> Mixture:
        """Return the mixture of a method, or of a variant such as `elrea:top_k=2`, on the common bank.

        Raises:
            CoterieError: for an unknown name, or a variant that the method does not have.
        """
        method, options = method_named(name, self.table)
        router, combiner = method.cell(self)
        return self.mixture.replace(router=_varied(router, options, name), combiner=combiner)


Cell = tuple[Router, Combiner]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        bank: where its experts come from.
        router: how prompts find them.
        combiner: where they meet.
        cell: router and combiner on a bench that has what the method needs.
        needs: what must be trained for it beyond a fitted run.
        paper: source.
    """

    bank: str
    router: str
    combiner: str
    cell: Callable[[Bench], Cell]
    needs: tuple[str, ...] = ()
    paper: str = ELREA


Table = Mapping[str, Method]

ALONE = "expert"
"""`expert:NAME` is one expert alone, whatever was fitted."""


def _alone(expert: str) -> Method:
    def cell(bench: Bench) -> Cell:
        return one_hot(expert, bench.mixture.bank.names), LogitCombiner()

    return Method("one expert", "fixed", "logits", cell, paper="control")


VARIANTS = {"top_k": r"[1-9]\d*", "d_proj": r"[1-9]\d*", "every": rf"[1-9]\d*|{NEVER}"}
"""What can be varied in a method, written `name:top_k=2` or `name:top_k=2+every=1`: only the K largest weights,
centroids compared in D dimensions, weights renewed at every N-th token (or never: inf)."""


def method_named(name: str, table: Table) -> tuple[Method, dict[str, str]]:
    """Look a method or a variant up; return the method and the variant's options as they are written.

    Raises:
        CoterieError: when there is none of this name.
    """
    plain, colon, written = name.partition(":")
    if plain == ALONE and written:
        return _alone(written), {}
    if plain not in table:
        raise unknown_name("method", plain, [*table, f"{ALONE}:NAME"])
    options = {}
    for part in written.split("+") if colon else ():
        option, _, value = part.partition("=")
        if option not in VARIANTS or not re.fullmatch(VARIANTS[option], value, re.ASCII):
            raise CoterieError(
                f"{name!r} is no variant of {plain}; write {plain}:top_k=K, {plain}:d_proj=D or {plain}:every=N, "
                "joined by + for several"
            )
        options[option] = value
    return table[plain], options


def _varied(router: Router, options: Mapping[str, str], name: str) -> Router:
    if "d_proj" in options:
        if not isinstance(router, CentroidRouter):
            raise CoterieError(f"{name!r}: only centroids can be compared in fewer dimensions")
        router = router.folded(int(options["d_proj"]))
    if "every" in options:
        if not isinstance(router, TokenLevel):
            raise CoterieError(f"{name!r}: only token-level renews its weights")
        router = TokenLevel(router.router, rerouting_interval(options["every"]), router.cache)
    return keep_top(router, int(options["top_k"])) if "top_k" in options else router


def needs_of(names: Iterable[str], table: Table) -> list[str]:
    """Return what must be trained for these methods, each once."""
    return list(dict.fromkeys(need for name in names for need in method_named(name, table)[0].needs))

"""A family of methods as one value, and the grid on which the methods of one run work side by side."""

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import fsum
from typing import Generic

from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import ExpertBank
from coterie.experts.names import BACKBONE, NULL
from coterie.methods.extras import AnyRun, Extra, ExtraSpec, lacking_work, prepare_extras
from coterie.mixture import Mixture
from coterie.routers.base import Router
from coterie.routers.derived import keep_top
from coterie.routers.fixed import OracleRouter, one_hot
from coterie.routers.token import TokenLevel
from coterie.settings.groups import NEVER, ExtrasSettings, rerouting_interval

logger = logging.getLogger(__name__)

CONTROL = "control"
"""Stands in place of a paper."""
SINGLE_EXPERT = "expert"
"""`expert:NAME` is one expert alone, whatever was fitted."""
NAMED_ROUTER = "router"
"""`router:NAME` is the mixture with another router that it can have, as `--router NAME` gives it."""
OFF = "off"
VARIANTS = {"top_k": r"[1-9]\d*", "d_proj": r"[1-9]\d*", "ddof": "[01]", "every": rf"[1-9]\d*|{NEVER}"}
VARIANTS |= {"caution": rf"0|1|0?\.\d+|{OFF}"}
"""What can be varied in a method, written `name:top_k=2` or `name:top_k=2+every=1`: only the K largest weights,
centroids compared in D dimensions, cosines standardised by the deviation over C - ddof of them, weights renewed at
every N-th token (or never: inf), unfamiliar prompts refused by another caution (or none: off)."""


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        bank: where its experts come from.
        router: how prompts find them.
        combiner: where they meet: a combiner's name; nothing for the mixture's own.
        paper: source.
        make_router: its router on a grid that has what the method needs; None where no mixture stands behind it.
        needs: the extras that must be trained for it beyond a fitted run.
        simple: whether one expert, or the untouched base model, answers whatever is asked: what all others must beat.
        by_prompt: whether a prompt is all that it needs; else it also wants its reference, or the name of its data set.
    """

    bank: str
    router: str
    combiner: str
    paper: str
    make_router: "Callable[[MethodGrid], Router] | None" = None
    needs: tuple[str, ...] = ()
    simple: bool = False
    by_prompt: bool = True


def single(
    expert: str, bank: str = "one expert", paper: str = CONTROL, needs: tuple[str, ...] = (), *, simple: bool = True
) -> Method:
    """Return the method that always takes one expert."""
    return Method(bank, "fixed", "logits", paper, lambda grid: one_hot(expert, grid.mixture.bank.names), needs, simple)


def oracle(
    bank: str,
    experts: "Callable[[MethodGrid], tuple[str, ...]]" = lambda grid: grid.fitted,
    needs: tuple[str, ...] = (),
) -> Method:
    """Return the control that knows which expert is the best on each row; by default of those that were fitted."""
    router = "the best on each row's reference (evaluation only)"
    return Method(bank, router, "logits", CONTROL, lambda grid: OracleRouter(experts(grid)), needs, by_prompt=False)


@dataclass(frozen=True)
class Family(Generic[AnyRun]):
    """Methods that work on what one `coterie fit` makes.

    Attributes:
        name: what is fitted; the mixture's own method has this name too.
        methods: by name.
        extras: what methods may need trained beyond the fit, by the name of its folder.
        open_run: reopens a fitted run to train extras; None where no method needs any.
        usual: the methods that are compared where none are named: the run's own and its simplest rivals.
        also_fitted: other methods of the table that may be a mixture's own.
        lacks: the methods that a mixture cannot have because of what it was made from, each with the reason.
    """

    name: str
    methods: Mapping[str, Method]
    extras: Mapping[str, ExtraSpec[AnyRun]]
    open_run: Callable[[Mixture, ExtrasSettings], AnyRun] | None
    usual: Callable[[Mixture], list[str]]
    also_fitted: tuple[str, ...] = ()
    lacks: Callable[[Mixture], Mapping[str, str]] = lambda mixture: {}

    def available(self, mixture: Mixture) -> list[str]:
        """Return the methods that a mixture can have, and tell the others."""
        lacking = self.lacks(mixture)
        for name, reason in lacking.items():
            logger.info("%s is left out: %s", name, reason)
        return [name for name in self.methods if name not in lacking]

    def method(self, name: str) -> tuple[Method, dict[str, str]]:
        """Look a method or a variant up; return the method and the variant's options as they are written.

        Raises:
            CoterieError: when there is none of this name.
        """
        plain, colon, written = name.partition(":")
        if plain == SINGLE_EXPERT and written:
            return single(written), {}
        if plain == NAMED_ROUTER and written:
            return Method("the mixture's own", written, "", CONTROL, lambda grid: grid.own.named_router(written)), {}
        if plain not in self.methods:
            raise unknown_name("method", plain, [*self.methods, f"{SINGLE_EXPERT}:NAME", f"{NAMED_ROUTER}:NAME"])
        options = {}
        for part in written.split("+") if colon else ():
            option, _, value = part.partition("=")
            if option not in VARIANTS or not re.fullmatch(VARIANTS[option], value, re.ASCII):
                raise CoterieError(
                    f"{name!r} is no variant of {plain}; write {plain}:top_k=K, {plain}:d_proj=D, {plain}:ddof=1, "
                    f"{plain}:every=N or {plain}:caution=C, joined by + for several"
                )
            options[option] = value
        return self.methods[plain], options

    def simple_rivals(self, names: Iterable[str]) -> list[str]:
        """Return those of the methods that are one expert, or the untouched base model, for all prompts."""
        return [name for name in names if self.method(name)[0].simple]

    def needs(self, names: Iterable[str]) -> list[str]:
        """Return the extras that must be trained for these methods, each once."""
        return list(dict.fromkeys(need for name in names for need in self.method(name)[0].needs))

    def prepare(
        self, mixture: Mixture, names: Iterable[str], settings: ExtrasSettings, *, in_run: bool = False
    ) -> dict[str, Extra]:
        """Train the extras that these methods still lack, once, as `prepare_extras` does, and load them.

        Raises:
            CoterieError: for an unknown method, or when something cannot be trained.
        """
        needed = self.needs(names)
        if not needed or self.open_run is None:
            return {}
        return prepare_extras(self.open_run(mixture, settings), needed, self.extras, in_run=in_run)

    def work(self, mixture: Mixture, names: Iterable[str], settings: ExtrasSettings) -> float:
        """Return what training what these methods still lack weighs (see `coterie.progress`)."""
        needed = self.needs(names)
        return lacking_work(self.open_run(mixture, settings), needed, self.extras) if needed and self.open_run else 0.0


@dataclass(frozen=True)
class MethodGrid:
    """All methods of one run on a common bank, so that one forward pass scores them all.

    Attributes:
        own: what was fitted.
        extras: what was trained beyond it, by name.
        family: the methods that go with what was fitted.
    """

    own: Mixture
    extras: Mapping[str, Extra] = field(repr=False)
    family: Family = field(repr=False)

    @cached_property
    def mixture(self) -> Mixture:
        """The mixture with all experts in its bank, and the base model itself as one that changes nothing."""
        bank = self.own.bank
        for more in (*(extra.bank for extra in self.extras.values()), ExpertBank((BACKBONE,), ({},))):
            bank = ExpertBank((*bank.names, *more.names), (*bank.adapters, *more.adapters))
        return replace(self.own, bank=bank)

    @property
    def fitted(self) -> tuple[str, ...]:
        """The names of the experts that were fitted first, `base` among them where there is one."""
        return tuple(name for name in self.own.bank.names if name != NULL)

    def router(self, extra: str) -> Router:
        """An extra's router."""
        router = self.extras[extra].router
        assert router is not None  # the extras that are asked for one have one
        return router

    def training_seconds(self, name: str) -> float:
        """The seconds of training that a method needs beyond the fitted mixture, of what is loaded here."""
        needs = {part for need in self.family.needs([name]) for part in (*self.family.extras[need].needs, need)}
        return fsum(extra.seconds for part, extra in self.extras.items() if part in needs)

    def cell(self, name: str) -> Mixture:
        """Return the mixture of a method, or of a variant such as `elrea:top_k=2`, on the common bank.

        The mixture's own method keeps the mixture's own combiner. Experts that meet in the logits, which take a
        prompt's weights alone, meet in the layers where weights are renewed while an answer is written.

        Raises:
            CoterieError: for an unknown name, or a variant that the method does not have.
        """
        method, options = self.family.method(name)
        assert method.make_router is not None  # every method on a mixture has a router
        router = method.make_router(self)
        if "d_proj" in options:
            router = router.folded(int(options["d_proj"]))
        if "ddof" in options:
            router = router.with_ddof(int(options["ddof"]))
        if "caution" in options:
            router = router.with_caution(None if options["caution"] == OFF else float(options["caution"]))
        if "every" in options:
            if not method.by_prompt:
                raise CoterieError(f"{name!r}: only what is routed by its text can be routed again while it grows")
            router = TokenLevel(router.of_prompts, rerouting_interval(options["every"]), router.cache)
        if "top_k" in options:
            router = keep_top(router, int(options["top_k"]))
        is_own = name.partition(":")[0] == self.own.method or not method.combiner
        combiner = None if is_own else method.combiner
        if router.grain == "step" and (combiner or self.own.combiner.kind) == "logits":
            combiner = "layers"
        return self.mixture.replace(router=router, combiner=combiner)

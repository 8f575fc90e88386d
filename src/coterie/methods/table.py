"""The published methods as rows of one table: a method fills three places, the bank, the router and the combiner."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import fsum

from coterie.combiners.base import Combiner
from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.combiners.texts import TextCombiner
from coterie.combiners.weights import WeightCombiner
from coterie.errors import CoterieError, unknown_name
from coterie.experts.bank import ExpertBank
from coterie.methods.ingredients import KINDS, Ingredient, load_ingredient, prepare, read_judgement
from coterie.methods.recipe import open_recipe
from coterie.methods.stages import BACKBONE, BASE
from coterie.mixture import Mixture
from coterie.routers.base import Router
from coterie.routers.centroid import CentroidRouter
from coterie.routers.derived import DerivedRouter
from coterie.routers.fixed import one_hot, uniform
from coterie.routers.oracle import OracleRouter
from coterie.settings import GridSettings

ELREA = "arXiv 2502.00089"


@dataclass(frozen=True)
class Bench:
    """A fitted mixture, and what was trained beyond it, side by side on one bank.

    Attributes:
        own: what was fitted.
        ingredients: what was trained beyond it, by name.
    """

    own: Mixture
    ingredients: Mapping[str, Ingredient]

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
        """The names of the experts that were fitted first, `base` among them."""
        return self.own.bank.names

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
        needs = {part for need in needs_of([name]) for part in (*KINDS[need].needs, need)}
        return fsum(ingredient.seconds for part, ingredient in self.ingredients.items() if part in needs)

    def cell(self, name: str) -> Mixture:
        """Return the mixture of a method, or of a variant such as `elrea:top_k=2`, on the common bank.

        Raises:
            CoterieError: for an unknown name, or a variant that the method does not have.
        """
        method, options = method_named(name)
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


def _normalised(bench: Bench) -> DerivedRouter:
    return DerivedRouter(bench.own.router, normalised=True)


def _with_base(bench: Bench, ingredient: str) -> Router:
    return uniform([BASE, *bench.experts(ingredient)])


def _best_single(bench: Bench) -> Router:
    return one_hot(read_judgement(bench.ingredients["judged"]).best_single(), bench.mixture.bank.names)


METHODS: dict[str, Method] = {
    "backbone": Method("none", "fixed", "logits", lambda b: (one_hot(BACKBONE, b.mixture.bank.names), LogitCombiner())),
    "base": Method("base adapter", "fixed", "logits", lambda b: (one_hot(BASE, b.mixture.bank.names), LogitCombiner())),
    "per-dataset": Method(
        "one LoRA per data set",
        "the data set's own name",
        "logits",
        lambda b: (b.router("datasets"), LogitCombiner()),
        ("datasets",),
    ),
    "moe-routing": Method(
        "ELREA's", "gradient centroids, normalised", "layers", lambda b: (_normalised(b), LayerCombiner())
    ),
    "moe-merging": Method(
        "ELREA's",
        "gradient centroids, normalised",
        "weights:factors",
        lambda b: (_normalised(b), WeightCombiner("factors")),
    ),
    "mole": Method(
        "ELREA's",
        "learned gate per layer and token",
        "layers",
        lambda b: (b.router("gates"), LayerCombiner()),
        ("gates",),
        "arXiv 2404.13628, as in 2502.00089",
    ),
    "lora-ensembles": Method(
        "base adapter, others from other seeds",
        "uniform",
        "logits",
        lambda b: (_with_base(b, "seeds"), LogitCombiner()),
        ("seeds",),
        "arXiv 2310.00035",
    ),
    "self-consistency": Method(
        "base adapter",
        "fixed",
        "texts",
        lambda b: (one_hot(BASE, b.mixture.bank.names), TextCombiner()),
        (),
        "arXiv 2203.11171",
    ),
    "instruction-embedding": Method(
        "embedding clusters -> one LoRA each, plus base",
        "embedding centroids",
        "logits",
        lambda b: (b.router("embedding-clusters"), LogitCombiner()),
        ("embedding-clusters",),
    ),
    "random-cluster": Method(
        "random clusters of ELREA's sizes -> one LoRA each, plus base",
        "uniform",
        "logits",
        lambda b: (_with_base(b, "random-clusters"), LogitCombiner()),
        ("random-clusters",),
    ),
    "uniform-weights": Method("ELREA's", "uniform", "logits", lambda b: (uniform(b.fitted), LogitCombiner())),
    "elrea": Method(
        "base adapter -> gradient features -> BIRCH clusters -> one LoRA each, plus base",
        "gradient centroids",
        "logits",
        lambda b: (b.own.router, LogitCombiner()),
    ),
    "performance-centroids": Method(
        "ELREA's",
        "centroids of rows by who is best on them",
        "logits",
        lambda b: (b.router("performance"), LogitCombiner()),
        ("performance",),
        "AAAI 2025, RouterRetriever",
    ),
    "loss-routing": Method(
        "ELREA's",
        "predicted loss of every expert",
        "logits",
        lambda b: (b.router("loss"), LogitCombiner()),
        ("loss",),
        "this project",
    ),
    "best-single": Method(
        "ELREA's",
        "fixed: the best on training rows, judged crosswise",
        "logits",
        lambda b: (_best_single(b), LogitCombiner()),
        ("judged",),
        "control",
    ),
    "oracle": Method(
        "ELREA's",
        "the best on each row's reference (evaluation only)",
        "logits",
        lambda b: (OracleRouter(b.fitted), LogitCombiner()),
        (),
        "control",
    ),
}
"""The table. Variants of its rows are written `name:top_k=K` (only the K largest weights) and `name:d_proj=D`
(centroids compared in D dimensions), or `name:top_k=K+d_proj=D`."""

VARIANTS = ("top_k", "d_proj")


def method_named(name: str) -> tuple[Method, dict[str, int]]:
    """Look a method or a variant up; return the method and the variant's options.

    Raises:
        CoterieError: when there is none of this name.
    """
    plain, colon, written = name.partition(":")
    if plain not in METHODS:
        raise unknown_name("method", plain, METHODS)
    options = {}
    for part in written.split("+") if colon else ():
        option, _, value = part.partition("=")
        if option not in VARIANTS or not value.isdigit() or int(value) < 1:
            raise CoterieError(
                f"{name!r} is no variant of {plain}; write {plain}:top_k=K or {plain}:d_proj=D, joined by + for both"
            )
        options[option] = int(value)
    return METHODS[plain], options


def _varied(router: Router, options: Mapping[str, int], name: str) -> Router:
    if "d_proj" in options:
        if not isinstance(router, CentroidRouter):
            raise CoterieError(f"{name!r}: only centroids can be compared in fewer dimensions")
        router = router.folded(options["d_proj"])
    return DerivedRouter(router, top_k=options["top_k"]) if "top_k" in options else router


def make_bench(mixture: Mixture, names: Sequence[str], grid: GridSettings) -> Bench:
    """Train what these methods still lack, once, into the mixture's folder, and load it.

    Raises:
        CoterieError: for an unknown method, or when something cannot be trained.
    """
    needed = needs_of(names)
    return Bench(mixture, prepare(open_recipe(mixture, grid), needed) if needed else {})


def load_bench(mixture: Mixture, names: Sequence[str]) -> Bench:
    """Load what these methods need; nothing is trained.

    Raises:
        CoterieError: for an unknown method, or when something was not trained yet.
    """
    needed = needs_of(names)
    for name in needed:
        if mixture.folder is None or not (mixture.folder / "methods" / name).is_dir():
            raise CoterieError(
                f"{', '.join(names)} needs {name}, which was not trained yet; "
                f"type: coterie eval {mixture.folder} --methods base,{','.join(names)} --data ... --output ..."
            )
    return Bench(mixture, {name: load_ingredient(mixture, name) for name in needed})


def needs_of(names: Iterable[str]) -> list[str]:
    """Return what must be trained for these methods, each once."""
    return list(dict.fromkeys(need for name in names for need in method_named(name)[0].needs))

"""Methods on a run of ELREA: experts of clusters, continued from one base adapter, and what is trained beside them."""

from dataclasses import replace

from coterie.experts.names import BACKBONE, BASE
from coterie.methods.elrea.extras import EXTRAS
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import read_losses
from coterie.methods.family import CONTROL, Family, Method, MethodGrid, oracle, single
from coterie.routers.base import Router
from coterie.routers.derived import DerivedRouter
from coterie.routers.fixed import one_hot, uniform

PAPER = "arXiv 2502.00089"
CLUSTERS = "ELREA's"
EMBEDDING = "embedding clusters -> one LoRA each, plus base"
RANDOM = "random clusters of ELREA's sizes -> one LoRA each, plus base"
FITTED = "base adapter -> gradient features -> BIRCH clusters -> one LoRA each, plus base"


def _normalised(grid: MethodGrid) -> Router:
    return DerivedRouter(grid.own.router, normalised=True)


def _extra(name: str, bank: str, router: str, combiner: str, paper: str = PAPER) -> Method:
    """Return the method whose router is that of an extra."""
    return Method(bank, router, combiner, paper, lambda grid: grid.router(name), (name,))


def _with_base(extra: str, bank: str, paper: str = PAPER) -> Method:
    """Return the even mixture of an extra's experts and the base adapter."""
    return Method(
        bank, "uniform", "logits", paper, lambda grid: uniform([BASE, *grid.extras[extra].bank.names]), (extra,)
    )


METHODS = {
    BACKBONE: single(BACKBONE, "none", PAPER),
    BASE: single(BASE, "base adapter", PAPER),
    "per-dataset": replace(
        _extra("datasets", "one LoRA per data set", "the data set's own name", "logits"), by_prompt=False
    ),
    "moe-routing": Method(CLUSTERS, "gradient centroids, normalised", "layers", PAPER, _normalised),
    "moe-merging": Method(CLUSTERS, "gradient centroids, normalised", "weights:factors", PAPER, _normalised),
    "mole": _extra(
        "gates", CLUSTERS, "learned gate per layer and token", "layers", "arXiv 2404.13628, as in 2502.00089"
    ),
    "lora-ensembles": _with_base("seeds", "base adapter, others from other seeds", "arXiv 2310.00035"),
    "self-consistency": Method(
        "base adapter", "fixed", "texts", "arXiv 2203.11171", lambda grid: one_hot(BASE, grid.mixture.bank.names)
    ),
    "instruction-embedding": _extra("embedding-clusters", EMBEDDING, "embedding centroids", "logits"),
    "random-cluster": _with_base("random-clusters", RANDOM),
    "uniform-weights": Method(CLUSTERS, "uniform", "logits", PAPER, lambda grid: uniform(grid.fitted)),
    "elrea": Method(FITTED, "gradient centroids", "logits", PAPER, lambda grid: grid.own.router),
    "performance-centroids": _extra(
        "performance", CLUSTERS, "centroids of rows by who is best on them", "logits", "AAAI 2025, RouterRetriever"
    ),
    "loss-routing": _extra("loss", CLUSTERS, "predicted loss of every expert", "logits", "this project"),
    "best-single": Method(
        CLUSTERS,
        "fixed: the best on training rows, judged crosswise",
        "logits",
        CONTROL,
        lambda grid: one_hot(read_losses(grid.extras["judged"]).best_single(), grid.mixture.bank.names),
        ("judged",),
        simple=True,
    ),
    "oracle": oracle(CLUSTERS),
}
"""By name."""

FAMILY: Family[ElreaRun] = Family(
    "elrea", METHODS, EXTRAS, ElreaRun.open, usual=lambda mixture: [BACKBONE, BASE, "elrea", "uniform-weights"]
)

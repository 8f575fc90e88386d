"""Methods on a run of ELREA: experts of clusters, continued from one base adapter, and what is trained beside them."""

from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.combiners.texts import TextCombiner
from coterie.combiners.weights import WeightCombiner
from coterie.methods.common import BACKBONE, BASE
from coterie.methods.extras import read_judgement
from coterie.methods.family import Bench, Method
from coterie.routers.base import Router
from coterie.routers.derived import DerivedRouter
from coterie.routers.fixed import one_hot, uniform
from coterie.routers.oracle import OracleRouter


def _normalised(bench: Bench) -> DerivedRouter:
    return DerivedRouter(bench.own.router, normalised=True)


def _with_base(bench: Bench, ingredient: str) -> Router:
    return uniform([BASE, *bench.experts(ingredient)])


def _best_single(bench: Bench) -> Router:
    return one_hot(read_judgement(bench.ingredients["judged"]).best_single(), bench.mixture.bank.names)


CLUSTER_METHODS: dict[str, Method] = {
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
"""By name."""

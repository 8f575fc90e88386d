"""Methods on a run of ELREA: experts of clusters, continued from one base adapter, and what is trained beside them."""

from dataclasses import replace

from coterie.experts.names import BACKBONE, BASE
from coterie.methods.elrea.extras import EXTRAS, ONE_LORA
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import read_losses
from coterie.methods.family import CONTROL, Family, Method, MethodGrid, oracle, single
from coterie.mixture import Mixture
from coterie.routers.base import Router
from coterie.routers.derived import DerivedRouter
from coterie.routers.fixed import one_hot, uniform
from coterie.routers.logo import LOGO

PAPER, OURS = "arXiv 2502.00089", "this project"
CLUSTERS = "ELREA's"
EMBEDDING = "embedding clusters -> one LoRA each, plus base"
RANDOM = "random clusters of ELREA's sizes -> one LoRA each, plus base"
FITTED = "base adapter -> gradient features -> BIRCH clusters -> one LoRA each, plus base"


def _elreas(grid: MethodGrid) -> Router:
    """Return ELREA's own router, also where evidence chose another one for the mixture."""
    return grid.own.named_router("gradient-centroids")


def _normalised(grid: MethodGrid) -> Router:
    return DerivedRouter(_elreas(grid), normalised=True)


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
    "random-weights": _with_base(
        "random-weights", "experts as far from the base adapter as ELREA's, at random", "arXiv 2602.12323"
    ),
    "one-lora-same-budget": single(ONE_LORA, "base adapter, trained on on all rows", CONTROL, (ONE_LORA,)),
    "elrea": Method(FITTED, "gradient centroids", "logits", PAPER, _elreas),
    "performance-centroids": _extra(
        "performance", CLUSTERS, "centroids of rows by who is best on them", "logits", "AAAI 2025, RouterRetriever"
    ),
    "membership-routing": _extra(
        "membership", CLUSTERS, "gradient centroids, by what is usual for each", "logits", OURS
    ),
    "elrea-refusing": _extra("refusal", CLUSTERS, "gradient centroids; base where unfamiliar", "logits", OURS),
    "loss-routing": _extra("loss", CLUSTERS, "predicted loss of every expert; base where unfamiliar", "logits", OURS),
    "prefill": _extra(
        "prefill", CLUSTERS, "the same from hidden states, without gradients", "logits", "after arXiv 2603.20895"
    ),
    "avengers": _extra(
        "avengers", CLUSTERS, "nearest cluster of embeddings, by measured loss", "logits", "arXiv 2505.19797"
    ),
    "lorauter": _extra("lorauter", CLUSTERS, "similar data sets, by measured loss", "logits", "arXiv 2601.21795"),
    "ariadne": _extra(
        "ariadne", CLUSTERS, "nearest centroid of embeddings, several an expert", "logits", "arXiv 2606.19079"
    ),
    "logo": Method(
        CLUSTERS,
        "length of what each expert adds to the last block's input",
        "layers",
        "arXiv 2511.07129",
        lambda grid: grid.own.named_router(LOGO),
    ),
    "gradientspace": _extra(
        "gradient-space",
        "clusters in the gradients' strongest directions -> one LoRA each",
        "one, by an encoder",
        "logits",
        "arXiv 2512.06678",
    ),
    "distilled": _extra(
        "distilled", CLUSTERS, "ELREA's weights, taught to hidden states", "logits", "after arXiv 2512.06678"
    ),
    "auto": Method(CLUSTERS, "chosen by evidence (`coterie fit auto`)", "", OURS, lambda grid: grid.own.router),
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
    "random-oracle": oracle(
        RANDOM, lambda grid: (BASE, *grid.extras["random-clusters"].bank.names), ("random-clusters",)
    ),
}
"""By name."""

AUTO = "auto"
USUAL = [BACKBONE, BASE, "elrea", "uniform-weights"]


def _lacks(mixture: Mixture) -> dict[str, str]:
    """Return the methods that a mixture cannot have."""
    return {} if mixture.method == AUTO else {AUTO: "the mixture was not made by coterie fit auto"}


FAMILY: Family[ElreaRun] = Family(
    "elrea",
    METHODS,
    EXTRAS,
    ElreaRun.open,
    usual=lambda mixture: [*USUAL, AUTO] if mixture.method == AUTO else USUAL,
    also_fitted=(AUTO,),
    lacks=_lacks,
)

"""Methods on a bank with an expert for each domain, and centroids to route by: the run of `coterie fit token-level`."""

from coterie.artifacts import read_jsonl
from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.combiners.weights import WeightCombiner
from coterie.errors import CoterieError
from coterie.methods.common import BACKBONE, DOMAINS_FILE, NULL
from coterie.methods.family import Bench, Cell, Method
from coterie.mixture import Mixture
from coterie.routers.fixed import FixedRouter, one_hot, uniform
from coterie.routers.oracle import OracleRouter
from coterie.routers.similarity import PUBLISHED, SimilarityRouter
from coterie.routers.source import SourceRouter
from coterie.routers.spectral import spectral_router
from coterie.routers.token import TokenLevel

TOKEN_LEVEL = "arXiv 2311.10847"
BANK = "one LoRA per domain"


def domain_sources(mixture: Mixture) -> dict[str, str]:
    """Return the expert of every data source that the domains' texts name; the first of several.

    Raises:
        CoterieError: when the texts name none, or the mixture lies in no folder.
    """
    file = mixture.folder / DOMAINS_FILE if mixture.folder else None
    rows = read_jsonl(file) if file and file.exists() else []
    sources: dict[str, str] = {}
    for row in rows:
        if row.get("source"):
            sources.setdefault(str(row["source"]), str(row["expert"]))
    if not sources:
        raise CoterieError("the experts' texts name no source, so nobody can tell which expert a row belongs to")
    return sources


def _published(bench: Bench) -> Cell:
    """The published way, to the letter: largest cosine times 4, factors added as PEFT 0.4 did, no cache kept."""
    own = bench.own.router
    inner = own.router if isinstance(own, TokenLevel) else own
    if not isinstance(inner, SimilarityRouter):
        raise CoterieError(f"the mixture routes by {inner.kind!r}, so there are no similarities to weigh as published")
    router = SimilarityRouter(inner.description, inner.centroids, weighting=PUBLISHED, centre=inner.centre)
    return TokenLevel(router, every=1, cache="recompute"), WeightCombiner("peft-0.4-linear")


def _spectral(bench: Bench, kind: str) -> Cell:
    """Route by the adapters themselves; where the run has a null expert, it takes part."""
    bank = bench.own.bank
    null = NULL if NULL in bank.names else None
    return spectral_router(kind, bench.own.backbone, bank, bench.fitted, null=null), LayerCombiner()


DOMAIN_METHODS: dict[str, Method] = {
    "backbone": Method(
        "none", "fixed", "logits", lambda b: (one_hot(BACKBONE, b.mixture.bank.names), LogitCombiner()), paper="control"
    ),
    "per-dataset": Method(
        BANK,
        "the data set's own name",
        "logits",
        lambda b: (SourceRouter(domain_sources(b.own)), LogitCombiner()),
        paper="control",
    ),
    "uniform-weights": Method(
        BANK, "uniform", "layers", lambda b: (uniform(b.fitted), LayerCombiner()), paper="control"
    ),
    "unit-weights": Method(
        BANK,
        "every expert at full weight",
        "layers",
        lambda b: (FixedRouter(dict.fromkeys(b.fitted, 1.0)), LayerCombiner()),
        paper=TOKEN_LEVEL,
    ),
    "token-level": Method(
        BANK,
        "embedding centroids, renewed at every n-th token",
        "layers",
        lambda b: (b.own.router, b.own.combiner),
        paper=TOKEN_LEVEL,
    ),
    "token-level-published": Method(
        BANK, "the same at every token, cache recomputed", "weights:peft-0.4-linear", _published, paper=TOKEN_LEVEL
    ),
    "arrow": Method(
        BANK,
        "top singular vectors, per layer and token",
        "layers",
        lambda b: _spectral(b, "arrow"),
        paper="arXiv 2405.11157",
    ),
    "spectr": Method(
        BANK, "whole spectra, per layer and token", "layers", lambda b: _spectral(b, "spectr"), paper="arXiv 2504.03454"
    ),
    "oracle": Method(
        BANK,
        "the best on each row's reference (evaluation only)",
        "logits",
        lambda b: (OracleRouter(b.fitted), LogitCombiner()),
        paper="control",
    ),
}
"""By name."""

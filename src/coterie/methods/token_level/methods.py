"""Methods on a bank with an expert for each domain, and centroids to route by: the run of `coterie fit token-level`."""

from coterie.errors import CoterieError
from coterie.experts.names import BACKBONE, NULL
from coterie.methods.common import DOMAINS_FILE
from coterie.methods.extras import FittedRun
from coterie.methods.family import CONTROL, SINGLE_EXPERT, Family, Method, MethodGrid, oracle, single
from coterie.mixture import Mixture
from coterie.records.mixture import TrainingRow
from coterie.records.schema import read_rows
from coterie.routers.base import Router
from coterie.routers.fixed import FixedRouter, SourceRouter, uniform
from coterie.routers.gate import spectral_router
from coterie.routers.token import TokenLevel

PAPER = "arXiv 2311.10847"
BANK = "one LoRA per domain"


def domain_sources(mixture: Mixture) -> dict[str, str]:
    """Return the expert of every data source that the domains' texts name; the first of several.

    Raises:
        CoterieError: when the texts name none, or the mixture lies in no folder.
    """
    file = mixture.folder / DOMAINS_FILE if mixture.folder else None
    rows = read_rows(TrainingRow, file, "build the mixture again") if file and file.exists() else ()
    sources: dict[str, str] = {}
    for row in rows:
        if row.source:
            sources.setdefault(row.source, row.expert)
    if not sources:
        raise CoterieError("the experts' texts name no source, so nobody can tell which expert a row belongs to")
    return sources


def _published(grid: MethodGrid) -> Router:
    """As published: softmax of the cosines of a text's first tokens, the largest times 4; the cache is recomputed."""
    return TokenLevel(grid.own.router.of_prompts.as_published(grid.own.backbone), every=1, cache="recompute")


def _spectral(kind: str, router: str, paper: str) -> Method:
    """Return the method that routes by the adapters themselves; where the run has a null expert, it takes part."""

    def make(grid: MethodGrid) -> Router:
        bank = grid.own.bank
        null = NULL if NULL in bank.names else None
        return spectral_router(kind, grid.own.backbone, bank, grid.fitted, null=null)

    return Method(BANK, router, "layers", paper, make)


METHODS = {
    BACKBONE: single(BACKBONE, "none"),
    "per-dataset": Method(
        BANK, "the data set's own name", "logits", CONTROL, lambda grid: SourceRouter(domain_sources(grid.own))
    ),
    "uniform-weights": Method(BANK, "uniform", "layers", CONTROL, lambda grid: uniform(grid.fitted)),
    "unit-weights": Method(
        BANK,
        "every expert at full weight",
        "layers",
        PAPER,
        lambda grid: FixedRouter(dict.fromkeys(grid.fitted, 1.0)),
    ),
    "token-level": Method(
        BANK, "embedding centroids, renewed at every n-th token", "layers", PAPER, lambda grid: grid.own.router
    ),
    "token-level-published": Method(
        BANK,
        "the same by what the encoder reads from a text's beginning, at every token, cache recomputed",
        "weights:peft-0.4-linear",
        PAPER,
        _published,
    ),
    "arrow": _spectral("arrow", "top singular vectors, per layer and token", "arXiv 2405.11157"),
    "spectr": _spectral("spectr", "whole spectra, per layer and token", "arXiv 2504.03454"),
    "oracle": oracle(BANK),
}
"""By name."""


def _usual(mixture: Mixture) -> list[str]:
    alone = [f"{SINGLE_EXPERT}:{name}" for name in mixture.bank.names if name != NULL]
    return [BACKBONE, *alone, "per-dataset", "uniform-weights", "token-level", "arrow", "spectr", "oracle"]


FAMILY: Family[FittedRun] = Family("token-level", METHODS, {}, None, _usual)

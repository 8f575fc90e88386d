"""Methods on a bank with an expert for each domain, and centroids to route by: the run of `coterie fit token-level`."""

from coterie.backbone.prototypes import PROTOTYPES
from coterie.errors import CoterieError
from coterie.experts.names import BACKBONE, NULL
from coterie.methods.common import DOMAINS_FILE
from coterie.methods.extras import FittedRun
from coterie.methods.family import CONTROL, SINGLE_EXPERT, Family, Method, MethodGrid, oracle, single
from coterie.methods.token_level.domains import METHOD
from coterie.mixture import Mixture
from coterie.records.mixture import TrainingRow
from coterie.records.schema import read_rows
from coterie.routers.base import Router
from coterie.routers.centroid import SIMILARITY
from coterie.routers.fixed import FixedRouter, SourceRouter, uniform
from coterie.routers.logo import BY_UPDATES, LOGO
from coterie.routers.token import TokenLevel

PAPER = "arXiv 2311.10847"
PER_DATASET = "per-dataset"
PUBLISHED = "token-level-published"
BANK = "one LoRA per domain"


def domain_sources(mixture: Mixture) -> dict[str, str]:
    """Return the expert of every data source that the domains' texts name; the first of several.

    Raises:
        CoterieError: when the texts name none, or the mixture lies in no folder.
    """
    sources = _sources(mixture)
    if not sources:
        raise CoterieError("the experts' texts name no source, so nobody can tell which expert a row belongs to")
    return sources


def _sources(mixture: Mixture) -> dict[str, str]:
    file = mixture.folder / DOMAINS_FILE if mixture.folder else None
    rows = read_rows(TrainingRow, file, "build the mixture again") if file and file.exists() else ()
    sources: dict[str, str] = {}
    for row in rows:
        if row.source:
            sources.setdefault(row.source, row.expert)
    return sources


def _published(grid: MethodGrid) -> Router:
    """As published: softmax of the cosines of a text's first tokens, the largest times 4; the cache is recomputed."""
    router = grid.own.named_router(SIMILARITY)
    return TokenLevel(router.as_published(grid.own.backbone), every=1, cache="recompute")


def _token_level(grid: MethodGrid) -> Router:
    own = grid.own
    return own.router if own.method == METHOD else own.named_router(METHOD)


def _by_updates(kind: str, router: str, paper: str) -> Method:
    """Return the method that routes by the adapters themselves; where the run has a null expert, it takes part."""
    return Method(BANK, router, "layers", paper, lambda grid: grid.own.named_router(kind))


METHODS = {
    BACKBONE: single(BACKBONE, "none"),
    PER_DATASET: Method(
        BANK,
        "the data set's own name",
        "logits",
        CONTROL,
        lambda grid: SourceRouter(domain_sources(grid.own)),
        by_prompt=False,
    ),
    "uniform-weights": Method(BANK, "uniform", "layers", CONTROL, lambda grid: uniform(grid.fitted)),
    "unit-weights": Method(
        BANK, "every expert at full weight", "layers", PAPER, lambda grid: FixedRouter(dict.fromkeys(grid.fitted, 1.0))
    ),
    METHOD: Method(BANK, "embedding centroids, renewed at every n-th token", "layers", PAPER, _token_level),
    PUBLISHED: Method(
        BANK,
        "the same by what the encoder reads from a text's beginning, at every token, cache recomputed",
        "weights:peft-0.4-linear",
        PAPER,
        _published,
    ),
    "arrow": _by_updates("arrow", "top singular vectors, per layer and token", "arXiv 2405.11157"),
    "spectr": _by_updates("spectr", "whole spectra, per layer and token", "arXiv 2504.03454"),
    LOGO: _by_updates(LOGO, "length of what each adapter adds to the last block's input", "arXiv 2511.07129"),
    "oracle": oracle(BANK),
}
"""By name."""


def _lacks(mixture: Mixture) -> dict[str, str]:
    """Return what a mixture cannot have whose adapters came without texts, with texts of no source, or of any ranks."""
    lacking = {}
    if SIMILARITY not in {mixture.router.of_prompts.kind, *mixture.trained_routers()}:
        lacking = dict.fromkeys((METHOD, PUBLISHED), "the adapters came without texts to compare with")
    ranks = {(path, len(pair.down)) for adapter in mixture.bank.adapters for path, pair in adapter.items()}
    if len(ranks) > len({path for path, _ in ranks}):
        lacking.setdefault(PUBLISHED, "it adds up factors, and the adapters' ranks differ")
    if not _sources(mixture):
        lacking[PER_DATASET] = "nobody knows which data sets the adapters were made for"
    return lacking


def _usual(mixture: Mixture) -> list[str]:
    alone = [f"{SINGLE_EXPERT}:{name}" for name in mixture.bank.names if name != NULL]
    names = [BACKBONE, *alone, PER_DATASET, "uniform-weights", METHOD, *PROTOTYPES, "oracle"]
    lacking = _lacks(mixture)
    return [name for name in names if name not in lacking]


FAMILY: Family[FittedRun] = Family(METHOD, METHODS, {}, None, _usual, also_fitted=BY_UPDATES, lacks=_lacks)

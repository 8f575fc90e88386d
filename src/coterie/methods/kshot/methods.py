"""Methods on what `coterie fit kshot-moe` has made for one task: the mixture, its rivals and its ablations."""

from coterie.errors import CoterieError
from coterie.experts.names import BACKBONE
from coterie.methods.family import CONTROL, Family, Method, MethodGrid, single
from coterie.methods.kshot.choose_adapters import read_selection
from coterie.methods.kshot.extras import BEST_TUNED, EXTRAS, LORAHUB, UNTUNED
from coterie.methods.kshot.fit import AND_GATHERED, AUTO, GATHERED, METHOD, SELECTION, SHOTS_ALONE
from coterie.methods.kshot.run import KshotRun
from coterie.mixture import Mixture
from coterie.records.task import SelectionRecord
from coterie.routers.base import Router
from coterie.routers.fixed import one_hot, uniform
from coterie.routers.gate import spectral_router

PAPER, OURS = "arXiv 2408.15915", "this project"
CHOSEN = "chosen by shots, fine-tuned"
UNTRAINED = "chosen by shots, as they are"


def _selection(grid: MethodGrid) -> SelectionRecord:
    assert grid.own.folder is not None  # it was loaded from one
    return read_selection(grid.own.folder / SELECTION)


def _untuned(grid: MethodGrid) -> list[str]:
    return [f"{UNTUNED}{name}" for name in _selection(grid).chosen]


def _gated(extra: str, experts: str) -> Method:
    return Method(experts, "learned token gates", "layers", PAPER, lambda grid: grid.router(extra), (extra,))


def _published(grid: MethodGrid) -> Router:
    if grid.own.method != METHOD:
        raise CoterieError(
            f"the mixture was made by coterie fit {AUTO}, so its own is called {AUTO}; {METHOD}, which always trains "
            f"on the gathered rows, is {AND_GATHERED} here"
        )
    return grid.own.router


def _lacks(mixture: Mixture) -> dict[str, str]:
    """Return what a mixture cannot have: what it was not made by, and rows where it was made from the shots alone."""
    made_by, other = (AUTO, METHOD) if mixture.method == AUTO else (METHOD, AUTO)
    lacking = {other: f"the mixture was made by coterie fit {made_by}"}
    has_rows = mixture.folder is not None and (mixture.folder / GATHERED).is_dir()
    return lacking if has_rows else {**lacking, "random-data": "the mixture was fitted without open data"}


METHODS = {
    BACKBONE: single(BACKBONE, "none"),
    METHOD: Method(CHOSEN, "learned token gates", "layers", PAPER, _published),
    AUTO: Method(
        "chosen by shots", f"chosen by evidence (`coterie fit {AUTO}`)", "", OURS, lambda grid: grid.own.router
    ),
    "best-by-shots": Method(
        "the best by shots, as it is",
        "fixed",
        "logits",
        PAPER,
        lambda grid: one_hot(f"{UNTUNED}{_selection(grid).first}", grid.mixture.bank.names),
        ("untuned",),
        simple=True,
    ),
    BEST_TUNED: single(BEST_TUNED, "one adapter", PAPER, (BEST_TUNED,)),
    LORAHUB: single(LORAHUB, "one adapter", "arXiv 2307.13269", (LORAHUB,), simple=False),
    "arrow": Method(
        UNTRAINED,
        "top singular vectors, per layer and token",
        "layers",
        "arXiv 2405.11157",
        lambda grid: spectral_router("arrow", grid.own.backbone, grid.extras["untuned"].bank, _untuned(grid)),
        ("untuned",),
    ),
    "uniform-weights": Method(
        UNTRAINED, "uniform", "layers", CONTROL, lambda grid: uniform(_untuned(grid)), ("untuned",)
    ),
    SHOTS_ALONE: _gated(SHOTS_ALONE, "the same, trained on the shots alone"),
    AND_GATHERED: _gated(AND_GATHERED, "the same, trained on the shots and the gathered rows"),
    "random-data": _gated("random-data", "the same, trained on shots and random open data"),
    "random-experts": _gated("random-experts", "drawn at random, fine-tuned"),
    "by-accuracy": _gated("by-accuracy", "chosen by accuracy alone, fine-tuned"),
    "by-perplexity": _gated("by-perplexity", "chosen by perplexity alone, fine-tuned"),
    "no-diversity": _gated("no-diversity", "chosen by both ranks without diversity, fine-tuned"),
}
"""By name."""

FAMILY: Family[KshotRun] = Family(
    METHOD,
    METHODS,
    EXTRAS,
    KshotRun.open,
    usual=lambda mixture: [BACKBONE, "best-by-shots", BEST_TUNED, "uniform-weights", "arrow", mixture.method],
    also_fitted=(AUTO,),
    lacks=_lacks,
)

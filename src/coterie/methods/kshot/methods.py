"""Methods on what `coterie fit kshot-moe` has made for one task: the mixture, its rivals and its ablations."""

from typing import Any

from coterie.combiners.layers import LayerCombiner
from coterie.combiners.logits import LogitCombiner
from coterie.methods.common import BACKBONE
from coterie.methods.family import Bench, Cell, Method
from coterie.methods.kshot.choose_adapters import best_by_shots, read_selection
from coterie.methods.kshot.extras import BEST_TUNED, LORAHUB, UNTUNED
from coterie.methods.kshot.fit import METHOD, SELECTION
from coterie.routers.fixed import one_hot, uniform
from coterie.routers.spectral import spectral_router

KSHOT = "arXiv 2408.15915"
CHOSEN = "chosen by shots, fine-tuned"
UNTRAINED = "chosen by shots, as they are"


def _selection(bench: Bench) -> dict[str, Any]:
    assert bench.own.folder is not None  # it was loaded from one
    return read_selection(bench.own.folder / SELECTION)


def _untuned(bench: Bench) -> list[str]:
    return [f"{UNTUNED}{name}" for name in _selection(bench)["chosen"]]


def _alone(expert: str) -> Method:
    def cell(bench: Bench) -> Cell:
        return one_hot(expert, bench.mixture.bank.names), LogitCombiner()

    bank = "none" if expert == BACKBONE else "one adapter"
    needs = () if expert == BACKBONE else (expert,)
    papers = {LORAHUB: "arXiv 2307.13269", BACKBONE: "control"}
    return Method(bank, "fixed", "logits", cell, needs, papers.get(expert, KSHOT))


def _best_by_shots(bench: Bench) -> Cell:
    return one_hot(f"{UNTUNED}{best_by_shots(_selection(bench))}", bench.mixture.bank.names), LogitCombiner()


def _uniform(bench: Bench) -> Cell:
    return uniform(_untuned(bench)), LayerCombiner()


def _arrow(bench: Bench) -> Cell:
    bank = bench.ingredients["untuned"].bank
    return spectral_router("arrow", bench.own.backbone, bank, _untuned(bench)), LayerCombiner()


def _gated(ingredient: str, experts: str) -> Method:
    def cell(bench: Bench) -> Cell:
        return bench.router(ingredient), LayerCombiner()

    return Method(experts, "learned token gates", "layers", cell, (ingredient,), KSHOT)


TASK_METHODS: dict[str, Method] = {
    BACKBONE: _alone(BACKBONE),
    METHOD: Method(CHOSEN, "learned token gates", "layers", lambda b: (b.own.router, b.own.combiner), (), KSHOT),
    "best-by-shots": Method("the best by shots, as it is", "fixed", "logits", _best_by_shots, ("untuned",), KSHOT),
    BEST_TUNED: _alone(BEST_TUNED),
    LORAHUB: _alone(LORAHUB),
    "arrow": Method(
        UNTRAINED, "top singular vectors, per layer and token", "layers", _arrow, ("untuned",), "arXiv 2405.11157"
    ),
    "uniform-weights": Method(UNTRAINED, "uniform", "layers", _uniform, ("untuned",), "control"),
    "kshot-only": _gated("kshot-only", "the same, trained on the shots alone"),
    "random-data": _gated("random-data", "the same, trained on shots and random open data"),
    "random-experts": _gated("random-experts", "drawn at random, fine-tuned"),
    "by-accuracy": _gated("by-accuracy", "chosen by accuracy alone, fine-tuned"),
    "by-perplexity": _gated("by-perplexity", "chosen by perplexity alone, fine-tuned"),
    "no-diversity": _gated("no-diversity", "chosen by both ranks without diversity, fine-tuned"),
}
"""By name."""

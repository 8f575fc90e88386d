"""Cross-fitted losses: each expert's loss on training rows, measured with a copy that was trained without those rows.

The rows are cut into folds, evenly within every cluster. For each fold the base adapter and every cluster's expert are
trained once more on the other folds, and these copies are scored on the fold.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from coterie import ranks
from coterie.artifacts import RunFolder, read_tensors, write_tensors
from coterie.data.batching import TokenRow
from coterie.engine.scoring import score_votes
from coterie.experts.bank import load_bank
from coterie.experts.names import BASE
from coterie.methods.common import ExpertJob, assign_folds, base_plan, train_clusters, train_expert
from coterie.methods.elrea.run import ElreaRun
from coterie.mixture import Mixture
from coterie.progress import TRAINING, part, whole
from coterie.routers.fixed import uniform
from coterie.routers.loss import CrossFitLosses

SCORES = "scores.safetensors"


def cross_fit(run: ElreaRun, into: RunFolder) -> CrossFitLosses:
    """Score all experts on all training rows.

    Raises:
        CoterieError: when there are fewer rows than folds.
    """
    count = run.extras.judge_folds
    folds = assign_folds(run.labels, count, run.settings.seed)

    def score_fold(folder: Path, fold: int) -> None:
        rows = [run.kept.rows[i] for i in torch.nonzero(folds == fold).flatten().tolist()]
        work = {
            "base": TRAINING * (len(folds) - len(rows)) * run.settings.training.epochs,
            "experts": TRAINING * (len(folds) - len(rows)) * run.settings.experts.expert_epochs,
            "scores": len(rows) * len(run.mixture.bank),
        }
        with whole(f"fold {fold + 1}", work):
            mixture = _fold_mixture(run, RunFolder(folder), folds != fold, fold)
            with part("scores"):
                write_tensors(folder / SCORES, score_pairs(mixture, rows, f"fold {fold + 1}"))

    def judge(fold: int) -> None:
        with part(f"fold {fold + 1}"):
            into.stage(f"folds/{fold}", partial(score_fold, fold=fold), {}, together=True)

    tasks = {f"fold {fold + 1}": partial(judge, fold) for fold in range(count)}
    with whole("judged", dict.fromkeys(tasks, 1.0)):
        ranks.spread(tasks, dict.fromkeys(tasks, 1.0), "folds to judge")
    parts = [read_tensors(into.path / f"folds/{fold}" / SCORES) for fold in range(count)]
    order = torch.cat([torch.nonzero(folds == fold).flatten() for fold in range(count)]).argsort()
    losses = (torch.cat([part[key] for part in parts])[order] for key in ("nll", "pairs", "tokens"))
    return CrossFitLosses(run.mixture.bank.names, *losses)


def _fold_mixture(run: ElreaRun, into: RunFolder, seen: Tensor, fold: int) -> Mixture:
    """Train the base adapter and every expert on the rows that are seen."""
    of_folds = f"fold {fold + 1} of {run.extras.judge_folds}"
    numbers = torch.nonzero(seen).flatten().tolist()
    rows = [run.kept.rows[i] for i in numbers]
    plan = base_plan(run.settings, f"base, {of_folds}")
    with part("base"):
        base = train_expert(into, BASE, ExpertJob(rows, plan, run.settings.lora), run.mixture.backbone)
    labels, count = [run.labels[i] for i in numbers], max(run.labels) + 1
    with part("experts"):
        experts = train_clusters(into, "cluster", rows, labels, count, run.mixture.backbone, run.settings, base)
    bank = load_bank({BASE: base, **experts}, run.mixture.backbone.model)
    return replace(run.mixture, bank=bank, router=uniform(bank.names))


def score_pairs(mixture: Mixture, rows: Sequence[TokenRow], label: str) -> dict[str, Tensor]:
    """Score every expert and every even pair, in one pass over the rows."""
    count = len(mixture.bank)
    first, second = torch.triu_indices(count, count)
    found = score_votes(
        mixture.backbone,
        mixture.layers,
        mixture.bank.names,
        rows,
        even_pairs(count)[:, None, :].expand(-1, len(rows), -1),
        label,
    )
    pairs: Float[Tensor, "row expert expert"] = torch.zeros(len(rows), count, count)
    pairs[:, first, second] = found.nll.T
    pairs[:, second, first] = found.nll.T
    return {"nll": pairs.diagonal(dim1=1, dim2=2).contiguous(), "pairs": pairs, "tokens": found.tokens}


def even_pairs(count: int) -> Float[Tensor, "pair expert"]:
    """Return the weights of every even pair of experts, an expert with itself among them, in `triu_indices`' order."""
    first, second = torch.triu_indices(count, count)
    eye = torch.eye(count)
    return (eye[first] + eye[second]) / 2

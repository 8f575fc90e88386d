"""LESS (arXiv 2402.04333): how much a step on a training row would lower the loss on the rows that are aimed at.

At every checkpoint that is the cosine of Adam's step for the one and the plain gradient of the other, which are summed
by the checkpoints' learning rates; of several tasks among the rows aimed at, by their sources, the best counts.

GIST (arXiv 2602.18584) compares plain gradients of both, in the few directions that those aimed at lie in, since Adam
scales single coordinates, but LoRA's factors act together.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie import ranks
from coterie.artifacts import RunFolder, as_path, check_output, run_folder, write_json, write_jsonl
from coterie.data.batching import TokenRow, tokenise
from coterie.data.examples import Example, load_all
from coterie.errors import CoterieError
from coterie.experts.checkpoint import load_checkpoint
from coterie.features.gradient import Checkpoint, GradientFeatures, read_features, write_features
from coterie.features.subspace import strongest_directions
from coterie.methods.common import Data, backbone_key, hash_examples, hash_rows, named_parts
from coterie.mixture import Mixture
from coterie.mixture.folder import find_mixture, hash_mixture
from coterie.settings.influence import AnswerFeatureSettings, InfluenceSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat, values_of

logger = logging.getLogger(__name__)

LONGEST = 2048  # tokens of a row
BLOCK_ROWS = 2048  # rows whose features are in memory at a time
SCORES_FILE, CHOSEN_FILE, SUMMARY_FILE = "scores.jsonl", "chosen.jsonl", "influence.json"


@dataclass(frozen=True)
class Influence:
    """The folder of a finished `coterie influence`.

    Attributes:
        folder: with the scores and the chosen rows.
        scores: of every row that was not too long, in the data's order.
        examples: the rows.
        chosen: numbers of the chosen rows, the most helpful first.
    """

    folder: Path
    scores: Float[Tensor, " row"]
    examples: Sequence[Example]
    chosen: Sequence[int]

    def __str__(self) -> str:
        rows = f"{len(self.chosen)} of {len(self.examples)} rows"
        ends = f"influence {self.scores[self.chosen[0]]:.4f} to {self.scores[self.chosen[-1]]:.4f}"
        return f"{self.folder / CHOSEN_FILE}: {rows}, {ends} (all: {float(self.scores.mean()):.4f} on average)"


def influence(
    mixture: str | Path,
    target_rows: Data,
    data: Data,
    *,
    output: str | Path,
    **settings: Any,  # noqa: ANN401 - fields of InfluenceSettings
) -> Influence:
    """Score training rows by how much each would help with a few rows that are aimed at; write the best ones out.

    Args:
        mixture: folder of a run of `fit elrea` or `fit auto`.
        target_rows: what is aimed at: a file, `datasets` source, several of them, or examples.
        data: rows to choose from, in the same forms.
        output: folder to write to.
        **settings: other fields of `InfluenceSettings`, such as share=0.1.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    named, given = named_parts({"target_rows": target_rows, "data": data})
    flat = {"mixture": str(mixture), **named, "output": str(output), **settings}
    return write_influence(from_flat(InfluenceSettings, flat), given)


_Rows = list[tuple[Example, TokenRow]]


def _open(
    settings: InfluenceSettings, given: Mapping[str, Sequence[Example]]
) -> tuple[Mixture, list[Path], dict[str, _Rows], dict[str, str]]:
    """Return the mixture, its checkpoints, the rows aimed at and those to choose from, and the hashes of all."""
    check_output(as_path(settings.output), settings)
    aimed = given.get("target_rows") or load_all(settings.target_rows, reading=settings.reading.shared)
    rows = given.get("data") or load_all(settings.data, settings.limit, settings.reading)
    checkpoints = sorted((find_mixture(settings.mixture) / "checkpoints").glob("epoch-*"))
    if not checkpoints:
        raise CoterieError(
            f"{settings.mixture} has no checkpoints/epoch-0, whose gradients tell influence; "
            "give a run of coterie fit elrea or coterie fit auto"
        )
    mixture = Mixture.from_pretrained(settings.mixture, **settings.placement.model_dump())
    sides = {"aimed": _fitting(mixture, aimed, "rows aimed at"), "data": _fitting(mixture, rows, "rows of data")}
    assert mixture.folder is not None  # it was loaded from one
    inputs = {"mixture": hash_mixture(mixture.folder), "target": hash_examples(aimed), "data": hash_examples(rows)}
    return mixture, checkpoints, sides, inputs


@takes_fields(InfluenceSettings)
@ranks.joined()
def write_influence(settings: InfluenceSettings, given: Mapping[str, Sequence[Example]] | None = None) -> Influence:
    """Score the rows as the settings say, by all processes that were launched.

    An interrupted run keeps the features that it has.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = as_path(settings.output)
    mixture, checkpoints, sides, inputs = ranks.each(lambda: _open(settings, given or {}))
    with run_folder(output, settings, inputs) as run:
        points = [load_checkpoint(folder, mixture.backbone.model) for folder in checkpoints]
        tokens = {side: [row for _, row in own] for side, own in sides.items()}
        tasks = [example.source for example, _ in sides["aimed"]]
        scores = score_rows(mixture, points, tokens["data"], tokens["aimed"], tasks, settings, run)
        examples = [example for example, _ in sides["data"]]
        chosen = scores.argsort(descending=True, stable=True)[: math.ceil(settings.share * len(scores))].tolist()
        known = zip(examples, scores.tolist(), strict=True)
        told = [{"id": row.id, "source": row.source, "influence": score} for row, score in known]
        write_jsonl(run.path / SCORES_FILE, told)
        fields = ({name: value for name, value in asdict(examples[i]).items() if value} for i in chosen)
        best = [{**own, "influence": float(scores[i])} for own, i in zip(fields, chosen, strict=True)]
        write_jsonl(run.path / CHOSEN_FILE, best)
        facts = {"rows": len(examples), "chosen": len(chosen), "target_rows": len(tasks), "checkpoints": len(points)}
        write_json(run.path / SUMMARY_FILE, facts)
    return Influence(output, scores, examples, chosen)


def _fitting(mixture: Mixture, examples: Sequence[Example], what: str) -> _Rows:
    """Tokenise rows; too long ones are left out and counted."""
    kept = tokenise(mixture.prompts, list(examples), LONGEST, mixture.backbone.positions)
    if kept.dropped:
        logger.info("%d of %d %s are longer than %d tokens and left out", kept.dropped, len(examples), what, LONGEST)
    if not kept.rows:
        raise CoterieError(f"all {what} are longer than {LONGEST} tokens; give shorter ones")
    return list(zip(kept.examples, kept.rows, strict=True))


def score_rows(
    mixture: Mixture,
    checkpoints: Sequence[Checkpoint],
    rows: Sequence[TokenRow],
    aimed: Sequence[TokenRow],
    tasks: Sequence[str | None],
    settings: InfluenceSettings,
    run: RunFolder,
) -> Float[Tensor, " row"]:
    """Sum over checkpoints the cosines of rows' steps and gradients aimed at, by learning rates that sum to 1."""
    total = torch.zeros(len(rows), len(aimed))
    form, directions = ("adam", None) if settings.geometry == "adam" else ("sgd", settings.directions)
    rates = torch.tensor([point.adam.learning_rate for point in checkpoints], dtype=torch.float64)
    for number, (point, share) in enumerate(zip(checkpoints, (rates / rates.sum()).tolist(), strict=True)):
        found = []
        for side, own_form, own in (("data", form, rows), ("aimed", "sgd", aimed)):
            how = AnswerFeatureSettings(form=own_form, d_proj=settings.d_proj)
            features = GradientFeatures(mixture.backbone, [point], how, settings.seed)
            made_from = {**values_of(how), "seed": settings.seed, **backbone_key(mixture.backbone)}
            folder = run.stage(
                f"working/features/{number}-{side}",
                partial(write_features, features, own),
                {**made_from, "rows": hash_rows(own)},
                inputs=("mixture",),
                together=True,
            )
            found.append(read_features(folder, len(own), "delete the folder and start again"))
        for block, sums in zip(found[0].split(BLOCK_ROWS), total.split(BLOCK_ROWS), strict=True):
            sums += share * alignment(block, found[1], directions)
    return best_task(total, tasks)


def alignment(
    rows: Float[Tensor, "row dimension"], aimed: Float[Tensor, "aimed dimension"], directions: int | None = None
) -> Float[Tensor, "row aimed"]:
    """Return the cosines of all pairs; with `directions`, of what both have in so many of those that `aimed` lie in."""
    if directions is not None:
        basis = strongest_directions(aimed, directions)
        rows, aimed = rows @ basis.T, aimed @ basis.T
    return torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(aimed, dim=-1).T


def best_task(influences: Float[Tensor, "row aimed"], tasks: Sequence[str | None]) -> Float[Tensor, " row"]:
    """Average over the rows of each task, and take the task that a row helps most."""
    groups = [[i for i, own in enumerate(tasks) if own == task] for task in dict.fromkeys(tasks)]
    return torch.stack([influences[:, own].mean(dim=1) for own in groups]).amax(dim=0)

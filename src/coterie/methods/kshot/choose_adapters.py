"""Adapters of a bank for a task of which a few examples are known (arXiv 2408.15915, algorithm 1).

Adapters are loaded some at a time, and those that are loaded answer and are scored together; with successive halving,
as LORAUTER (arXiv 2601.21795) does for banks of hundreds, most of them see a few shots only.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import JsonCache, as_path, check_output, run_folder, write_json, write_jsonl
from coterie.cluster import Elsewhere, joined
from coterie.errors import CoterieError
from coterie.experts.adapter_selection import AdapterGroup, Ranked, groups, similarities
from coterie.experts.bank import load_bank
from coterie.experts.bank_folder import leaks
from coterie.methods.common import named_sources
from coterie.methods.kshot.rationales import FROM_DATA, with_rationales
from coterie.methods.kshot.shot_scoring import ShotScoring, candidate_count, open_scoring
from coterie.methods.kshot.task import KshotTask, choosing_values, open_task, scores_cache
from coterie.progress import ANSWERING, part, whole
from coterie.records.schema import read
from coterie.records.task import AdapterRecord, GroupRecord, SelectionRecord
from coterie.records.wording import columns
from coterie.settings.commands import KshotSettings, SelectSettings
from coterie.settings.groups import SelectAdaptersSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import from_flat

logger = logging.getLogger(__name__)

SELECTION_FILE = "selection.json"
SCORES_FILE = "scores.jsonl"
GROUPS_KEPT = 20
FORMATS = ("{:.0%}", "{:.3f}", "{:.0f}", "{:.2f}")


@dataclass(frozen=True)
class Selected:
    """Which adapters were chosen, and why.

    Attributes:
        record: what `selection.json` holds.
        scores: what `scores.jsonl` holds: every adapter's answer to every shot that it saw.
    """

    record: SelectionRecord
    scores: list[dict[str, Any]]

    @property
    def chosen(self) -> list[str]:
        """Names of the chosen adapters, best first."""
        return list(self.record.chosen)

    def write(self, folder: Path) -> None:
        """Write `selection.json` and `scores.jsonl` into a folder."""
        write_jsonl(folder / SCORES_FILE, self.scores)
        write_json(folder / SELECTION_FILE, self.record.plain())

    def __str__(self) -> str:
        """Return a table of all adapters, best first; the last column tells why each is in or out.

        Likeness is to the chosen group, on average.
        """
        lines: list[Sequence[str]] = [("adapter", "right", "perplexity", "ranks", "likeness", "why")]
        for one in self.record.adapters:
            numbers = zip((one.accuracy, one.perplexity, one.rank_sum, one.similarity), FORMATS, strict=True)
            told = ["-" if number is None else form.format(number) for number, form in numbers]
            lines.append((one.name, *told, one.why or ""))
        return columns(lines, "<>>>><")


def select(folder: str | Path, shots: str | list[str], *, output: str | Path, **settings: Any) -> Selected:  # noqa: ANN401
    """Choose adapters of a bank for a task of which a few examples are known (arXiv 2408.15915, algorithm 1).

    Args:
        folder: the bank.
        shots: the task's examples: a JSONL file or `datasets` source, or several.
        output: folder to write `selection.json` and `scores.jsonl` to.
        **settings: fields of `SelectSettings` and its groups by their plain names, such as keep=4 or halving=5.

    Raises:
        CoterieError: for bad data or settings, a bank without enough adapters, or an output folder that exists.
    """
    flat = {"folder": str(folder), "shots": named_sources(shots)[0], "output": str(output), **settings}
    return select_adapters(from_flat(SelectSettings, flat))


@takes_fields(SelectSettings)
def select_adapters(settings: SelectSettings) -> Selected:
    """Choose adapters of a bank, and write the choice into the output folder; an interrupted run goes on.

    Raises:
        CoterieError: for bad data, a bank without enough adapters, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    task = open_task(settings.folder, settings, settings.system_prompt)
    with run_folder(output, settings, task.inputs()) as run:
        selected = choose(task, settings, scores_cache(run, choosing_values(settings, settings.system_prompt, task)))
        selected.write(run.path)
    return selected


def choose(task: KshotTask, settings: SelectSettings | KshotSettings, cached: JsonCache) -> Selected:
    """Score the bank's adapters on the shots and choose the group to keep; `cached` keeps scores for another try.

    Raises:
        CoterieError: when too few adapters are left, or no shot can be graded though accuracy counts.
    """
    how, bank = settings.adapters, task.bank
    known = leaks(bank, [*task.shots, *task.excluded])
    for name, count in known.items():
        done = "is left out" if how.exclude_leaks else "takes part; add --exclude-leaks to leave it out"
        logger.warning("%s was trained on %d of the shots and excluded rows and %s", name, count, done)
    names = [name for name in bank.names if not (how.exclude_leaks and name in known)]
    if len(names) < how.keep:
        raise CoterieError(
            f"{bank.path} has {len(names)} adapters to choose from, fewer than --keep {how.keep}; "
            "add adapters with coterie bank add, or lower --keep"
        )
    how = how.model_copy(update={"candidates": candidate_count(how, len(names))})
    written = settings.rationale.rationales != FROM_DATA
    with whole("select", {"rationales": ANSWERING * len(task.shots) * written, "scores": scoring_work(task, how)}):
        with part("rationales"):
            rationales = with_rationales(task.shots, settings.rationale, settings.placement, how.scoring_batch_size)
        opened = str(task.bank.path), settings, task.prompts.system_prompt, rationales, how
        elsewhere = Elsewhere(settings.sharing.workers, settings.placement.device, open_scoring, opened)
        scoring = ShotScoring(task, rationales, how, cached, elsewhere if settings.sharing.ray else None)
        with part("scores"), joined() if settings.sharing.ray else nullcontext():
            order, rounds = scoring.halve(names)
    candidates = order[: how.candidates]
    best, likeness = best_groups(task, candidates, how)
    similarity = {}  # of every candidate to the other members of the chosen group
    places = {one.name: place for place, one in enumerate(candidates)}
    for name, place in places.items():
        others = [places[member] for member in best[0].names if member != name]
        similarity[name] = round(float(likeness[place, others].mean()), 6) if others else 0.0
    record = SelectionRecord(
        settings=how.model_dump(exclude={"exclude"}),
        shots=len(task.shots),
        chosen=best[0].names,
        adapters=tuple(_adapter_records(scoring, names, order, best, similarity, known)),
        subsets=tuple(GroupRecord(**asdict(group)) for group in best[:GROUPS_KEPT]),
        halving=tuple(rounds),
    )
    return Selected(record, [cell for name in sorted(scoring.cells) for cell in scoring.cells[name]])


def best_groups(
    task: KshotTask, candidates: Sequence[Ranked], how: SelectAdaptersSettings
) -> tuple[list[AdapterGroup], Float[Tensor, "candidate candidate"]]:
    """Compare all groups of candidates of the size to keep, best first; return how alike candidates are, too."""
    folders = {one.name: task.bank.folder_of(one.name) for one in candidates}
    adapters = load_bank(folders, task.backbone.model).adapters
    likeness = similarities(adapters, "factors" if how.diversity == "factors" else "updates")
    return groups(candidates, likeness, how.keep, diverse=how.diversity != "none"), likeness


def scoring_work(task: KshotTask, how: SelectAdaptersSettings) -> float:
    """Return what scoring all adapters on all shots weighs."""
    return len(task.bank.names) * len(task.shots) * (1.0 + ANSWERING * (how.rank_by != "perplexity"))


def _adapter_records(
    scoring: "ShotScoring",
    names: Sequence[str],
    order: Sequence[Ranked],
    best: Sequence[AdapterGroup],
    similarity: Mapping[str, float],
    known: Mapping[str, int],
) -> list[AdapterRecord]:
    """Return a record of every adapter: those that saw all shots, best first, then the others with why they did not."""
    chosen = best[0].names
    reasons = _reasons(scoring, order, best, known)
    bank, finished = scoring.task.bank, {one.name: one for one in order}
    trained_on = {card.name: card.rows for card in bank.cards}
    dropped = {name: "halving" for name in names if name not in finished}
    dropped |= {name: "leak" for name in bank.names if name not in names}
    rows = []
    for name in [*finished, *dropped]:
        one, cells = finished.get(name), scoring.cells.get(name)
        has_perplexity = one is not None and one.log_perplexity < math.log(1e300)
        rows.append(
            AdapterRecord(
                name=name,
                accuracy=None if one is None or math.isnan(one.accuracy) else one.accuracy,
                perplexity=math.exp(one.log_perplexity) if one and has_perplexity else None,
                rank_accuracy=one.rank_accuracy if one else None,
                rank_perplexity=one.rank_perplexity if one else None,
                rank_sum=one.rank_sum if one else None,
                similarity=similarity.get(name),
                nll=sum(cell["nll"] for cell in cells) / len(cells) if cells else None,
                candidate=name in similarity,
                chosen=name in chosen,
                leak=known.get(name, 0),
                known_rows=trained_on[name],
                dropped=dropped.get(name),
                why=reasons[name],
            )
        )
    return rows


def _reasons(
    scoring: "ShotScoring", order: Sequence[Ranked], best: Sequence[AdapterGroup], known: Mapping[str, int]
) -> dict[str, str]:
    """Say of every adapter of the bank why it is in or out: each filter, and each comparison of groups, in turn."""
    how, chosen = scoring.settings, best[0]
    by = {"both": "accuracy and perplexity"}.get(how.rank_by, how.rank_by)
    told = {}
    for name in scoring.task.bank.names:
        if name in scoring.cells:
            told[name] = f"out: not among the best on its {len(scoring.cells[name])} shots (--halving)"
        else:
            told[name] = f"out: knows {known[name]} of the shots and excluded rows (--exclude-leaks)"
    for place, one in enumerate(order, start=1):
        is_in = one.name in chosen.names
        if place > (how.candidates or 0):
            told[one.name] = (
                f"out: number {place} of {len(order)} by {by}, only the best {how.candidates} are candidates"
            )
            continue
        other = next((group for group in best if (one.name in group.names) != is_in), None)
        if other is None:
            told[one.name] = f"in: number {place} of {len(order)} by {by}, and all {how.candidates} candidates are kept"
        else:
            groups_of_it = f"the best group {'without' if is_in else 'with'} it has {_score(other)}"
            told[one.name] = f"{'in' if is_in else 'out'}: {groups_of_it}, the chosen one {_score(chosen)}"
    return told


def _score(group: AdapterGroup) -> str:
    return f"{group.score} (ranks {group.rank_sum} + diversity {group.rank_diversity})"


def read_selection(folder: Path) -> SelectionRecord:
    """Read `selection.json` of a folder.

    Raises:
        CoterieError: when it is missing or broken.
    """
    return read(SelectionRecord, folder / SELECTION_FILE, "make it again with coterie select")

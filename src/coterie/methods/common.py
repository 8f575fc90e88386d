"""What methods share: training plans from settings, and experts of clusters continued from the base adapter."""

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from coterie import ranks
from coterie.artifacts import RunFolder, hash_json_list, write_jsonl
from coterie.backbone.loading import Backbone
from coterie.data.batching import TokenRow
from coterie.data.examples import Example, read_all
from coterie.data.spooled import Chosen
from coterie.data.streaming import ExampleSource
from coterie.errors import CoterieError
from coterie.experts.bank import CONFIG_FILE, WEIGHTS_FILE
from coterie.experts.cards import hash_adapter
from coterie.experts.training import train_adapter
from coterie.experts.training_plan import TrainingPlan, read_log
from coterie.progress import part, whole
from coterie.settings.commands import ElreaSettings, KshotSettings, TokenLevelSettings
from coterie.settings.groups import LoraSettings
from coterie.settings.reading import values_of
from coterie.settings.rows import READING, ReadingSettings

DOMAINS_FILE = "domains.jsonl"
"""The texts that every domain's expert was made for: id, source, category and expert of each."""
FIELDS_ADDED_LATER = ("answers", "tests")
Data = ExampleSource | Sequence[str]
"""A file or `datasets` source, several of them, or examples in memory."""
IN_MEMORY = "(in memory)"
"""Stands in a run's record for data that came from no file."""


def named_sources(data: Data) -> tuple[list[str], list[Example]]:
    """Return what a run's record calls its data, and the examples of data that came from no file.

    Raises:
        CoterieError: for sources among examples.
    """
    if isinstance(data, str):
        return [data], []
    examples = [row for row in data if isinstance(row, Example)]
    if not examples:
        return [str(source) for source in data], []
    if len(examples) < len(data):
        raise CoterieError(
            f"{len(examples)} of {len(data)} parts of the data are examples; give all or none as examples"
        )
    return [IN_MEMORY], examples


def named_parts(parts: Mapping[str, Data]) -> tuple[dict[str, list[str]], dict[str, Sequence[Example]]]:
    """Return both for several parts of a run's data; the examples only of parts that came from no file."""
    told = {name: named_sources(part) for name, part in parts.items()}
    sources = {name: own for name, (own, _) in told.items()}
    return sources, {name: rows for name, (_, rows) in told.items() if rows}


def load_questions(
    sources: Sequence[str], limit: int | None = None, reading: ReadingSettings = READING
) -> list[Example]:
    """Load rows that need not have a response.

    Raises:
        CoterieError: as `load_examples`.
    """
    return list(read_all(sources, limit, need_response=False, reading=reading))


def base_plan(
    settings: ElreaSettings | TokenLevelSettings | KshotSettings,
    label: str,
    **changes: Any,  # noqa: ANN401 - fields of TrainingPlan
) -> TrainingPlan:
    """Return how an adapter is trained by a run's own training settings and seed, unless some are changed."""
    training = settings.training
    plan = TrainingPlan(
        epochs=training.epochs,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        seed=settings.seed,
        report_to=training.report_to,
        label=label,
    )
    return replace(plan, **changes)


def origin(example: Example) -> dict[str, str | None]:
    """Return what records keep of a row: what it is called and where it comes from."""
    return {"id": example.id, "source": example.source, "category": example.category}


def train_clusters(
    run: RunFolder,
    prefix: str,
    rows: Sequence[TokenRow],
    labels: Sequence[int],
    count: int,
    backbone: Backbone,
    settings: ElreaSettings,
    base: Path,
) -> dict[str, Path]:
    """Continue the base adapter on every cluster's rows; return the experts' folders by name, `<prefix>-<number>`.

    A cluster without rows gets the base adapter itself.
    """
    how = settings.experts
    groups = np.asarray(labels)
    members = {f"{prefix}-{number}": Chosen(rows, np.flatnonzero(groups == number)) for number in range(count)}
    jobs = {}
    for number, (name, own) in enumerate(members.items(), start=1):
        label, rate = f"{name} ({number} of {count})", how.expert_learning_rate
        if own:
            jobs[name] = ExpertJob(own, base_plan(settings, label, epochs=how.expert_epochs, learning_rate=rate), base)
    trained = train_experts(run, jobs, backbone, f"experts of {prefix}")
    return {name: trained.get(name, base) for name in members}


class ExpertJob(NamedTuple):
    """An expert to train: its rows, how, what it starts from (as for `train_adapter`); inputs of the run behind it."""

    rows: Sequence[TokenRow]
    plan: TrainingPlan
    start: Path | LoraSettings
    inputs: Iterable[str] | None = None


def train_experts(run: RunFolder, jobs: Mapping[str, ExpertJob], backbone: Backbone, what: str) -> dict[str, Path]:
    """Train experts and return their folders, by name.

    Several processes take whole experts each, since none has then to wait for another within one.
    """

    def train(name: str) -> None:
        with part(name):
            train_expert(run, name, jobs[name], backbone)

    weights = {name: float(len(job.rows) * job.plan.epochs) for name, job in jobs.items()}
    with whole(what, weights):
        ranks.spread({name: partial(train, name) for name in jobs}, weights, what)
    folders = {name: run.path / "experts" / name for name in jobs}
    run.wanted.update(f"experts/{name}" for name in jobs)  # also those that other processes asked for
    return folders


def train_expert(run: RunFolder, name: str, job: ExpertJob, backbone: Backbone) -> Path:
    """Train one expert by all processes together, and return its folder, `experts/<name>` of the run."""
    run.renamed(f"training/{name}", f"experts/{name}")
    return run.stage(
        f"experts/{name}",
        lambda folder: train_adapter(backbone, job.rows, job.plan, folder, job.start),
        training_key(backbone, job),
        inputs=job.inputs,
        together=True,
    )


def training_key(backbone: Backbone, job: ExpertJob) -> dict[str, Any]:
    """Return all that decides what a training ends with."""
    own = {name: value for name, value in asdict(job.plan).items() if name not in ("label", "report_to")}
    begun = values_of(job.start) if isinstance(job.start, LoraSettings) else {"start": hash_adapter(job.start)}
    return {**backbone_key(backbone), "rows": hash_rows(job.rows), **own, **begun}


def backbone_key(backbone: Backbone) -> dict[str, str]:
    """Return what of a base model decides the numbers that are computed with it."""
    kinds = sorted({type(module).__name__ for module in backbone.model.modules() if "Linear" in type(module).__name__})
    form = f"{str(backbone.model.dtype).removeprefix('torch.')} on {backbone.device.type}, {'/'.join(kinds)}"
    return {"base_model": backbone.identity.sha256, "held": form}


def hash_rows(rows: Sequence[TokenRow]) -> str:
    """Hash tokenised rows."""
    return hash_json_list(asdict(row) for row in rows)


def copy_expert(run: RunFolder, name: str, adapter: Path) -> Path:
    """Copy the two files of a PEFT adapter to `experts/<name>` of the run, and return that folder."""

    def copy(folder: Path) -> None:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            shutil.copy(adapter / file, folder / file)

    return run.stage(f"experts/{name}", copy, {"adapter": hash_adapter(adapter)})


def assign_folds(labels: Sequence[int], count: int, seed: int) -> Tensor:
    """Return the fold of every row, as even as can be within every cluster and over all.

    Raises:
        CoterieError: when there are fewer rows than folds.
    """
    if len(labels) < count:
        raise CoterieError(f"{len(labels)} training rows cannot be cut into {count} folds; lower --judge-folds")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_cluster = shuffled[torch.tensor(labels)[shuffled].argsort(stable=True)]
    folds = torch.empty(len(labels), dtype=torch.long)
    folds[by_cluster] = torch.arange(len(labels)) % count
    return folds


def join_logs(run: RunFolder, trainings: Iterable[Path]) -> None:
    """Join the logs of a run's trainings, which lie in the folders of these, in `metrics.jsonl`."""
    write_jsonl(run.path / "metrics.jsonl", [entry for folder in trainings for entry in read_log(folder)])


def hash_examples(examples: Sequence[Example]) -> str:
    """Hash the contents of examples; the fields that came later do not enter where they are empty."""
    return hash_json_list(
        {k: v for k, v in asdict(example).items() if k not in FIELDS_ADDED_LATER or v} for example in examples
    )

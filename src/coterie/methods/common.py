"""What methods share: training plans from settings, and experts of clusters continued from the base adapter."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from coterie.artifacts import RunFolder, hash_json
from coterie.backbone.loading import Backbone
from coterie.data.batching import TokenRow
from coterie.data.examples import Example
from coterie.experts.names import BASE
from coterie.experts.training import TrainingPlan, train_adapter
from coterie.settings.commands import ElreaSettings, KshotSettings, TokenLevelSettings
from coterie.settings.groups import LoraSettings

DOMAINS_FILE = "domains.jsonl"
"""The texts that every domain's expert was made for: id, source, category and expert of each."""
FIELDS_ADDED_LATER = ("answers", "tests")
IN_MEMORY = "(in memory)"
"""Stands in a run's record for data that came from no file."""


def named_sources(data: str | Sequence[str] | Sequence[Example]) -> tuple[list[str], list[Example]]:
    """Return what a run's record calls its data, and the examples of data that came from no file."""
    if isinstance(data, str):
        return [data], []
    examples = [row for row in data if isinstance(row, Example)]
    return ([IN_MEMORY], examples) if examples else ([str(source) for source in data], [])


def base_plan(
    settings: ElreaSettings | TokenLevelSettings | KshotSettings,
    label: str,
    *,
    seed: int | None = None,
    keep_epochs: bool = True,
) -> TrainingPlan:
    """Return how an adapter is trained by a run's own training settings, with the run's seed or one of its own."""
    training = settings.training
    return TrainingPlan(
        epochs=training.epochs,
        learning_rate=training.learning_rate,
        batch_size=training.batch_size,
        micro_batch_size=training.micro_batch_size,
        seed=settings.seed if seed is None else seed,
        report_to=training.report_to,
        label=label,
        keep_epochs=keep_epochs,
    )


def expert_plan(settings: ElreaSettings, label: str) -> TrainingPlan:
    """Return how an expert is continued from the base adapter."""
    plan = base_plan(settings, label, keep_epochs=False)
    return replace(plan, epochs=settings.experts.expert_epochs, learning_rate=settings.experts.expert_learning_rate)


def cluster_rows(rows: Sequence[TokenRow], labels: Sequence[int]) -> list[list[TokenRow]]:
    """Return the rows of every cluster, from 0 to the largest label."""
    groups: list[list[TokenRow]] = [[] for _ in range(max(labels) + 1)]
    for row, label in zip(rows, labels, strict=True):
        groups[label].append(row)
    return groups


def cluster_record(example: Example, cluster: str) -> dict[str, str | None]:
    """Return what `clusters.jsonl` keeps of a row."""
    return {"id": example.id, "source": example.source, "category": example.category, "cluster": cluster}


def train_clusters(
    run: RunFolder,
    prefix: str,
    groups: Sequence[Sequence[TokenRow]],
    backbone: Backbone,
    settings: ElreaSettings,
    base: Path | None = None,
) -> dict[str, Path]:
    """Continue the base adapter on every group of rows; return the experts' folders by name, `<prefix>-<number>`.

    A group without rows gets a copy of the base adapter (`base`; by default the run's own expert of that name).
    """
    start = base or run.path / "experts" / BASE
    folders = {}
    for number, rows in enumerate(groups):
        name = f"{prefix}-{number}"
        plan = expert_plan(settings, f"{name} ({number + 1} of {len(groups)})")
        folders[name] = train_expert(run, name, rows, backbone, plan, start) if rows else start
    return folders


def train_expert(
    run: RunFolder,
    name: str,
    rows: Sequence[TokenRow],
    backbone: Backbone,
    plan: TrainingPlan,
    start: Path | LoraSettings,
) -> Path:
    """Train one expert and return its folder, `experts/<name>` of the run; `start` is as for `train_adapter`."""
    trained = run.stage(f"training/{name}", lambda folder: train_adapter(backbone, rows, plan, folder, start))
    return run.stage(f"experts/{name}", adapter_copier(trained))


def copier(source: Path) -> Callable[[Path], None]:
    """Return a stage that copies a whole folder."""

    def copy(folder: Path) -> None:
        shutil.copytree(source, folder, dirs_exist_ok=True)

    return copy


def adapter_copier(source: Path) -> Callable[[Path], None]:
    """Return a stage that copies the two files of a PEFT adapter."""

    def copy(folder: Path) -> None:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(source / name, folder / name)

    return copy


def hash_examples(examples: Sequence[Example]) -> str:
    """Hash the contents of examples; the fields that came later do not enter where they are empty."""
    filled = [{k: v for k, v in asdict(example).items() if k not in FIELDS_ADDED_LATER or v} for example in examples]
    return hash_json(filled)

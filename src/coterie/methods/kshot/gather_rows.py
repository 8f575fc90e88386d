"""Open data for a task of which a few examples are known: similar to them, diverse, and free of leaks.

The data step of "Leveraging Open Knowledge for Advancing Task Expertise" (arXiv 2408.15915). Pools are read three times
and never held: to check and index their rows, to embed what was never embedded, and to copy the chosen rows.
"""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coterie.artifacts import check_output, read_json, run_folder, write_json, write_jsonl
from coterie.data import row_selection
from coterie.data.examples import Example, load_examples
from coterie.data.row_selection import RowSelection, select_rows
from coterie.data.streaming import (
    COPY,
    EXCLUDED_QUESTION,
    FRESH,
    SHOT_QUESTION,
    ExampleSource,
    PoolIndex,
    index_pools,
    text_key,
    text_of,
)
from coterie.errors import CoterieError
from coterie.features.embedding_store import EmbeddingStore, StoredRows, TextEncoder, load_text_encoder
from coterie.methods.common import IN_MEMORY, hash_examples
from coterie.methods.kshot.pool_map import drawn_rows, lay_out
from coterie.settings.commands import GatherSettings
from coterie.settings.groups import GatherRowsSettings
from coterie.settings.reading import from_flat

logger = logging.getLogger(__name__)

GATHERED_FILE = "gathered.jsonl"
SUMMARY_FILE = "gather.json"
QUANTILES = np.linspace(0, 1, 21)
BY_TEXT = {
    COPY: "copy of another row",
    SHOT_QUESTION: "question of an example",
    EXCLUDED_QUESTION: "question of an excluded row",
}
BY_EMBEDDING = {
    row_selection.LIKE_SHOT: "too near to an example",
    row_selection.LIKE_EXCLUDED: "too near to an excluded row",
    row_selection.LIKE_CHOSEN: "too near to a chosen row",
    row_selection.LEFT: "beyond the budget",
    row_selection.CHOSEN: "chosen",
}
SHOT = "shot"
"""The fate of an example on the map."""
LABEL_LETTERS = 60


@dataclass(frozen=True)
class Gathered:
    """The folder of a finished `gather`.

    Attributes:
        folder: with the rows and the summary.
        summary: what `gather.json` holds.
    """

    folder: Path
    summary: dict[str, Any]

    @property
    def examples(self) -> list[Example]:
        """The chosen rows, most similar first."""
        return load_examples(self.folder / GATHERED_FILE)

    def __str__(self) -> str:
        fates = ", ".join(f"{count} {name}" for name, count in self.summary["fates"].items() if count)
        return f"{self.folder / GATHERED_FILE}: {self.summary['rows']} pool rows: {fates}"


@dataclass(frozen=True)
class _Task:
    """What is chosen from, and what that is compared with."""

    shots: list[Example]
    excluded: list[Example]
    index: PoolIndex

    @property
    def fresh(self) -> Int[np.ndarray, " fresh"]:
        """Numbers of the pool rows that are compared by their embeddings."""
        return np.flatnonzero(self.index.kinds == FRESH)

    @property
    def keys(self) -> Shaped[np.ndarray, " fresh"]:
        """Keys of the texts of those rows."""
        return self.index.texts[self.fresh]


@dataclass(frozen=True)
class _Embedded:
    """The embeddings of a task; those of the pool are of its fresh rows and stay on disk."""

    shots: Float[Tensor, "shot dimension"]
    excluded: Float[Tensor, "excluded dimension"] | None
    pool: StoredRows


def gather(
    shots: ExampleSource | Sequence[str],
    pool: ExampleSource | Sequence[str],
    *,
    output: str | Path,
    exclude: ExampleSource | Sequence[str] = (),
    **settings: Any,
) -> Gathered:
    """Choose rows of open data that are similar to a task's examples and diverse among themselves (arXiv 2408.15915).

    Args:
        shots: examples of the task: a JSONL file or `datasets` source, several of them, or examples.
        pool: open data to choose from, in the same forms.
        output: folder to write `gathered.jsonl` and `gather.json` to.
        exclude: rows that must not be found again, such as a test set; their answers may be missing.
        **settings: fields of `GatherSettings` and its groups by their plain names, such as budget=500 or tau=0.85.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    parts = {"shots": shots, "pool": pool, "exclude": exclude}
    given = {name: list(part) for name, part in parts.items() if _in_memory(part)}
    named = {name: [IN_MEMORY] if name in given else _sources(part) for name, part in parts.items()}
    return gather_rows(from_flat(GatherSettings, {**named, "output": str(output), **settings}), given)


def gather_rows(settings: GatherSettings, given: dict[str, list[Any]] | None = None) -> Gathered:
    """Choose rows as the settings say; an interrupted run keeps what it has embedded.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = Path(settings.output)
    check_output(output, overwrite=settings.overwrite)
    task = _load(settings, given or {})
    encoder = load_text_encoder(settings.encoder, settings.model, settings.placement)
    inputs = {**_inputs(task), "encoder": encoder.identity}
    with run_folder(output, "gather", settings.model_dump(), inputs) as run:
        _gather(run.path, task, encoder, settings)
    return Gathered(output, read_json(output / SUMMARY_FILE))


def gather_into(
    folder: Path, settings: GatherSettings, given: dict[str, list[Any]], encoder: TextEncoder | None = None
) -> None:
    """Choose rows as a part of a longer run, and write `gathered.jsonl` and `gather.json` into its folder.

    Args:
        folder: where to write.
        settings: as for `gather_rows`; the output folder is not looked at.
        given: shots and excluded rows.
        encoder: where it is loaded already.

    Raises:
        CoterieError: for bad data or settings.
    """
    task = _load(settings, given)
    encoder = encoder or load_text_encoder(settings.encoder, settings.model, settings.placement)
    _gather(folder, task, encoder, settings)


def _gather(folder: Path, task: _Task, encoder: TextEncoder, settings: GatherSettings) -> None:
    store = EmbeddingStore(encoder, Path(settings.embeddings).expanduser() if settings.embeddings else None)
    vectors = _embed(task, store, settings.rows.block_rows)
    selection = _select(task, vectors, settings.rows)
    drawn = drawn_rows(selection.outcomes, task.keys)
    examples = dict(task.index.read(task.fresh[np.union1d(selection.rows, drawn)]))
    write_jsonl(folder / GATHERED_FILE, _records(task, selection, examples))
    points = _map(task, vectors, selection, drawn, examples)
    write_json(folder / SUMMARY_FILE, {**_summary(task, selection, settings), "map": points})


def _in_memory(part: ExampleSource | Sequence[str]) -> bool:
    return not isinstance(part, str) and bool(part) and isinstance(part[0], Example)


def _sources(part: Any) -> list[str]:
    return [part] if isinstance(part, str) else list(part)


def _load(settings: GatherSettings, given: dict[str, list[Any]]) -> _Task:
    shots = given.get("shots") or [row for source in settings.shots for row in load_examples(source)]
    excluded = given.get("exclude") or [
        row for source in settings.exclude for row in load_examples(source, need_response=False)
    ]
    pools = {IN_MEMORY: given["pool"]} if "pool" in given else {source: source for source in settings.pool}
    return _Task(shots, excluded, index_pools(pools, settings.limit, shots, excluded))


def _inputs(task: _Task) -> dict[str, str]:
    pool = hashlib.sha256(task.index.texts.tobytes() + task.index.records.tobytes()).hexdigest()
    return {"shots": hash_examples(task.shots), "exclude": hash_examples(task.excluded), "pool": pool}


def _embed(task: _Task, store: EmbeddingStore, block_rows: int) -> _Embedded:
    """Embed what was never embedded, the pool a block at a time."""
    missing = task.fresh[store.missing(task.keys)]
    logger.info("%d of %d pool rows have to be embedded", len(missing), len(task.index))
    if len(missing):
        _embed_rows(task, store, missing, block_rows)
    shots = store.embed([text_of(shot) for shot in task.shots])
    excluded = store.embed([text_of(row) for row in task.excluded]) if task.excluded else None
    return _Embedded(shots, excluded, store.rows(task.keys))


def _embed_rows(task: _Task, store: EmbeddingStore, missing: Int[np.ndarray, " missing"], block_rows: int) -> None:
    texts = (text_of(row) for _, row in task.index.read(missing))
    for number, block in enumerate(iter(lambda: list(islice(texts, block_rows)), [])):
        store.add(block)
        logger.info("embedded %d of %d", number * block_rows + len(block), len(missing))


def _select(task: _Task, vectors: _Embedded, settings: GatherRowsSettings) -> RowSelection:
    selection = select_rows(vectors.pool, vectors.shots, task.keys, settings, vectors.excluded)
    found = len(selection.rows)
    if not found:
        raise CoterieError(
            f"none of the {len(task.index)} pool rows is left: all are examples or excluded rows, or too near to them; "
            "give another --pool, or raise --exclude-tau"
        )
    if found < settings.budget:
        logger.warning("the pool gives %d rows, fewer than the budget of %d", found, settings.budget)
    return selection


def _records(task: _Task, selection: RowSelection, examples: Mapping[int, Example]) -> list[dict[str, Any]]:
    """Return the chosen rows in the common form; ids are keys of the text, since pools number their rows alike."""
    numbers = task.fresh[selection.rows]
    pools = list(task.index.pools)
    return [
        {
            **{name: value for name, value in asdict(examples[number]).items() if value},
            "id": text_key(text_of(examples[number])).hex(),
            "pool": pools[place],
            "pool_id": examples[number].id,
            "similarity": float(selection.measured.similarity[row]),
            "nearest_shot": task.shots[selection.measured.nearest[row]].id,
        }
        for number, row, place in zip(numbers.tolist(), selection.rows, task.index.pool_of(numbers), strict=True)
    ]


def _map(
    task: _Task,
    vectors: _Embedded,
    selection: RowSelection,
    drawn: Int[np.ndarray, " drawn"],
    examples: Mapping[int, Example],
) -> list[dict[str, Any]]:
    """Return the points of the map: the examples, then the drawn rows."""
    shots, rows = lay_out(vectors.shots, vectors.pool, drawn)
    marks = [_mark(place, SHOT, None, shot) for place, shot in zip(shots, task.shots, strict=True)]
    for place, row, number in zip(rows, drawn, task.fresh[drawn].tolist(), strict=True):
        fate, similarity = BY_EMBEDDING[int(selection.outcomes[row])], float(selection.measured.similarity[row])
        marks.append(_mark(place, fate, similarity, examples[number]))
    return marks


def _mark(place: tuple[float, float], fate: str, similarity: float | None, example: Example) -> dict[str, Any]:
    """Make a point of the map; its label is how its text begins."""
    label = " ".join(text_of(example).split())[:LABEL_LETTERS]
    return {"x": place[0], "y": place[1], "fate": fate, "similarity": similarity, "label": label}


def _summary(task: _Task, selection: RowSelection, settings: GatherSettings) -> dict[str, Any]:
    """Return what `gather.json` holds; the fates of the rows add up to their number."""
    index, fresh, measured = task.index, task.fresh, selection.measured
    pools = np.bincount(index.pool_of(fresh[selection.rows]), minlength=len(index.pools)).tolist()
    shots = np.bincount(measured.nearest[selection.rows], minlength=len(task.shots)).tolist()
    return {
        **settings.rows.model_dump(exclude={"block_rows"}),
        "encoder": settings.encoder,
        "rows": len(index),
        "fates": _fates(index, selection),
        "pools": [
            {"pool": name, "rows": rows, "chosen": chosen}
            for name, rows, chosen in zip(index.pools, np.diff(index.starts).tolist(), pools, strict=True)
        ],
        "shots": [{"id": shot.id, "nearest_of_chosen": n} for shot, n in zip(task.shots, shots, strict=True)],
        "excluded_rows": len(task.excluded),
        "similarity_quantiles": {
            "levels": QUANTILES.round(2).tolist(),
            "compared": _quantiles(measured.similarity),
            "chosen": _quantiles(measured.similarity[selection.rows]),
        },
    }


def _fates(index: PoolIndex, selection: RowSelection) -> dict[str, int]:
    """Count what became of the pool rows; every row counts once."""
    texts = {name: int((index.kinds == kind).sum()) for kind, name in BY_TEXT.items()}
    return texts | {name: int((selection.outcomes == fate).sum()) for fate, name in BY_EMBEDDING.items()}


def _quantiles(values: Float[np.ndarray, " row"]) -> list[float]:
    return np.quantile(values, QUANTILES).round(row_selection.DECIMALS).tolist()

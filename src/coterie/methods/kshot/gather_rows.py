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
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from coterie.artifacts import as_path, check_output, read_json, run_folder, write_json, write_jsonl
from coterie.data import row_selection
from coterie.data.examples import Example, load_examples, read_all
from coterie.data.row_selection import CHOSEN, EmbeddedRows, RowSelection, select_rows
from coterie.data.streaming import (
    COPY,
    EXCLUDED_QUESTION,
    FRESH,
    SHOT_QUESTION,
    PoolIndex,
    index_pools,
    text_key,
    text_of,
)
from coterie.errors import CoterieError
from coterie.features.embedding_store import EmbeddingStore, TextEncoder, load_text_encoder
from coterie.methods.common import IN_MEMORY, Data, hash_examples, load_questions, named_parts
from coterie.progress import part, whole
from coterie.records.task import GatheringRecord, PoolPoint, PoolSource, Quantiles, ShotServed
from coterie.settings.commands import GatherSettings
from coterie.settings.keywords import takes_fields
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
    CHOSEN: "chosen",
}
SHOT = "shot"
"""The fate of an example on the map."""
LABEL_LETTERS = 60
MOST_CHOSEN = 400  # rows on the map
MOST_OTHERS = 600
DECIMALS = 4

Places = Sequence[tuple[float, float]]


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
class OpenData:
    """What rows are chosen from, and what they are compared with.

    Attributes:
        shots: examples of the task.
        excluded: rows that must not be found again.
        index: the rows of the pools.
    """

    shots: Sequence[Example]
    excluded: Sequence[Example]
    index: PoolIndex

    @property
    def fresh(self) -> Int[np.ndarray, " fresh"]:
        """Numbers of the pool rows that are compared by their embeddings."""
        return np.flatnonzero(self.index.kinds == FRESH)

    @property
    def keys(self) -> Shaped[np.ndarray, " fresh"]:
        """Keys of the texts of those rows."""
        return self.index.texts[self.fresh]


def load_open_data(settings: GatherSettings, given: Mapping[str, Sequence[Example]]) -> OpenData:
    """Load examples and excluded rows, and index the pools; `given` has those that are in memory already, by setting.

    Raises:
        CoterieError: for bad data.
    """
    shots = given.get("shots") or list(read_all(settings.shots, reading=settings.reading))
    excluded = given.get("exclude") or load_questions(settings.exclude, reading=settings.reading.shared)
    pools = {IN_MEMORY: given["pool"]} if "pool" in given else {source: source for source in settings.pool}
    return OpenData(shots, excluded, index_pools(pools, settings.limit, shots, excluded, settings.reading))


def gather(
    shots: Data,
    pool: Data,
    *,
    output: str | Path,
    exclude: Data = (),
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
    named, given = named_parts({"shots": shots, "pool": pool, "exclude": exclude})
    return gather_rows(from_flat(GatherSettings, {**named, "output": str(output), **settings}), given)


@takes_fields(GatherSettings)
def gather_rows(settings: GatherSettings, given: Mapping[str, Sequence[Example]] | None = None) -> Gathered:
    """Choose rows as the settings say; an interrupted run keeps what it has embedded.

    Raises:
        CoterieError: for bad data, settings, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    data = load_open_data(settings, given or {})
    encoder = load_text_encoder(settings.encoder, settings.model, settings.placement)
    inputs = {
        "shots": hash_examples(data.shots),
        "exclude": hash_examples(data.excluded),
        "pool": hashlib.sha256(data.index.texts.tobytes() + data.index.records.tobytes()).hexdigest(),
        "encoder": encoder.identity,
    }
    with run_folder(output, settings, inputs) as run:
        write_gathered(run.path, data, encoder, settings)
    return Gathered(output, read_json(output / SUMMARY_FILE))


def write_gathered(folder: Path, data: OpenData, encoder: TextEncoder, settings: GatherSettings) -> None:
    """Choose rows, and write `gathered.jsonl` and `gather.json` into a folder.

    Raises:
        CoterieError: when no row is left to choose, or a pool has changed meanwhile.
    """
    store = EmbeddingStore(encoder, as_path(settings.embeddings) if settings.embeddings else None)
    missing = data.fresh[store.missing(data.keys)]
    logger.info("%d of %d pool rows have to be embedded", len(missing), len(data.index))
    texts = (text_of(row) for _, row in data.index.read(missing)) if len(missing) else iter(())
    starts = range(0, len(missing), settings.rows.block_rows)
    blocks = {f"rows from {start + 1}": min(settings.rows.block_rows, len(missing) - start) for start in starts}
    with whole("embedding of open data", blocks):
        for name, count in blocks.items():
            with part(name):
                store.add(list(islice(texts, count)))
    next(texts, None)  # reads on to the end, where a pool that changed is found out
    shots = store.embed([text_of(shot) for shot in data.shots])
    excluded = store.embed([text_of(row) for row in data.excluded]) if data.excluded else None
    pool = store.rows(data.keys)
    selection = select_rows(pool, shots, data.keys, settings.rows, excluded)
    found = len(selection.rows)
    if not found:
        raise CoterieError(
            f"none of the {len(data.index)} pool rows is left: all are examples or excluded rows, or too near to them; "
            "give another --pool, or raise --exclude-tau"
        )
    if found < settings.rows.budget:
        logger.warning("the pool gives %d rows, fewer than the budget of %d", found, settings.rows.budget)
    drawn = drawn_rows(selection.outcomes, data.keys)
    examples = dict(data.index.read(data.fresh[np.union1d(selection.rows, drawn)]))
    write_jsonl(folder / GATHERED_FILE, _records(data, selection, examples))
    points = _map(data, lay_out(shots, pool, drawn), selection, drawn, examples)
    write_json(folder / SUMMARY_FILE, _summary(data, selection, settings, points).plain())


def _records(data: OpenData, selection: RowSelection, examples: Mapping[int, Example]) -> list[dict[str, Any]]:
    """Return the chosen rows in the common form; ids are keys of the text, since pools number their rows alike."""
    numbers = data.fresh[selection.rows]
    pools = list(data.index.pools)
    return [
        {
            **{name: value for name, value in asdict(examples[number]).items() if value},
            "id": text_key(text_of(examples[number])).hex(),
            "pool": pools[place],
            "pool_id": examples[number].id,
            "similarity": float(selection.measured.similarity[row]),
            "nearest_shot": data.shots[selection.measured.nearest[row]].id,
        }
        for number, row, place in zip(numbers.tolist(), selection.rows, data.index.pool_of(numbers), strict=True)
    ]


def _summary(
    data: OpenData, selection: RowSelection, settings: GatherSettings, points: Sequence[PoolPoint]
) -> GatheringRecord:
    """Return what `gather.json` holds; the fates of the rows add up to their number."""
    index, measured = data.index, selection.measured
    pools = np.bincount(index.pool_of(data.fresh[selection.rows]), minlength=len(index.pools)).tolist()
    shots = np.bincount(measured.nearest[selection.rows], minlength=len(data.shots)).tolist()
    outcomes = {name: int((index.kinds == kind).sum()) for kind, name in BY_TEXT.items()}
    outcomes |= {name: int((selection.outcomes == own).sum()) for own, name in BY_EMBEDDING.items()}
    compared, chosen = (
        tuple(np.quantile(similarity, QUANTILES).round(row_selection.DECIMALS).tolist())
        for similarity in (measured.similarity, measured.similarity[selection.rows])
    )
    return GatheringRecord(
        **settings.rows.model_dump(exclude={"block_rows"}),
        encoder=settings.encoder,
        rows=len(index),
        fates=outcomes,
        pools=tuple(
            PoolSource(pool=name, rows=rows, chosen=chosen)
            for name, rows, chosen in zip(index.pools, np.diff(index.starts).tolist(), pools, strict=True)
        ),
        shots=tuple(ShotServed(id=shot.id, nearest_of_chosen=n) for shot, n in zip(data.shots, shots, strict=True)),
        excluded_rows=len(data.excluded),
        similarity_quantiles=Quantiles(levels=tuple(QUANTILES.round(2).tolist()), compared=compared, chosen=chosen),
        map=tuple(points),
    )


# -------------------------------------------------------------------------------------------------- a map of the pool


def drawn_rows(fates: Int[np.ndarray, " row"], keys: Shaped[np.ndarray, " row"]) -> Int[np.ndarray, " drawn"]:
    """Sample the rows to draw: some of the chosen ones, then some of the others, each by the smallest keys.

    Keys are hashes of what the rows say, so the sample is even, and the order of the pool does not change it.
    """
    chosen = fates == CHOSEN
    parts = ((np.flatnonzero(chosen), MOST_CHOSEN), (np.flatnonzero(~chosen), MOST_OTHERS))
    return np.concatenate([rows[np.argsort(keys[rows], kind="stable")[:most]] for rows, most in parts])


def lay_out(
    shots: Float[Tensor, "shot dimension"], pool: EmbeddedRows, drawn: Int[np.ndarray, " drawn"]
) -> tuple[Places, Places]:
    """Return the places of the examples and of the drawn rows: their two principal components, each signed by rule.

    Of the pool's embeddings, those of the drawn rows alone are read.
    """
    from sklearn.decomposition import PCA

    features = torch.cat([shots, pool[drawn]]).double().numpy()
    with np.errstate(invalid="ignore"):  # texts that are all alike vary by 0, of which no share can be told
        layout = PCA(2, svd_solver="full").fit_transform(features)
    places = [(x, y) for x, y in (layout.round(DECIMALS) + 0.0).tolist()]  # adding 0 makes of -0 a plain 0
    return places[: len(shots)], places[len(shots) :]


def _map(
    data: OpenData,
    places: tuple[Places, Places],
    selection: RowSelection,
    drawn: Int[np.ndarray, " drawn"],
    examples: Mapping[int, Example],
) -> list[PoolPoint]:
    """Return the points of the map: the examples, then the drawn rows; a label is how a text begins."""
    points: list[tuple[str, float | None, Example]] = [(SHOT, None, shot) for shot in data.shots]
    for row, number in zip(drawn, data.fresh[drawn].tolist(), strict=True):
        fate, similarity = BY_EMBEDDING[int(selection.outcomes[row])], float(selection.measured.similarity[row])
        points.append((fate, similarity, examples[number]))
    return [
        PoolPoint(x=x, y=y, fate=fate, similarity=similarity, label=" ".join(text_of(example).split())[:LABEL_LETTERS])
        for (x, y), (fate, similarity, example) in zip([*places[0], *places[1]], points, strict=True)
    ]

"""Open data that is larger than memory: read row by row, told apart by hashes of their content."""

import hashlib
import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain, islice

import numpy as np
from jaxtyping import Int, Shaped

from coterie.data.examples import Example, read_all
from coterie.errors import CoterieError
from coterie.settings.rows import READING, ReadingSettings

ExampleSource = str | Sequence[Example]
"""A source as `load_examples` knows it, or examples in memory."""

KEY_BYTES = 16
FRESH, COPY, SHOT_QUESTION, EXCLUDED_QUESTION = range(4)
"""What a pool row is found to be by its text alone."""


def stream_examples(
    source: ExampleSource, limit: int | None = None, reading: ReadingSettings = READING
) -> Iterator[Example]:
    """Yield the examples of a source one by one, or those in memory; it need not have the columns of the map.

    Raises:
        CoterieError: as `load_examples`.
    """
    is_named = isinstance(source, str)
    return read_all([source], limit, reading=reading.shared) if is_named else islice(source, limit)


@cache
def _invisible() -> re.Pattern[str]:
    """Match characters of no width: what Unicode calls formatting (Cf), joiners, fillers, selectors of variants."""
    formatting = (char for char in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(char) == "Cf")
    return re.compile(f"[\u034f\u115f\u1160\u180b-\u180d\u3164\ufe00-\ufe0f{''.join(formatting)}]+")


def as_seen(text: str) -> str:
    """Return a text as it looks, for comparing only: accents joined to their letters (NFC), nothing invisible."""
    return text if text.isascii() else unicodedata.normalize("NFC", _invisible().sub("", text))


def same_words(text: str) -> str:
    """Return a text in a form that letter case, white space and how its characters are written do not change."""
    return " ".join(as_seen(text).casefold().split())


def text_of(example: Example) -> str:
    """Return question and answer as one text, without system prompts, as it looks."""
    return as_seen("\n".join(message.content for message in example.messages if message.role != "system"))


def question_of(example: Example) -> str:
    """Return the question in a form that letter case, white space and the writing of characters do not change."""
    return same_words("\n".join(message.content for message in example.prompt if message.role != "system"))


def text_key(text: str) -> bytes:
    """Return the key by which a text is known: the first half of its SHA-256."""
    return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]


def as_keys(joined: bytes | bytearray) -> Shaped[np.ndarray, " text"]:
    """Cut joined keys into an array of them, of the dtype S16."""
    return np.frombuffer(joined, dtype=f"S{KEY_BYTES}")


@dataclass(frozen=True)
class PoolIndex:
    """What is held of every row of the pools, which are counted through one after the other.

    Attributes:
        pools: where the rows are, by name.
        limit: use only so many rows of every pool.
        reading: how rows are read.
        texts: key of the row's text.
        records: key of everything in the row but its id.
        kinds: `FRESH`, `COPY` (another row with this text is fresh), `SHOT_QUESTION` or `EXCLUDED_QUESTION`.
        starts: number of the first row of every pool, and the number of rows.
    """

    pools: Mapping[str, ExampleSource]
    limit: int | None
    reading: ReadingSettings
    texts: Shaped[np.ndarray, " row"]
    records: Shaped[np.ndarray, " row"]
    kinds: Int[np.ndarray, " row"]
    starts: Int[np.ndarray, " bound"]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.kinds)

    def read(self, numbers: Int[np.ndarray, " wanted"]) -> Iterator[tuple[int, Example]]:
        """Read the pools again and yield the rows with these numbers, in rising order.

        Raises:
            CoterieError: when a pool has changed since it was indexed.
        """
        wanted = np.zeros(len(self), dtype=bool)
        wanted[numbers] = True
        pools = self.pools.values()
        rows = chain.from_iterable(stream_examples(pool, self.limit, self.reading) for pool in pools)
        names = ", ".join(self.pools)
        changed = CoterieError(f"the pool changed while it was read ({names}); start again when it is complete")
        count = 0
        for count, example in enumerate(rows, start=1):
            if count <= len(self) and wanted[count - 1]:
                if as_keys(text_key(text_of(example)))[0] != self.texts[count - 1]:
                    raise changed
                yield count - 1, example
        if count != len(self):
            raise changed

    def pool_of(self, numbers: Int[np.ndarray, " wanted"]) -> Int[np.ndarray, " wanted"]:
        """Return which pool every one of these rows stands in."""
        return np.searchsorted(self.starts, numbers, side="right") - 1


def index_pools(
    pools: Mapping[str, ExampleSource],
    limit: int | None,
    shots: Sequence[Example],
    excluded: Sequence[Example],
    reading: ReadingSettings = READING,
) -> PoolIndex:
    """Read pools once: check every row, and find by text alone what cannot be chosen.

    Of rows with the same text one stays: the one whose record has the smallest key, so that the order of rows does not
    matter. Of rows that are alike in everything but their id, it is the first.

    Raises:
        CoterieError: for a bad row or an empty pool.
    """
    asked = dict.fromkeys(map(question_of, excluded), EXCLUDED_QUESTION)
    asked |= dict.fromkeys(map(question_of, shots), SHOT_QUESTION)
    texts, records, kinds, starts = bytearray(), bytearray(), bytearray(), [0]
    for pool in pools.values():
        for example in stream_examples(pool, limit, reading):
            texts += text_key(text_of(example))
            records += text_key(json.dumps(asdict(replace(example, id="")), sort_keys=True))
            kinds.append(asked.get(question_of(example), FRESH))
        starts.append(len(kinds))
    by_text, by_record, found = as_keys(texts), as_keys(records), np.frombuffer(kinds, np.int8).copy()
    order = np.lexsort((by_record, by_text))
    found[order[1:][by_text[order][1:] == by_text[order][:-1]]] = COPY
    return PoolIndex(pools, limit, reading, by_text, by_record, found, np.array(starts))

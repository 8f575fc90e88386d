"""Rows as they stand in files, read one by one: no more is held or parsed than one row may be long."""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coterie.artifacts import may_be_on_hub
from coterie.errors import CoterieError, first_line, missing_extra

MAX_ROW_BYTES = 64 * 2**20
"""The longest row of a file, with all its fields; the longest conversation fits, however JSON escapes it."""
WHITESPACE = re.compile(r"\s*")
BLOCK = 2**16  # characters of a JSON file that are read at a time
ROWS_AT_A_TIME = 64  # of a Parquet file

File = io.BufferedReader | gzip.GzipFile
PlacedRow = tuple[str, Any]
"""A row as it stands there, which may be no object, with the place to name in an error before it."""


def rows_of(source: str | Path, limit: int | None) -> Iterator[PlacedRow]:
    """Yield the rows of a file, of a folder that `datasets` saved, or of a hub data set.

    What a file holds is told by its ending, in whatever letter case, and it may be compressed with gzip (`.jsonl.gz`).
    With a limit, not much more than that many rows is read.

    Raises:
        CoterieError: naming the file and the row that cannot be read.
    """
    path = Path(source)
    name = path.name.lower()
    reader = READERS.get(Path(name.removesuffix(".gz")).suffix)
    try:
        if reader is None and path.is_file() and path.suffix != ".arrow":
            raise CoterieError(f"{path} does not say what it holds; give a file that ends in {ENDINGS}, also with .gz")
        if reader is None or path.is_dir():
            yield from _datasets_rows(str(source), limit)
            return
        if not path.is_file():
            raise CoterieError(f"{path} does not exist; give a file of rows ({ENDINGS}) or a datasets source")
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw as file:
            yield from reader(file, str(path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise CoterieError(f"{path} cannot be read ({first_line(error)}); mend the file") from error


def _json_lines(file: File, path: str) -> Iterator[PlacedRow]:
    """Read lines of bytes, which end at newlines only; wrong bytes are told with their line."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    for number, line in enumerate(_lines(file, path), start=1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            row = decoder.decode(line.decode("utf-8-sig"))
        except RecursionError as error:
            raise CoterieError(f"{place} is nested too deeply; mend or delete the line") from error
        except ValueError as error:
            raise CoterieError(f"{place} is not valid JSON ({error}); mend or delete the line") from error
        yield place, row


def _lines(file: Any, path: str) -> Iterator[Any]:  # noqa: ANN401 - a file of bytes or of text gives lines of its own
    """Yield the lines of a file, and refuse to hold one that is too long."""
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(line) > MAX_ROW_BYTES:
            raise CoterieError(f"{path}, line {number} is longer than {MAX_ROW_BYTES >> 20} MiB; split or delete it")
        yield line


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs; of a name that stands twice, JSON's reader would drop the first value silently."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r:.60} stands twice")
    return found


def _json_rows(file: File, path: str) -> Iterator[PlacedRow]:
    """Read an array of objects, or objects one after the other."""
    number = 0
    with io.TextIOWrapper(file, encoding="utf-8-sig") as opened:
        text = _JsonText(opened)
        is_array = text.take("[")
        while text.peek() not in ("", "]"):
            number += 1
            place = f"{path}, row {number}"
            yield place, text.take_object(place)
            if is_array and text.peek() not in ("", "]") and not text.take(","):
                raise CoterieError(f"{place} is not followed by a comma; mend the file")
        if text.take("]") != is_array or text.peek():
            raise CoterieError(f"{path} is cut off or goes on after its {number} rows; get the file again")


class _JsonText:
    """The part of a JSON file that was read and not yet taken."""

    def __init__(self, file: io.TextIOBase) -> None:
        self._file = file
        self._text = ""
        self._start = 0
        self._decoder = json.JSONDecoder(object_pairs_hook=_object)

    def peek(self) -> str:
        """Return the next character that is no white space, or nothing at the end of the file."""
        while True:
            self._start = WHITESPACE.match(self._text, self._start).end()  # pyrefly: ignore[missing-attribute]
            if self._start < len(self._text) or not self._grow():
                return self._text[self._start : self._start + 1]

    def take(self, character: str) -> bool:
        """Go past a character if it is the next one."""
        is_next = self.peek() == character
        self._start += is_next
        return is_next

    def take_object(self, place: str) -> dict[str, Any]:
        """Go past an object, and return it."""
        if self.peek() != "{":
            raise CoterieError(f"{place} is not an object with the fields of a row; mend or delete it")
        while True:
            try:
                row, self._start = self._decoder.raw_decode(self._text, self._start)
            except RecursionError as error:
                raise CoterieError(f"{place} is nested too deeply; mend or delete it") from error
            except ValueError as error:
                if len(self._text) - self._start > MAX_ROW_BYTES:
                    raise CoterieError(f"{place} is longer than {MAX_ROW_BYTES >> 20} MiB, or broken") from error
                if not isinstance(error, json.JSONDecodeError) or not self._grow():
                    raise CoterieError(f"{place} is not valid JSON ({error}); mend or delete it") from error
            else:
                return row

    def _grow(self) -> bool:
        """Read on, twice as far every time that it was not enough; tell whether there was more."""
        left = self._text[self._start :]
        more = self._file.read(max(BLOCK, len(left)))
        self._text, self._start = left + more, 0
        return bool(more)


def _csv_rows(file: File, path: str) -> Iterator[PlacedRow]:
    """Read texts by the names of the first line; an empty cell is missing."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as opened:
        rows = csv.reader(_lines(opened, path), strict=True)
        names = next(rows, [])
        _check_columns(names, path)
        if len(names) == 1 and (marks := set(names[0]) & set(";\t|")):
            raise CoterieError(f"{path} parts its cells by {marks.pop()!r}; save it with commas, as CSV has them")
        for number, cells in enumerate(filter(None, rows), start=1):
            place = f"{path}, row {number}"
            if len(cells) != len(names):
                raise CoterieError(f"{place} has {len(cells)} cells, but there are {len(names)} columns; mend the file")
            yield place, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def _check_columns(names: Sequence[str], path: str) -> None:
    """Refuse two columns of one name, of which a row could keep only one."""
    if len(set(names)) < len(names):
        raise CoterieError(f"{path} has two columns of one name ({', '.join(names)}); rename one")


def _parquet_rows(file: File, path: str) -> Iterator[PlacedRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        _check_columns(table.schema_arrow.names, path)
        rows = (row for batch in table.iter_batches(ROWS_AT_A_TIME) for row in batch.to_pylist())
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
    except pyarrow.ArrowException as error:
        raise CoterieError(f"{path} is no Parquet file that can be read ({first_line(error)})") from error


def _datasets_rows(source: str, limit: int | None) -> Iterator[PlacedRow]:
    try:
        import datasets
    except ImportError as error:
        raise missing_extra("datasets", "data") from error
    rows: Any
    path = Path(source)
    name, _, split = source.partition(":")
    streaming = limit is not None and "[" not in split  # a part of a split, train[:10%], cannot be streamed
    try:
        if path.is_dir():
            loaded: Any = datasets.load_from_disk(path)  # a Dataset, or a dict of them by split
            if isinstance(loaded, dict) and "train" not in loaded:
                raise ValueError(f"the folder has the splits {', '.join(loaded)} and no train; save one on its own")
            rows = loaded["train"] if isinstance(loaded, dict) else loaded
        elif path.suffix == ".arrow" and path.is_file():
            rows = datasets.load_dataset("arrow", data_files=source, split="train", streaming=streaming)
        elif path.suffix == ".arrow" or ("/" in name and not may_be_on_hub(name)):
            raise FileNotFoundError(f"there is no such file or folder: {source}")
        else:
            rows = datasets.load_dataset(name, split=split or "train", streaming=streaming)
        yield from ((f"{source}, row {number}", row) for number, row in enumerate(rows, start=1))
    except Exception as error:  # the library raises many kinds; all of them mean that the source cannot be had
        raise CoterieError(
            f"{source} cannot be loaded ({first_line(error)}); give a JSONL file or a datasets source"
        ) from error


READERS: dict[str, Callable[[File, str], Iterator[PlacedRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
"""How a file is read, by its ending."""
ENDINGS = ", ".join(READERS)

"""An evaluation's folder as records, and back."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from coterie.artifacts import check_kind, write_json, write_jsonl
from coterie.errors import CoterieError
from coterie.records.evaluation import EvaluationRecord, RowRecord
from coterie.records.schema import AnyRecord, parse

SUMMARY_FILE, ROWS_FILE = "evaluation.json", "rows.jsonl"
COMMAND = "coterie eval MIXTURE --data test.jsonl --output"
AGAIN = f"make the records again with: {COMMAND}"

# Control characters, text-direction overrides and halves of surrogate pairs: a page cannot show them, some disturb it.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def write_evaluation(folder: Path, record: EvaluationRecord, rows: Sequence[RowRecord]) -> None:
    """Write `rows.jsonl`, then `evaluation.json`, into a folder."""
    write_jsonl(folder / ROWS_FILE, [row.plain() for row in rows])
    write_json(folder / SUMMARY_FILE, record.plain())


def read_summary(folder: Path) -> EvaluationRecord:
    """Read and check the `evaluation.json` of an evaluation's folder.

    Raises:
        CoterieError: when it is missing, broken or of another format.
    """
    path = folder / SUMMARY_FILE
    return _read(EvaluationRecord, _text(path), str(path), folder)


def read_evaluation(folder: Path) -> tuple[EvaluationRecord, tuple[RowRecord, ...]]:
    """Read and check `evaluation.json` and `rows.jsonl` of an evaluation's folder.

    Raises:
        CoterieError: when the folder or a file is missing, broken or of another format, or the two do not fit.
    """
    record, path = read_summary(folder), folder / ROWS_FILE
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    rows = tuple(_read(RowRecord, line, f"{path}, line {number}", folder) for number, line in lines)
    if record.rows != len(rows):
        raise CoterieError(f"{path} holds {len(rows)} rows, {SUMMARY_FILE} tells of {record.rows}; {AGAIN} {folder}")
    return record, rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        check_kind(path.parent, SUMMARY_FILE)
        raise CoterieError(f"{path.parent} holds no {path.name}; make one with: {COMMAND} {path.parent}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CoterieError(f"{path} cannot be read: {error}; {AGAIN} {path.parent}") from error


def _read(kind: type[AnyRecord], text: str, place: str, folder: Path) -> AnyRecord:
    try:
        value = _printable(json.loads(text, parse_constant=lambda _: None))  # an infinite number is missing
    except (ValueError, RecursionError) as error:
        raise CoterieError(f"{place}: this is not JSON ({error}); {AGAIN} {folder}") from error
    return parse(kind, value, place, f"{AGAIN} {folder}")


def _printable(value: object) -> object:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value

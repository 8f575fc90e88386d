"""An evaluation's folder becomes its records, checked."""

import json
import re
from collections.abc import Iterator, Sequence
from math import fsum
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError
from coterie.report.fields import COMMAND, Record, unusable
from coterie.report.kshot_reading import read_gates, read_gathering, read_selection
from coterie.report.records import (
    FORMAT,
    Answer,
    Evaluation,
    GradientMap,
    Place,
    Profile,
    Recruiting,
    Row,
    Said,
    Score,
    Spread,
    Trace,
)

# Control characters, text-direction overrides and halves of surrogate pairs: a page cannot show them, some disturb it.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_ROUNDING = 0.02  # how far the recorded weights of a token may be from a sum of 1


def read_evaluation(folder: Path) -> Evaluation:
    """Read and check `evaluation.json` and `rows.jsonl` of an evaluation's folder.

    The mixture's own method is the one named `routed`; records without that entry are read as `_subject` says.

    Raises:
        CoterieError: when the folder or a file is missing, broken or of another format, or the two do not fit.
    """
    record = _read_head(folder)
    rows = tuple(_read_row(row) for row in _read_lines(folder))
    table = tuple(_read_score(row) for row in record.objects("table"))
    methods, control, mixture = record.names("methods"), record.text("control"), record.text("mixture")
    _check_that_all_fits(record, rows, [(control, "as control"), *((score.method, "in 'table'") for score in table)])
    return Evaluation(
        mixture=mixture,
        data=record.text("data"),
        control=control,
        subject=_subject(record.text_or_none("routed"), mixture, methods, control),
        methods=methods,
        experts=record.names("experts"),
        sources=record.names("sources"),
        base_model=record.facts("base_model"),
        settings=record.facts("settings"),
        hardware=record.facts("hardware"),
        clusters=record.grid("clusters"),
        adjusted_rand_index=record.inner("clustering").number("adjusted_rand_index"),
        routing=record.grid("routing"),
        seconds=record.grid("seconds"),
        table=table,
        rows=rows,
        memory=record.known_numbers("memory"),
        merge_error=record.known_numbers("merge_error"),
        composition=record.grid("composition"),
        routing_by_category=record.grid("routing_by_category"),
        features=record.numbers_among("features"),
        map=_read_map(record.inner("map")) if record.has("map") else None,
        spread=tuple(map(_read_spread, record.objects_if_any("spread"))),
        notes=record.texts("notes") if record.has("notes") else (),
        profile=_read_profile(record.inner("profile")) if record.has("profile") else None,
        costs=record.grid("costs"),
        selection=read_selection(record.inner("selection")) if record.has("selection") else None,
        gathering=read_gathering(record.inner("gathering")) if record.has("gathering") else None,
        gates=read_gates(record.inner("gates")) if record.has("gates") else None,
    )


def _check_that_all_fits(record: Record, rows: Sequence[Row], named: Sequence[tuple[str, str]]) -> None:
    told, methods = record.count("rows"), record.names("methods")
    if told != len(rows):
        raise unusable(
            f"{record.folder}/rows.jsonl holds {len(rows)} rows, evaluation.json tells of {told}", record.folder
        )
    for name, place in named:
        if name not in methods:
            raise unusable(f"{record.place} names {name!r} {place}, but not in 'methods'", record.folder)


def _subject(routed: str | None, mixture: str, methods: tuple[str, ...], control: str) -> str | None:
    """Tell which method the mixture stands for: as recorded, by its folder's name, or the only one there is."""
    others = [name for name in methods if name != control]
    folder_name = mixture.rstrip("/").rpartition("/")[2]
    only = others[0] if len(others) == 1 else None
    return next((name for name in (routed, folder_name, only) if name in others), None)


def _read_head(folder: Path) -> Record:
    path = folder / "evaluation.json"
    record = Record(_parse(_read_file(path), str(path), folder), str(path), folder)
    found = record.fields.get("format")
    if found != FORMAT or isinstance(found, bool):
        raise record.wrong("format", str(FORMAT))
    return record


def _read_lines(folder: Path) -> Iterator[Record]:
    path = folder / "rows.jsonl"
    for number, line in enumerate(_read_file(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield Record(_parse(line, place, folder), place, folder)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CoterieError(f"{path.parent} holds no {path.name}; make one with: {COMMAND} {path.parent}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise unusable(f"{path} cannot be read: {error}", path.parent) from error


def _parse(text: str, place: str, folder: Path) -> dict[str, Any]:
    try:
        value = _printable(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise unusable(f"{place}: this is not JSON ({error})", folder) from error
    if not isinstance(value, dict):
        raise unusable(f"{place}: a JSON object is wanted, got {type(value).__name__}", folder)
    return value


def _printable(value: object) -> object:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value


def _read_score(row: Record) -> Score:
    return Score(
        method=row.text("method"),
        source=row.text("source"),
        rows=row.count("rows"),
        graded=row.count("graded"),
        accuracy=row.number("accuracy"),
        accuracy_difference=row.difference("accuracy"),
        nll=row.number("nll"),
        nll_difference=row.difference("nll"),
        f1=row.number("f1"),
        oracle_share=row.number("oracle_share"),
        oracle_interval=row.interval("oracle_share_interval"),
    )


def _read_row(row: Record) -> Row:
    answers = Record(row.mapping("methods"), row.place, row.folder)
    return Row(
        identifier=row.text_or_none("id") or "",
        source=row.text_or_none("source") or "",
        prompt=row.text("prompt"),
        reference=row.text_or_none("reference") or "",
        weights=row.numbers("weights"),
        answers=tuple(_read_answer(name, answers) for name in answers.fields),
        expert_nll=row.known_numbers("expert_nll"),
        recruiting=_read_recruiting(row) if row.has("recruited") else None,
    )


def _read_recruiting(row: Record) -> Recruiting:
    outcome = row.inner("recruited")
    synthesis = outcome.inner("synthesis")
    return Recruiting(
        skills=row.texts("skills"),
        said=tuple(_read_said(answer) for answer in outcome.objects("answers")),
        aggregator=outcome.text("aggregator"),
        synthesis=(synthesis.text_or_none("error") or synthesis.text("text")) if synthesis.fields else None,
        cost=outcome.numbers("cost"),
    )


def _read_said(answer: Record) -> Said:
    return Said(answer.text("expert"), answer.text("text"), answer.verdict("correct"), answer.text_or_none("error"))


def _read_profile(record: Record) -> Profile:
    experts, skills = record.names("experts"), record.names("skills")
    return Profile(
        experts, skills, *(_read_matrix(record, key, len(experts), len(skills)) for key in ("right", "trials"))
    )


def _read_matrix(record: Record, key: str, height: int, width: int) -> tuple[tuple[float, ...], ...]:
    rows = record.fields.get(key)
    named = {str(number): row for number, row in enumerate(rows if isinstance(rows, list) else [])}
    inner = Record(named, f"{record.place}, {key!r}", record.folder)
    found = tuple(tuple(value or 0.0 for value in inner.numbers_or_none(name)) for name in named)
    if len(found) != height or any(len(row) != width for row in found):
        raise record.wrong(key, f"{height} lists of {width} numbers")
    return found


def _read_answer(method: str, answers: Record) -> Answer:
    record = answers.inner(method)
    return Answer(
        method=method,
        text=record.text_or_none("text"),
        correct=record.verdict("correct"),
        extracted=record.text_or_none("extracted"),
        nll=record.number("nll"),
        cut=record.text_or_none("finish_reason") == "length",
        f1=record.number("f1"),
        trace=_read_trace(record.inner("trace")) if record.has("trace") else None,
    )


def _read_trace(record: Record) -> Trace:
    experts, pieces = record.texts("experts"), record.texts("pieces")
    if not experts or len({*experts}) < len(experts):
        raise record.wrong("experts", "a list of names, each once")
    weights = record.number_rows("weights", len(experts))
    if len(weights) != len(pieces):
        raise record.wrong("weights", f"a row for each of {len(pieces)} pieces")
    if any(abs(fsum(row) - 1) > _ROUNDING for row in weights):
        raise record.wrong("weights", "rows that sum to 1")
    return Trace(experts, pieces, weights)


def _read_map(record: Record) -> GradientMap:
    seeds = record.labels("seeds")
    places = tuple(_read_place(point, len(seeds)) for point in record.objects("points"))
    agreement = record.numbers_or_none("agreement") if record.has("agreement") else ()
    return GradientMap(
        kind=record.text("kind"),
        places=places,
        seeds=seeds,
        stability=record.number("stability"),
        agreement=(*agreement, *[None] * len(seeds))[: len(seeds)],
    )


def _read_place(point: Record, seeds: int) -> Place:
    clusters = point.labels("clusters")
    if len(clusters) != seeds:
        raise point.wrong("clusters", f"a label for each of {seeds} seeds")
    return Place(point.position("x"), point.position("y"), point.text_or_none("source") or "", clusters)


def _read_spread(row: Record) -> Spread:
    return Spread(
        method=row.text("method"),
        seeds=row.count("seeds"),
        accuracy_mean=row.number("accuracy_mean"),
        accuracy_sd=row.number("accuracy_sd"),
        nll_mean=row.number("nll_mean"),
        nll_sd=row.number("nll_sd"),
    )

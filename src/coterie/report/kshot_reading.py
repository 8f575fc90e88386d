"""The records of a mixture that was made from a few shots: its experts' selection, the gathered data, its gates."""

from math import fsum
from statistics import median

from coterie.report.fields import Record
from coterie.report.records import (
    Adapter,
    AdapterGroup,
    AdapterSelection,
    GateLoad,
    GateLoads,
    Gathering,
    Halving,
    PoolPart,
    PoolPoint,
)

_COUNTED = ("rows", "excluded_rows")  # numbers of the gathering that are no settings


def read_selection(record: Record) -> AdapterSelection:
    """Read how experts were chosen from a bank."""
    return AdapterSelection(
        shots=record.count("shots"),
        settings=record.facts("settings"),
        adapters=tuple(map(_read_adapter, record.objects("adapters"))),
        groups=tuple(map(_read_group, record.objects_if_any("subsets"))),
        chosen=record.names("chosen"),
        halving=tuple(map(_read_halving, record.objects_if_any("halving"))),
    )


def _read_adapter(record: Record) -> Adapter:
    return Adapter(
        name=record.text("name"),
        accuracy=record.number("accuracy"),
        perplexity=record.number("perplexity"),
        rank_accuracy=record.number("rank_accuracy"),
        rank_perplexity=record.number("rank_perplexity"),
        rank_sum=record.number("rank_sum"),
        candidate=bool(record.verdict("candidate")),
        chosen=bool(record.verdict("chosen")),
        similarity=record.number("similarity"),
        leak=record.count_or_none("leak") or 0,
        known_rows=record.count_or_none("known_rows"),
        dropped=record.text_or_none("dropped"),
    )


def _read_group(record: Record) -> AdapterGroup:
    return AdapterGroup(
        names=record.names("names"),
        rank_sum=record.number("rank_sum"),
        similarity=record.number("similarity"),
        rank_diversity=record.number("rank_diversity"),
        score=record.number("score"),
    )


def _read_halving(record: Record) -> Halving:
    return Halving(record.count("shots"), record.count("scored"), record.count("kept"), record.number("tau"))


def read_gathering(record: Record) -> Gathering:
    """Read what was chosen from a pool of open data."""
    quantiles = record.inner("similarity_quantiles")
    return Gathering(
        rows=record.count("rows"),
        settings=_settings(record),
        fates=record.numbers("fates"),
        pools=tuple(
            PoolPart(pool.text("pool"), pool.count("rows"), pool.count("chosen"))
            for pool in record.objects_if_any("pools")
        ),
        shots=tuple((shot.text("id"), shot.count("nearest_of_chosen")) for shot in record.objects_if_any("shots")),
        median=(_median(quantiles, "compared"), _median(quantiles, "chosen")),
        points=tuple(map(_read_point, record.objects_if_any("map"))),
    )


def _settings(record: Record) -> dict[str, str]:
    """Read what stands in the record as a plain text or number."""
    plain = {
        key: value
        for key, value in record.fields.items()
        if isinstance(value, str | int | float) and key not in _COUNTED
    }
    return Record({"settings": plain}, record.place, record.folder).facts("settings")


def _median(quantiles: Record, key: str) -> float | None:
    """Return the median of evenly spaced quantiles; it is the median of what they were taken from."""
    values = quantiles.numbers_or_none(key) if quantiles.has(key) else ()
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _read_point(record: Record) -> PoolPoint:
    place = record.position("x"), record.position("y")
    return PoolPoint(*place, record.text("fate"), record.number("similarity"), record.text_or_none("label") or "")


def read_gates(record: Record) -> GateLoads:
    """Read how gates share their load over the experts."""
    experts = record.names("experts")
    if not experts:
        raise record.wrong("experts", "a list of names")
    return GateLoads(
        experts=experts,
        active=min(record.count_or_none("top_k") or len(experts), len(experts)),
        overall=_read_load(record, len(experts)),
        layers=tuple(
            _read_load(layer, len(experts), name=layer.text("path")) for layer in record.objects_if_any("layers")
        ),
        steps=tuple(_read_load(step, len(experts), step=step.count("step")) for step in record.objects_if_any("steps")),
    )


def _read_load(record: Record, width: int, *, name: str = "", step: int = 0) -> GateLoad:
    """Read one line of loads, as shares of their sum."""
    load = record.number_row("load", width)
    total = fsum(load)
    if not total:
        raise record.wrong("load", f"{width} numbers that are not all 0")
    return GateLoad(tuple(value / total for value in load), record.number("entropy"), name, step)

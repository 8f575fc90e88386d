"""Methods side by side on held-out rows: exact match of their answers and likelihood of the references.

All methods of a bank that meet in the logits share one forward pass over the references: only their votes differ.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coterie.artifacts import (
    FORMAT,
    JsonCache,
    check_output,
    read_json,
    read_jsonl,
    run_folder,
    sha256_of,
    write_json,
    write_jsonl,
)
from coterie.data.batching import TokenRow
from coterie.data.examples import Example, load_all
from coterie.errors import CoterieError, unknown_name
from coterie.evaluation.answers import Answers, Task, answer
from coterie.evaluation.clusters import cluster_records, feature_map, kind_of
from coterie.evaluation.few_shot import with_shots
from coterie.evaluation.rows import hardware_record, mean_weights, memory_bytes, merge_errors, row_record
from coterie.evaluation.shared_scores import Scored, SharedRouting, no_cache, score_methods
from coterie.evaluation.table import format_table, summarise
from coterie.experts.names import BASE
from coterie.grading.grade import check_code_execution, code_notes
from coterie.methods.common import DOMAINS_FILE, hash_examples
from coterie.methods.family import Family, MethodGrid
from coterie.methods.kshot.run import task_records
from coterie.methods.registry import family_of, make_grid
from coterie.mixture import Mixture
from coterie.routers.base import Routing
from coterie.settings.commands import EvaluationSettings
from coterie.settings.groups import ExtrasSettings, FewShotSettings, SamplingSettings
from coterie.settings.reading import from_flat

logger = logging.getLogger(__name__)

PER_DATASET = "per-dataset"
TOKEN_LEVEL = "token-level"


@dataclass(frozen=True)
class Evaluation:
    """What was measured: `summary` is evaluation.json, `rows` is rows.jsonl."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        """Return the table."""
        return format_table(self.summary["table"])


@dataclass(frozen=True)
class Protocol:
    """How methods are compared.

    Attributes:
        methods: names of the table of methods, or variants such as `elrea:top_k=2`.
        control: the method that differences are taken to.
        generate: whether methods answer, or only likelihoods are measured.
        run_code: whether code that methods write is run, where rows bring tests; None refuses such rows.
        batch_size: prompts decoded together.
        resamples: bootstrap resamples behind every interval.
        sampling: how tokens are chosen.
        grid: how what methods lack is trained.
        shots: solved examples before every question.
    """

    methods: Sequence[str]
    control: str
    generate: bool = True
    run_code: bool | None = None
    batch_size: int = 8
    resamples: int = 2000
    sampling: SamplingSettings = SamplingSettings()
    grid: ExtrasSettings = ExtrasSettings()
    shots: FewShotSettings = FewShotSettings()


def evaluate(
    mixture: Mixture,
    examples: Sequence[Example],
    *,
    methods: Sequence[str] | None = None,
    **settings: Any,
) -> Evaluation:
    """Compare methods on examples that no part of the mixture was trained on.

    What a method lacks beyond the fitted mixture is trained once, into the mixture's folder.

    Args:
        mixture: a fitted mixture.
        examples: rows with a response, and an answer or tests where exact match can be graded.
        methods: names of the table of methods, or variants such as `elrea:top_k=2`; by default the mixture's own and
            its simplest rivals.
        **settings: other fields of `EvaluationSettings` and its groups by their plain names, such as control="base",
            generate=False, resamples=1000, max_new_tokens=128, encoder="hidden".

    Raises:
        CoterieError: for an unknown method or setting, or a control that is not among the methods.
    """
    flat = {"mixture": str(mixture.folder), "data": ["(given)"], "output": "(none)"}
    named = {} if methods is None else {"methods": ",".join(methods)}
    return compare(
        mixture, examples, protocol_of(from_flat(EvaluationSettings, {**flat, **named, **settings}), mixture)
    )


def run_evaluation(settings: EvaluationSettings) -> Evaluation:
    """Evaluate a mixture folder and write the records into the output folder.

    An interrupted evaluation goes on after the last method that was done with.

    Raises:
        CoterieError: for bad data, an unknown method, or an output folder that exists.
    """
    output = Path(settings.output)
    check_output(output, overwrite=settings.overwrite)
    examples = load_all(settings.data, settings.limit)
    check_code_execution(examples, settings.allow_code_execution)
    mixture = Mixture.from_pretrained(settings.mixture, **settings.placement.model_dump())
    protocol = protocol_of(settings, mixture)
    if settings.methods == "all" and strange_sources(mixture, examples):
        logger.info("per-dataset is left out: some rows come from data sets that the mixture was not fitted on")
        protocol = replace(protocol, methods=[name for name in protocol.methods if name != PER_DATASET])
    with run_folder(output, "eval", settings.model_dump(), _inputs(mixture, examples)) as run:
        result = compare(mixture, examples, protocol, run.cached)
        result.summary["data"] = ", ".join(settings.data)
        write_jsonl(run.path / "rows.jsonl", result.rows)
        write_json(run.path / "evaluation.json", result.summary)
    return result


def _inputs(mixture: Mixture, examples: Sequence[Example]) -> dict[str, str]:
    """Hash what an evaluation depends on, so that an interrupted one is not finished with something else."""
    assert mixture.folder is not None  # it was loaded from one
    files = sorted(mixture.folder.glob("experts/*/adapter_model.safetensors"))
    return {
        "base_model": mixture.backbone.identity.sha256,
        "mixture": sha256_of(mixture.folder / "mixture.json", *files),
        "data": hash_examples(examples),
    }


def protocol_of(settings: EvaluationSettings, mixture: Mixture) -> Protocol:
    """Read how methods are compared from settings.

    Raises:
        CoterieError: for an unknown method, or a control that is not among them.
    """
    methods = _chosen_methods(settings, mixture)
    return Protocol(
        methods=methods,
        control=_checked_control(settings.control, methods),
        generate=settings.generate,
        run_code=settings.allow_code_execution,
        batch_size=settings.batch_size,
        resamples=settings.resamples,
        sampling=settings.sampling,
        grid=settings.extras or ExtrasSettings(),
        shots=settings.solved,
    )


def _chosen_methods(settings: EvaluationSettings, mixture: Mixture) -> list[str]:
    family = family_of(mixture)
    if settings.methods is None:
        names = family.usual(mixture)
    else:
        names = (
            list(family.methods)
            if settings.methods == "all"
            else [name.strip() for name in settings.methods.split(",")]
        )
    return check_methods(names if settings.every is None else _renewed(names, settings.every), family)


def _renewed(names: Sequence[str], every: str) -> list[str]:
    """Put a variant for every rhythm in the place of token-level.

    Raises:
        CoterieError: when it is not among the methods.
    """
    if TOKEN_LEVEL not in names:
        raise CoterieError(f"--every {every} varies {TOKEN_LEVEL}, which is not among the methods {', '.join(names)}")
    variants = [f"{TOKEN_LEVEL}:every={number.strip()}" for number in every.split(",")]
    return [one for name in names for one in (variants if name == TOKEN_LEVEL else [name])]


def check_methods(methods: Sequence[str], family: Family) -> list[str]:
    """Return the methods, each once, in the order given.

    Raises:
        CoterieError: for an unknown method.
    """
    names = list(dict.fromkeys(methods))
    for name in names:
        family.method(name)
    return names


def _checked_control(control: str | None, methods: Sequence[str]) -> str:
    if control is None:
        return BASE if BASE in methods else methods[0]
    if control not in methods:
        raise unknown_name("method to compare with among those evaluated", control, methods)
    return control


def strange_sources(mixture: Mixture, examples: Sequence[Example]) -> list[str]:
    """Return the sources of examples that no training row of a fitted mixture has."""
    files = [mixture.folder / name for name in ("clusters.jsonl", DOMAINS_FILE)] if mixture.folder else []
    rows = [row for file in files if file.exists() for row in read_jsonl(file)]
    if not rows:
        return []
    known = {row["source"] or "" for row in rows}
    return sorted({example.source or "" for example in examples} - (known - {""}))


def check_sources(mixture: Mixture, examples: Sequence[Example], methods: Sequence[str]) -> None:
    """Refuse to route by data set what comes from a data set without an adapter, before anything is trained.

    Raises:
        CoterieError: naming the first such source.
    """
    strange = strange_sources(mixture, examples) if PER_DATASET in methods else []
    if strange:
        raise CoterieError(
            f"{PER_DATASET} has no adapter for the source {strange[0]!r}, which the mixture was not fitted on; "
            "leave that method out"
        )


def compare(
    mixture: Mixture, examples: Sequence[Example], protocol: Protocol, cached: JsonCache = no_cache
) -> Evaluation:
    """Compare methods on examples, as `evaluate` does; `cached` keeps what takes long for another try.

    Raises:
        CoterieError: when something that a method needs cannot be trained, or code would have to be run unasked.
    """
    check_code_execution(examples, protocol.run_code)
    check_sources(mixture, examples, protocol.methods)
    tasks, notes = _tasks(mixture, examples, protocol.shots)
    grid = make_grid(mixture, protocol.methods, protocol.grid)
    token_rows = [mixture.prompts.row(task.asked) for task in tasks]
    scored = score_methods(grid, token_rows, protocol.methods, cached)
    answers = {
        name: Answers.from_record(
            cached(f"answers-{name}", lambda name=name: _answers(name, scored, tasks, protocol).record())
        )
        for name in protocol.methods
        if protocol.generate
    }
    run_code = bool(protocol.run_code)
    rows = [row_record(number, task, scored, answers, grid, run_code=run_code) for number, task in enumerate(tasks)]
    routing = _routing_of_subject(grid, scored, token_rows)
    shares = routing.normalized()
    rows = [{**row, "weights": shares.row(number)} for number, row in enumerate(rows)]
    lengths = [len(row.ids) for row in token_rows]
    summary = {
        **_facts(grid, rows, protocol),
        **_routing_records(rows, routing),
        "seconds": _seconds(grid, scored, answers),
        "memory": memory_bytes(scored, lengths),
        "merge_error": merge_errors(scored),
        "notes": [*notes, *code_notes(examples, run_code=run_code)],
        **cluster_records(mixture.folder),
        **task_records(mixture.folder),
        "map": feature_map(mixture.folder),
    }
    return Evaluation(summary, rows)


def _tasks(mixture: Mixture, examples: Sequence[Example], shots: FewShotSettings) -> tuple[list[Task], list[str]]:
    """Put solved examples before every question, where there are any."""
    if not shots.few_shot:
        return [Task(example, example) for example in examples], []
    solved = load_all(shots.few_shot)
    found = with_shots(
        examples,
        solved,
        count=shots.few_shot_count,
        length=lambda example: mixture.prompts.row(example).prompt_length,
        longest=shots.longest_prompt,
    )
    kept = [row.kept for row in found]
    note = (
        f"Up to {shots.few_shot_count} solved examples stand before a question, as many as fit into "
        f"{shots.longest_prompt} tokens: {sum(kept) / len(kept):.1f} on average, {kept.count(0)} rows have none."
    )
    return [Task(row.example, example) for row, example in zip(found, examples, strict=True)], [note]


def _answers(name: str, scored: Scored, tasks: Sequence[Task], protocol: Protocol) -> Answers:
    routing = scored.routed[name].routing
    return answer(scored.cells[name], tasks, routing, name, protocol.batch_size, protocol.sampling)


def _routing_of_subject(grid: MethodGrid, scored: Scored, rows: Sequence[TokenRow]) -> Routing:
    """Return the weights of the mixture's own method, also where that is not among those compared."""
    if grid.own.method in scored.routed:
        return scored.routed[grid.own.method].routing
    return SharedRouting([row.prompt() for row in rows])(grid.own.router).routing


def _facts(grid: MethodGrid, rows: Sequence[Mapping[str, Any]], protocol: Protocol) -> dict[str, Any]:
    mixture = grid.own
    sources = sorted({row["source"] for row in rows})
    table = summarise(rows, protocol.methods, protocol.control, sources, resamples=protocol.resamples)
    sampling = {**protocol.sampling.model_dump(), "generate": protocol.generate, "batch_size": protocol.batch_size}
    folder = mixture.folder
    features = read_json(folder / "mixture.json")["router"].get("features") if folder else None
    return {
        "format": FORMAT,
        "mixture": str(folder),
        "base_model": mixture.backbone.identity.__dict__,
        "control": protocol.control,
        "routed": mixture.method,
        "methods": list(protocol.methods),
        "experts": list(mixture.bank.names),
        "rows": len(rows),
        "sources": sources,
        "settings": sampling,
        "features": features or {},
        "hardware": hardware_record(),
        "table": table,
    }


def _routing_records(rows: Sequence[Mapping[str, Any]], routing: Routing) -> dict[str, Any]:
    return {
        "routing": mean_weights(rows, routing, lambda row: row["source"]),
        "routing_by_category": mean_weights(rows, routing, kind_of) if any(row["category"] for row in rows) else {},
    }


def _seconds(grid: MethodGrid, scored: Scored, answers: Mapping[str, Answers]) -> dict[str, dict[str, float]]:
    """Return every method's seconds: of training beyond the fitted mixture, of scoring, of routing and answering."""
    seconds: dict[str, dict[str, float]] = {name: {} for name in scored.cells}
    for name in scored.cells:
        if trained := grid.training_seconds(name):
            seconds[name]["train"] = trained
        if name in scored.seconds:
            seconds[name]["score"] = scored.seconds[name]
        if name in answers:
            seconds[name]["generate"] = answers[name].seconds + scored.routed[name].seconds
    return seconds

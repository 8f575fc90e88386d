"""Methods side by side on held-out rows: exact match of their answers and likelihood of the references.

All methods of a bank that meet in the logits share one forward pass over the references: only their votes differ.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from coterie.artifacts import JsonCache, as_path, check_output, run_folder
from coterie.cluster import Call, Elsewhere, joined, named_values
from coterie.data.batching import TokenRow, check_lengths
from coterie.data.examples import Example, load_all
from coterie.errors import CoterieError, unknown_name
from coterie.evaluation.answers import Answers, TestRow, answer
from coterie.evaluation.clusters import AGAIN, cluster_records, feature_map, kind_of
from coterie.evaluation.few_shot import with_shots
from coterie.evaluation.rows import memory_bytes, merge_errors, row_records, summary_record
from coterie.evaluation.shared_scores import Scored, cache_name, no_cache, score_methods
from coterie.evaluation.table import format_table
from coterie.evaluation.unfamiliar import weights_for_unfamiliar
from coterie.grading.grade import check_code_execution, code_notes
from coterie.methods.common import DOMAINS_FILE, backbone_key, hash_examples
from coterie.methods.family import NAMED_ROUTER, MethodGrid
from coterie.methods.kshot.fit import AUTO
from coterie.methods.kshot.run import task_records
from coterie.methods.registry import family_of, make_grid
from coterie.methods.token_level.domains import METHOD as TOKEN_LEVEL
from coterie.methods.token_level.methods import PER_DATASET
from coterie.mixture import Mixture
from coterie.mixture.folder import hash_mixture, read_mixture_record, reading_for
from coterie.progress import ANSWERING, GRADIENTS, part, whole
from coterie.records.auto import AutoRecord
from coterie.records.choice import AUTO_FILE
from coterie.records.evaluation import EvaluationRecord, RowRecord, SharedSeconds
from coterie.records.files import write_evaluation
from coterie.records.mixture import TrainingRow
from coterie.records.schema import read, read_rows
from coterie.records.task_choice import TaskChoiceRecord
from coterie.records.verdict import advice
from coterie.routers.base import Routing
from coterie.settings.commands import EvaluationSettings
from coterie.settings.groups import ExpertServingSettings, ExtrasSettings, PlacementSettings
from coterie.settings.keywords import names_in
from coterie.settings.reading import changed, flag_of, from_flat, values_of
from coterie.settings.rows import ReadingSettings
from coterie.settings.workers import WorkerSettings

logger = logging.getLogger(__name__)

NOT_OF_ANSWERS = (
    *("mixture", "data", "limit", "output", "overwrite", "generate", "methods", "control", "router", "every"),
    *("resamples", "allow_code_execution", *ExpertServingSettings.model_fields, *ReadingSettings.model_fields),
)
"""Settings of an evaluation that are about which methods answer, what comes of answers, or what is hashed besides."""
OF_WORKERS = {flag_of(name) for name in WorkerSettings.model_fields}
_ANSWERS = TypeAdapter(Answers)  # as plain values, and back


@dataclass(frozen=True)
class Evaluation:
    """What was measured."""

    record: EvaluationRecord
    row_records: tuple[RowRecord, ...]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What evaluation.json holds."""
        return self.record.plain()

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """What rows.jsonl holds."""
        return [row.plain() for row in self.row_records]

    def __str__(self) -> str:
        """Return the table, and what to use instead where it does not speak for the mixture's method."""
        table = format_table(self.record.table, len(self.record.control_among))
        return "\n".join(filter(None, (table, advice(self.record))))


def evaluate(
    mixture: Mixture | str | Path,
    examples: Sequence[Example] | str | Path,
    *,
    methods: str | Sequence[str] | None = None,
    **settings: Any,
) -> Evaluation:
    """Compare methods on examples that no part of the mixture was trained on.

    What a method lacks beyond the fitted mixture is trained once, into the user's cache.

    Args:
        mixture: a fitted mixture, or its folder or hub id.
        examples: rows with a response, and an answer or tests where exact match can be graded; or a file of them.
        methods: names of the table of methods, or variants such as `elrea:top_k=2`, in a list or with commas between
            them; by default the mixture's own and its simplest rivals.
        **settings: other fields of `EvaluationSettings` and its groups by their plain names, such as control="base",
            generate=False, resamples=1000, max_new_tokens=128, encoder="hidden".

    Raises:
        CoterieError: for an unknown method or setting, or a control that is not among the methods.
    """
    source = str(mixture.folder if isinstance(mixture, Mixture) else mixture)
    flat = {"mixture": source, "data": ["(given)"], "output": "(none)"}
    named = {} if methods is None else {"methods": ",".join(names_in(methods))}
    asked = from_flat(EvaluationSettings, {**flat, **named, **settings})
    if not isinstance(mixture, Mixture):
        mixture = Mixture.from_pretrained(mixture, **asked.placement.model_dump())
    if isinstance(examples, str | Path):
        reading = asked.reading if mixture.folder is None else reading_for(mixture.folder, asked.reading)
        examples = load_all([str(examples)], asked.limit, reading)
    return compare(mixture, examples, resolved(asked, mixture))


def run_evaluation(settings: EvaluationSettings) -> Evaluation:
    """Evaluate a mixture folder and write the records into the output folder.

    An interrupted evaluation goes on after the last method that was done with.

    Raises:
        CoterieError: for bad data, an unknown method, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    if given := [flag for flag in changed(settings.serving) if flag not in OF_WORKERS]:
        raise CoterieError(f"{given[0]} acts on runs of symbolic-moe only; leave it out")
    examples = load_all(settings.data, settings.limit, reading_for(settings.mixture, settings.reading))
    check_code_execution(examples, settings.allow_code_execution)
    mixture = Mixture.from_pretrained(settings.mixture, **settings.placement.model_dump())
    chosen = resolved(settings, mixture)
    if settings.methods == "all" and strange_sources(mixture, examples):
        logger.info("per-dataset is left out: some rows come from data sets that the mixture was not fitted on")
        kept = [name for name in method_names(chosen) if name != PER_DATASET]
        chosen = chosen.model_copy(update={"methods": ",".join(kept)})
    assert mixture.folder is not None  # it was loaded from one
    inputs = {"base_model": mixture.backbone.identity.sha256, "mixture": hash_mixture(mixture.folder)}
    with run_folder(output, settings, {**inputs, "data": hash_examples(examples)}) as run:
        result = compare(mixture, examples, chosen, run.cache(_decisive(chosen, mixture)))
        write_evaluation(run.path, result.record, result.row_records)
    return result


def _decisive(settings: EvaluationSettings, mixture: Mixture) -> dict[str, Any]:
    """Return what decides how a method answers, beside the mixture and the rows."""
    values = {**values_of(settings, NOT_OF_ANSWERS), **backbone_key(mixture.backbone)}
    return {**values, "shots": hash_examples(_shots(mixture, settings)) if settings.solved.few_shot else None}


def resolved(settings: EvaluationSettings, mixture: Mixture) -> EvaluationSettings:
    """Return settings that name every method, each once.

    Raises:
        CoterieError: for an unknown method, a control that is not among them, or `every` without token-level.
    """
    family = family_of(mixture)
    if settings.methods is None:
        names = family.usual(mixture)
    else:
        names = family.available(mixture) if settings.methods == "all" else method_names(settings)
    names += [f"{NAMED_ROUTER}:{name.strip()}" for name in settings.router.split(",")] if settings.router else []
    if settings.every is not None:
        if TOKEN_LEVEL not in names:
            raise CoterieError(
                f"--every {settings.every} varies {TOKEN_LEVEL}, which is not among the methods {', '.join(names)}"
            )
        variants = [f"{TOKEN_LEVEL}:every={number.strip()}" for number in settings.every.split(",")]
        names = [one for name in names for one in (variants if name == TOKEN_LEVEL else [name])]
    names = list(dict.fromkeys(names))
    for name in names:
        family.method(name)
    check_control(settings.control, names)
    return settings.model_copy(update={"methods": ",".join(names)})


def method_names(settings: EvaluationSettings) -> list[str]:
    """Return the methods that settings name, each once."""
    return names_in(settings.methods or "")


def check_control(control: str | None, methods: Sequence[str]) -> None:
    """Refuse a control that is not among the methods compared.

    Raises:
        CoterieError: naming those that are.
    """
    if control is not None and control not in methods:
        raise unknown_name("method to compare with among those evaluated", control, methods)


def strange_sources(mixture: Mixture, examples: Sequence[Example]) -> list[str]:
    """Return the sources of examples that no training row of a fitted mixture has."""
    files = [mixture.folder / name for name in ("clusters.jsonl", DOMAINS_FILE)] if mixture.folder else []
    rows = [row for file in files if file.exists() for row in read_rows(TrainingRow, file, AGAIN)]
    if not rows:
        return []
    known = {row.source or "" for row in rows}
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
    mixture: Mixture, examples: Sequence[Example], settings: EvaluationSettings, cached: JsonCache = no_cache
) -> Evaluation:
    """Compare methods on examples, as `evaluate` does.

    Args:
        mixture: a fitted mixture.
        examples: test rows.
        settings: with the methods spelled out, as `resolved` does.
        cached: keeps what takes long for another try.

    Raises:
        CoterieError: when something that a method needs cannot be trained, or code would have to be run unasked.
    """
    methods = method_names(settings)
    check_code_execution(examples, settings.allow_code_execution)
    check_sources(mixture, examples, methods)
    tests, notes = _test_rows(mixture, examples, settings)
    token_rows = [mixture.prompts.row(test.asked) for test in tests]
    check_lengths(token_rows, mixture.backbone.positions, [f"test row {example.id}" for example in examples])
    grid, scored, answers = _measured(mixture, tests, token_rows, methods, settings, cached)
    own = scored.routed.get(mixture.method)  # the weights of the mixture's own method are recorded in any case
    routing = own.routing if own else mixture.router.route([row.prompt() for row in token_rows])
    run_code = bool(settings.allow_code_execution)
    rows = row_records(tests, scored, answers, grid, routing, run_code=run_code)
    together = tuple(name for name in scored.nll if name not in scored.seconds)
    shared = SharedSeconds(stage="score", methods=together, seconds=scored.shared_seconds)
    record = summary_record(
        settings,
        examples,
        rows,
        routing,
        methods,
        grid.family.simple_rivals(methods),
        lambda row: kind_of(row.source, row.category),
        base_model=asdict(mixture.backbone.identity),
        routed=mixture.method,
        experts=mixture.bank.names,
        seconds=_seconds(grid, scored, answers),
        shared_seconds=(shared,) if together else (),
        answer_tokens={name: own.mean_tokens for name, own in answers.items()},
        memory=memory_bytes(scored, [len(row.ids) for row in token_rows]),
        merge_error=merge_errors(scored),
        notes=(*notes, *code_notes(examples, run_code=run_code)),
        unfamiliar_routing=cached(
            cache_name("unfamiliar", grid, methods), lambda: weights_for_unfamiliar(scored.cells)
        ),
        **_told_by(mixture),
    )
    return Evaluation(record, tuple(rows))


def _measured(
    mixture: Mixture,
    tests: Sequence[TestRow],
    rows: Sequence[TokenRow],
    methods: Sequence[str],
    settings: EvaluationSettings,
    cached: JsonCache,
) -> tuple[MethodGrid, Scored, dict[str, Answers]]:
    """Train what the methods lack, score them on the rows, and let them answer."""
    extras = settings.extras or ExtrasSettings()
    work = {
        "extras": family_of(mixture).work(mixture, methods, extras),
        "scores": len(tests) * (GRADIENTS + len(methods)),
        **{name: ANSWERING * len(tests) for name in methods if settings.generate},
    }
    with whole(settings.command, work), joined() if settings.serving.ray else nullcontext():
        with part("extras"):
            grid = make_grid(mixture, methods, extras)
        elsewhere = _elsewhere(mixture, methods, extras, settings) if settings.serving.ray else None
        with part("scores"):
            scored = score_methods(grid, rows, methods, cached, elsewhere)
        return grid, scored, _answers(grid, scored, tests, settings, cached, elsewhere)


def _told_by(mixture: Mixture) -> dict[str, Any]:
    """Return what the mixture's folder tells of how it was made."""
    folder = mixture.folder
    file = folder / AUTO_FILE if folder else None
    choice = TaskChoiceRecord if mixture.method == AUTO else AutoRecord
    return {
        "mixture": str(folder),
        "features": read_mixture_record(folder).router.features if folder else {},
        "choice": read(choice, file, AGAIN) if file and file.exists() else None,
        "map": feature_map(folder),
        **cluster_records(folder),
        **task_records(folder),
    }


def _shots(mixture: Mixture, settings: EvaluationSettings) -> list[Example]:
    """Load the solved examples that stand before questions."""
    reading = settings.reading.as_fitted(mixture.prompts.reading.record()).shared
    return load_all(settings.solved.few_shot, reading=reading)


def _test_rows(
    mixture: Mixture, examples: Sequence[Example], settings: EvaluationSettings
) -> tuple[list[TestRow], list[str]]:
    """Put solved examples before every question, where there are any."""
    shots = settings.solved
    if not shots.few_shot:
        return [TestRow(example, example) for example in examples], []
    found = with_shots(
        examples,
        _shots(mixture, settings),
        count=shots.few_shot_count,
        length=lambda example: mixture.prompts.row(example).prompt_length,
        longest=shots.longest_prompt,
    )
    kept = [row.kept for row in found]
    note = (
        f"Up to {shots.few_shot_count} solved examples stand before a question, as many as fit into "
        f"{shots.longest_prompt} tokens: {sum(kept) / len(kept):.1f} on average, {kept.count(0)} rows have none."
    )
    return [TestRow(row.example, example) for row, example in zip(found, examples, strict=True)], [note]


def _elsewhere(
    mixture: Mixture, methods: Sequence[str], extras: ExtrasSettings, settings: EvaluationSettings
) -> Elsewhere:
    """Say how workers open the same grid, for which nothing is to be trained any more."""
    if mixture.folder is None:
        raise CoterieError("workers open the mixture from its folder; save it first, or leave out ray")
    opened = str(mixture.folder), tuple(methods), extras, settings.placement
    return Elsewhere(settings.serving.workers, settings.placement.device, open_grid, opened)


def open_grid(folder: str, methods: Sequence[str], extras: ExtrasSettings, placement: PlacementSettings) -> MethodGrid:
    """Open a mixture with what methods need (runs in a worker)."""
    return make_grid(Mixture.from_pretrained(folder, **placement.model_dump()), methods, extras)


def _answers(
    grid: MethodGrid,
    scored: Scored,
    tests: Sequence[TestRow],
    settings: EvaluationSettings,
    cached: JsonCache,
    elsewhere: Elsewhere | None,
) -> dict[str, Answers]:
    """Let methods answer, or read the answers that they gave in an earlier try."""
    calls = {
        cache_name("answers", grid, [name]): Call(name, _answer, (name, tests, scored.routed[name].routing, settings))
        for name in (method_names(settings) if settings.generate else ())
    }
    found = named_values(calls, grid, cached, elsewhere)
    return {call.part: _ANSWERS.validate_python(found[key]) for key, call in calls.items()}


def _answer(
    grid: MethodGrid, name: str, tests: Sequence[TestRow], routing: Routing, settings: EvaluationSettings
) -> Any:  # noqa: ANN401 - plain values
    found = answer(grid.cell(name), tests, routing, name, settings.batch_size, settings.sampling)
    return _ANSWERS.dump_python(found, mode="json")


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

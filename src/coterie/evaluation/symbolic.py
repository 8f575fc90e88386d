"""Line-ups of recruited experts side by side on held-out rows: all share one batch, and every expert is loaded once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coterie.artifacts import FORMAT, check_output, run_folder, sha256_of, write_json, write_jsonl
from coterie.data.examples import Example, load_all
from coterie.errors import CoterieError, unknown_name
from coterie.evaluation.compare import Evaluation, run_evaluation
from coterie.evaluation.rows import hardware_record, mean_weights, question_record
from coterie.evaluation.table import summarise
from coterie.grading.grade import after_thinking, check_code_execution, code_notes, graded
from coterie.methods.common import hash_examples
from coterie.methods.symbolic.answer import LineUp, Outcome, answer_all
from coterie.methods.symbolic.fit import Symbolic, is_symbolic, load_symbolic
from coterie.methods.symbolic.methods import BEST_SINGLE, METHOD, METHODS
from coterie.methods.symbolic.profile import REPLIES
from coterie.methods.symbolic.skills import open_scheduler
from coterie.settings.commands import EvaluationSettings


def evaluate_folder(settings: EvaluationSettings) -> Evaluation:
    """Evaluate a folder made by any `coterie fit`.

    Raises:
        CoterieError: as `run_evaluation` and `evaluate_line_ups`.
    """
    return evaluate_line_ups(settings) if is_symbolic(settings.mixture) else run_evaluation(settings)


def evaluate_line_ups(settings: EvaluationSettings) -> Evaluation:
    """Compare line-ups of a run of symbolic-moe, and write the records into the output folder.

    An interrupted evaluation goes on with the replies that it had.

    Raises:
        CoterieError: for bad data, an unknown line-up, a flag that does not apply, or an output folder that exists.
    """
    output = Path(settings.output)
    check_output(output, overwrite=settings.overwrite)
    _check_flags(settings)
    fitted = load_symbolic(settings.mixture)
    names = line_up_names(settings.methods)
    control = control_of(settings.control, names)
    examples = load_all(settings.data, settings.limit)
    check_code_execution(examples, settings.allow_code_execution)
    for name in names:  # an unknown one is told before anything is asked
        fitted.line_up(name, [], [], settings.sampling)
    inputs = {"data": hash_examples(examples), "mixture": sha256_of(Path(settings.mixture) / "mixture.json")}
    with run_folder(output, "eval", settings.model_dump(), inputs) as run:
        summary, rows = _evaluated(settings, fitted, names, examples, run.path / "working" / REPLIES)
        rows_of_table = summarise(rows, names, control, summary["sources"], resamples=settings.resamples)
        summary |= {"control": control, "table": rows_of_table}
        write_jsonl(run.path / "rows.jsonl", rows)
        write_json(run.path / "evaluation.json", summary)
    return Evaluation(summary, rows)


def _check_flags(settings: EvaluationSettings) -> None:
    if not settings.generate:
        raise CoterieError(f"--no-generate leaves nothing to measure: {METHOD} has answers, but no likelihood")
    if settings.every is not None:
        raise CoterieError(f"--every does not apply to {METHOD}, whose experts answer one by one; leave it out")
    if settings.solved.few_shot:
        raise CoterieError(f"--shots does not apply to {METHOD}; put solved examples into the rows' prompts")


def line_up_names(methods: str | None) -> list[str]:
    """Return the line-ups that are compared; all of them where nothing was said."""
    if methods in (None, "all"):
        return list(METHODS)
    return list(dict.fromkeys(name.strip() for name in methods.split(",")))


def control_of(control: str | None, names: Sequence[str]) -> str:
    """Return the line-up that the others are compared with: the best single expert where nothing was said.

    Raises:
        CoterieError: when it is not among those compared.
    """
    if control is None:
        return BEST_SINGLE if BEST_SINGLE in names else names[0]
    if control not in names:
        raise unknown_name("method to compare with among those evaluated", control, names)
    return control


def _evaluated(
    settings: EvaluationSettings, fitted: Symbolic, names: Sequence[str], examples: Sequence[Example], cache: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    with open_scheduler(fitted.pool, settings, cache) as scheduler:
        skills = fitted.skills(scheduler, examples)
        line_ups = {name: fitted.line_up(name, examples, skills, settings.sampling) for name in names}
        outcomes = answer_all(scheduler, examples, line_ups)
        loads, peak = dict(scheduler.loads), scheduler.peak
    run_code = bool(settings.allow_code_execution)
    rows = [
        _row(number, example, skills, line_ups, outcomes, run_code=run_code) for number, example in enumerate(examples)
    ]
    summary = {
        **_facts(settings, fitted, names, rows),
        **_recruited(line_ups[METHOD if METHOD in line_ups else names[0]], rows),
        "seconds": {name: {"generate": sum(o.record()["cost"]["seconds"] for o in outcomes[name])} for name in names},
        "costs": {name: _cost(outcomes[name]) for name in names},
        "loads": loads,
        "peak_bytes": peak,
        "notes": [*_notes(fitted, outcomes), *code_notes(examples, run_code=run_code)],
    }
    return summary, rows


def _row(
    number: int,
    example: Example,
    skills: Sequence[tuple[str, ...]],
    line_ups: Mapping[str, LineUp],
    outcomes: Mapping[str, Sequence[Outcome]],
    *,
    run_code: bool,
) -> dict[str, Any]:
    first = METHOD if METHOD in line_ups else next(iter(line_ups))
    counts = line_ups[first].routing.row(number)
    total = sum(counts.values()) or 1.0
    return {
        **question_record(example),
        "skills": list(skills[number]),
        "weights": {name: count / total for name, count in counts.items()},
        "expert_nll": {},
        "methods": {name: _method(own[number], example, run_code=run_code) for name, own in outcomes.items()},
        "recruited": _with_verdicts(outcomes[first][number], example, run_code=run_code),
        "outcomes": {name: own[number].record() for name, own in outcomes.items() if name != first},
    }


def _method(outcome: Outcome, example: Example, *, run_code: bool) -> dict[str, Any]:
    verdict = graded(outcome.text, example, run_code=run_code)
    return {
        "text": outcome.text,
        "correct": verdict.correct if verdict else None,
        "extracted": verdict.extracted if verdict else None,
        "f1": verdict.f1 if verdict else None,
        "nll": None,
        "tokens": 0,
        "finish_reason": outcome.finish_reason,
    }


def _with_verdicts(outcome: Outcome, example: Example, *, run_code: bool) -> dict[str, Any]:
    """Return an outcome's record in which every expert's answer is graded, as far as it can be."""
    record = outcome.record()
    verdicts = {
        text: graded(after_thinking(text), example, run_code=run_code)
        for text in {given.reply.text for given in outcome.given if given.reply.error is None}
    }
    for answer in record["answers"]:
        verdict = verdicts.get(answer["text"]) if answer["error"] is None else None
        answer["correct"] = verdict.correct if verdict else None
    return record


def _facts(
    settings: EvaluationSettings, fitted: Symbolic, names: Sequence[str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    bases = sorted({expert.model for expert in fitted.pool.experts})
    return {
        "format": FORMAT,
        "mixture": settings.mixture,
        "data": ", ".join(settings.data),
        "base_model": {"id": ", ".join(bases)},
        "routed": METHOD,
        "methods": list(names),
        "experts": list(fitted.pool.names),
        "rows": len(rows),
        "sources": sorted({row["source"] for row in rows}),
        "settings": {**settings.sampling.model_dump(), "generate": True, "batch_size": settings.batch_size},
        "features": {},
        "hardware": hardware_record(),
        "profile": fitted.profiled.record(),
        "aggregator": fitted.aggregator,
        "memory": {},
        "merge_error": {},
        "clusters": {},
        "clustering": {},
        "composition": {},
    }


def _recruited(line_up: LineUp, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how often every expert was recruited: in all, and by source and category as shares."""
    totals = line_up.routing.weights.sum(dim=0).tolist()
    has_categories = any(row["category"] for row in rows)
    return {
        "recruits": dict(zip(line_up.routing.experts, map(int, totals), strict=True)),
        "routing": mean_weights(rows, line_up.routing, lambda row: row["source"]),
        "routing_by_category": mean_weights(rows, line_up.routing, lambda row: row["category"] or "-")
        if has_categories
        else {},
    }


def _cost(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Return the mean cost of a question: calls, tokens read and written, seconds."""
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update(outcome.record()["cost"])
    return {name: value / len(outcomes) for name, value in total.items()}


def _notes(fitted: Symbolic, outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    who = "chosen for each question by its skills" if fitted.per == "question" else fitted.aggregator
    notes = [f"The aggregator of {METHOD} is {who}."]
    failures = Counter(
        given.expert for own in outcomes.values() for outcome in own for given in outcome.given if given.reply.error
    )
    notes += [f"{name} failed on {count} questions, counted over all methods." for name, count in failures.items()]
    return notes

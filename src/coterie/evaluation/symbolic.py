"""Methods of recruited experts side by side on held-out rows: all share one batch, and every expert is loaded once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from coterie.artifacts import as_path, check_output, run_folder, sha256_of
from coterie.data.examples import Example, load_all
from coterie.errors import CoterieError
from coterie.evaluation.compare import Evaluation, check_control, method_names, run_evaluation
from coterie.evaluation.rows import method_result, question_fields, summary_record
from coterie.grading.grade import after_thinking, check_code_execution, code_notes, graded
from coterie.methods.common import hash_examples
from coterie.methods.symbolic.answer import Outcome, answer_all
from coterie.methods.symbolic.fit import Symbolic, is_symbolic, load_symbolic
from coterie.methods.symbolic.methods import BEST_SINGLE, METHOD, METHODS
from coterie.methods.symbolic.profile import REPLIES
from coterie.methods.symbolic.skills import open_scheduler
from coterie.mixture.folder import reading_for
from coterie.progress import ANSWERING, part, whole
from coterie.records.evaluation import Clustering, RowRecord
from coterie.records.files import write_evaluation
from coterie.records.recruits import Cost, OutcomeRecord
from coterie.settings.commands import EvaluationSettings
from coterie.settings.keywords import takes_fields

# Fields of what these methods do not have; they stay in the file, empty.
_NOT_MEASURED: dict[str, Any] = {
    **dict.fromkeys(("features", "memory", "merge_error", "clusters", "composition"), {}),
    "clustering": Clustering(),
}


@takes_fields(EvaluationSettings)
def evaluate_folder(settings: EvaluationSettings) -> Evaluation:
    """Evaluate a folder made by any `coterie fit`.

    Raises:
        CoterieError: as `run_evaluation` and `evaluate_symbolic`, and for a flag that no record would show.
    """
    if settings.sampling.top_logprobs:
        raise CoterieError("--top-logprobs shows in `coterie generate --json` alone; leave it out")
    return evaluate_symbolic(settings) if is_symbolic(settings.mixture) else run_evaluation(settings)


def evaluate_symbolic(settings: EvaluationSettings) -> Evaluation:
    """Compare methods of a run of symbolic-moe, and write the records into the output folder.

    An interrupted evaluation goes on with the replies that it had.

    Raises:
        CoterieError: for bad data, an unknown method, a flag that does not apply, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    if not settings.generate:
        raise CoterieError(f"--no-generate leaves nothing to measure: {METHOD} has answers, but no likelihood")
    if settings.every is not None:
        raise CoterieError(f"--every does not apply to {METHOD}, whose experts answer one by one; leave it out")
    if settings.solved.few_shot:
        raise CoterieError(f"--few-shot does not apply to {METHOD}; put solved examples into the rows' prompts")
    fitted = load_symbolic(settings.mixture)
    names = list(METHODS) if settings.methods in (None, "all") else method_names(settings)
    check_control(settings.control, names)
    examples = load_all(settings.data, settings.limit, reading_for(settings.mixture, settings.reading))
    check_code_execution(examples, settings.allow_code_execution)
    for name in names:  # an unknown one is told before anything is asked
        fitted.recruiting_plan(name, [], [], settings.sampling)
    inputs = {"data": hash_examples(examples), "mixture": sha256_of(Path(settings.mixture) / "mixture.json")}
    with run_folder(output, settings, inputs) as run:
        cache = run.path / "working" / REPLIES
        result = _evaluated(settings, fitted, names, examples, cache)
        write_evaluation(run.path, result.record, result.row_records)
    return result


def _evaluated(
    settings: EvaluationSettings, fitted: Symbolic, names: Sequence[str], examples: Sequence[Example], cache: Path
) -> Evaluation:
    most = len(examples) * fitted.recruiting.recruits * len(names)  # answers; methods share some of them
    work = {"skills": fitted.skills_work(examples), "answers": ANSWERING * most}
    with open_scheduler(fitted.pool, settings, examples, cache) as scheduler, whole(settings.command, work):
        with part("skills"):
            skills = fitted.skills(scheduler, examples)
        plans = {name: fitted.recruiting_plan(name, examples, skills, settings.sampling) for name in names}
        with part("answers"):
            outcomes = answer_all(scheduler, examples, plans)
    first, run_code = METHOD if METHOD in names else names[0], bool(settings.allow_code_execution)
    routing = plans[first].routing
    rows = []
    for number, example in enumerate(examples):
        own = {name: found[number] for name, found in outcomes.items()}
        rows.append(_row_record(example, skills[number], own, first, routing.row(number), run_code=run_code))
    costs = {name: [outcome.cost for outcome in outcomes[name]] for name in names}
    means = {name: {f: fmean(getattr(one, f) for one in own) for f in Cost.model_fields} for name, own in costs.items()}
    record = summary_record(
        settings,
        examples,
        rows,
        routing,
        names,
        [name for name in names if name in (BEST_SINGLE, *fitted.pool.names)],
        lambda row: row.category or "-",
        mixture=settings.mixture,
        base_model={"id": ", ".join(sorted({expert.model for expert in fitted.pool.experts}))},
        routed=METHOD,
        experts=fitted.pool.names,
        seconds={name: {"generate": sum(cost.seconds for cost in own)} for name, own in costs.items()},
        notes=(*_notes(fitted, outcomes), *code_notes(examples, run_code=run_code)),
        profile=fitted.profiled.record(),
        aggregator=fitted.aggregator,
        recruits=dict(zip(routing.experts, routing.weights.sum(dim=0).tolist(), strict=True)),
        costs=means,
        loads=dict(scheduler.loads),
        peak_bytes=scheduler.peak,
        **_NOT_MEASURED,
    )
    return Evaluation(record, tuple(rows))


def _row_record(
    example: Example,
    skills: Sequence[str],
    outcomes: Mapping[str, Outcome],
    first: str,
    counts: Mapping[str, float],
    *,
    run_code: bool,
) -> RowRecord:
    """Record every method's outcome of one row; that of the `first` with its verdicts, and whom it recruited."""
    total = sum(counts.values()) or 1.0
    return RowRecord(
        **question_fields(example),
        skills=tuple(skills),
        expert_nll={},
        methods={
            name: method_result(
                one.text, example, run_code=run_code, nll=None, tokens=0, finish_reason=one.finish_reason
            )
            for name, one in outcomes.items()
        },
        weights={name: count / total for name, count in counts.items()},
        recruited=_with_verdicts(outcomes[first], example, run_code=run_code),
        outcomes={name: one.record() for name, one in outcomes.items() if name != first},
    )


def _with_verdicts(outcome: Outcome, example: Example, *, run_code: bool) -> OutcomeRecord:
    """Return an outcome's record in which every expert's answer is graded, as far as it can be."""
    verdicts = {
        text: graded(after_thinking(text), example, run_code=run_code)
        for text in {given.reply.text for given in outcome.given if given.reply.error is None}
    }
    answers = []
    for given in outcome.given:
        verdict = verdicts.get(given.reply.text) if given.reply.error is None else None
        answers.append(given.record().model_copy(update={"correct": verdict.correct if verdict else None}))
    return outcome.record().model_copy(update={"answers": tuple(answers)})


def _notes(fitted: Symbolic, outcomes: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Say who made one answer of several, and which experts failed."""
    who = "chosen for each question by its skills" if fitted.per == "question" else fitted.aggregator
    given = [answer for own in outcomes.values() for outcome in own for answer in outcome.given]
    failures = Counter(answer.expert for answer in given if answer.reply.error)
    failed = (f"{name} failed on {count} questions, counted over all methods." for name, count in failures.items())
    return [f"The aggregator of {METHOD} is {who}.", *failed]

"""A fitted run of symbolic-moe at work: its answers to prompts, and what they will take."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.artifacts import as_path, check_file, is_stream, write_answers
from coterie.data.examples import Example
from coterie.errors import CoterieError
from coterie.methods.symbolic.answer import answer_all
from coterie.methods.symbolic.fit import Symbolic, load_symbolic
from coterie.methods.symbolic.methods import METHOD
from coterie.methods.symbolic.plan import WorkPlan, plan_work
from coterie.methods.symbolic.skills import open_scheduler
from coterie.mixture import Prompt, as_examples
from coterie.progress import ANSWERING, part, whole
from coterie.settings.commands import GenerateSettings
from coterie.settings.keywords import takes_fields

logger = logging.getLogger(__name__)


@takes_fields(GenerateSettings)
def generate_symbolic(settings: GenerateSettings, prompts: Prompt | Sequence[Prompt]) -> list[dict[str, Any]]:
    """Answer prompts with recruited experts, and return a plain record of each.

    With an output file, replies are kept beside it while the work goes on, so that the same command goes on where it
    was stopped; the file itself is written when all answers are there.

    Args:
        settings: the fitted run, and how it answers.
        prompts: questions, or one of them.

    Raises:
        CoterieError: for settings that do not apply, bad prompts, or experts that have changed.
    """
    output = None if settings.output is None else as_path(settings.output)
    if output is not None:
        check_file(output, settings)
    fitted, name, examples, replies = _opened(settings, prompts)
    answers = ANSWERING * len(examples) * fitted.recruiting.recruits
    work = {"skills": fitted.skills_work(examples), "answers": answers}
    with open_scheduler(fitted.pool, settings, examples, replies) as scheduler, whole(settings.command, work):
        with part("skills"):
            skills = fitted.skills(scheduler, examples)
        plan = fitted.recruiting_plan(name, examples, skills, settings.sampling)
        with part("answers"):
            outcomes = answer_all(scheduler, examples, {name: plan})[name]
    recruits = [plan.routing.row(number) for number in range(len(examples))]
    records = [
        {
            "id": example.id,
            "prompt": example.instruction,
            "skills": list(own),
            **outcome.record().plain(),
            "recruits": who,
        }
        for example, own, outcome, who in zip(examples, skills, outcomes, recruits, strict=True)
    ]
    if output is not None:
        write_answers(output, records)
        if any(reply.error for outcome in outcomes for reply in outcome.replies):
            logger.warning("some replies failed; the same command with --overwrite asks for those again")
        elif replies is not None:
            replies.unlink(missing_ok=True)
    return records


@takes_fields(GenerateSettings)
def plan_symbolic(settings: GenerateSettings, prompts: Prompt | Sequence[Prompt]) -> WorkPlan:
    """Tell what answering prompts will take, with the settings of `generate_symbolic`; nothing is loaded or asked.

    Raises:
        CoterieError: as `generate_symbolic`.
    """
    fitted, name, examples, replies = _opened(settings, prompts)
    return plan_work(fitted, settings, name, examples, replies)


def _opened(
    settings: GenerateSettings, prompts: Prompt | Sequence[Prompt]
) -> tuple[Symbolic, str, list[Example], Path | None]:
    """Return the run, the method that answers, the questions, and where replies are kept until all are answered."""
    fitted = load_symbolic(settings.mixture)
    given = [flag for flag, value in settings.routing if value is not None and flag != "method"]
    if settings.n > 1:
        given.append("n")
    if given:
        raise CoterieError(
            f"--{given[0].replace('_', '-')} does not apply to {METHOD}; its experts are set by coterie fit {METHOD}"
        )
    output = None if settings.output is None else as_path(settings.output)
    replies = None if output is None or is_stream(output) else output.with_name(output.name + ".replies.jsonl")
    return fitted, settings.routing.method or METHOD, as_examples(prompts), replies

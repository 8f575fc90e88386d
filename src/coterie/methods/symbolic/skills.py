"""Opening a pool for work, and finding the skills that questions need."""

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from coterie.cluster import joined
from coterie.data.examples import Example, from_prompt
from coterie.errors import CoterieError
from coterie.experts.answering import ExpertGroup, Question, Reply
from coterie.experts.expert_pool import Pool
from coterie.experts.reply_cache import ReplyCache
from coterie.features.skills import BLANK, choice_request, chosen_skills, kept_keywords, keyword_request, letters
from coterie.grading.lengths import longest_answer
from coterie.mixture.local_answers import LocalAnswerer, WorkerAnswerer
from coterie.mixture.memory import budget_of, groups_of
from coterie.mixture.scheduler import ExpertScheduler
from coterie.progress import ANSWERING
from coterie.settings.commands import EvaluationSettings, GenerateSettings, ProfileSettings, SymbolicSettings
from coterie.settings.groups import SamplingSettings, SkillSettings

logger = logging.getLogger(__name__)

SAMPLES = 5
LABELS = ("category", "source")  # fields of rows that can be their skills
KEYWORD_SAMPLING = SamplingSettings(max_new_tokens=48, temperature=0.7)


Working = ProfileSettings | SymbolicSettings | GenerateSettings | EvaluationSettings
"""Settings of the commands that ask experts."""


def open_scheduler(pool: Pool, settings: Working, examples: Sequence[Example], cache: Path | None) -> ExpertScheduler:
    """Make a pool's experts ready to be asked these questions; nothing is loaded yet.

    The file `cache` has the replies that are there already, and gets new ones; None keeps them in memory only.

    Raises:
        CoterieError: when a model does not exist.
    """
    budget = budget_of(settings.serving, settings.placement)
    groups, around = groups_for(pool, settings, examples), joined() if settings.serving.ray else None
    return ExpertScheduler(groups, pool.identities, ReplyCache(cache), budget, around)


def groups_for(pool: Pool, settings: Working, examples: Sequence[Example]) -> list[ExpertGroup]:
    """Put a pool's experts into the groups that they are loaded in to answer these questions.

    Raises:
        CoterieError: when a model does not exist.
    """
    new_tokens = max(longest_answer(settings.sampling, example) for example in examples)
    return groups_of(pool, settings.placement, settings.serving, batch_size=settings.batch_size, new_tokens=new_tokens)


def settled(settings: SkillSettings, examples: Sequence[Example]) -> SkillSettings:
    """Say where skills come from, if that is left open.

    It is the rows' category, or else their source, if all rows have one that most share. Settings that speak
    of a model or encoder mean keywords.
    """
    if settings.skills is not None:
        return settings
    usable = LABELS if settings == SkillSettings() else ()
    by = next((name for name in usable if _is_shared([getattr(own, name) for own in examples])), "keywords")
    if by != "keywords":
        logger.warning("the rows' %s is the skill that they need; --skills keywords asks a model instead", by)
    return settings.model_copy(update={"skills": by})


def _is_shared(labels: Sequence[str | None]) -> bool:
    count = Counter(labels)
    return all(labels) and len(count) > 1 and 2 * sum(many for many in count.values() if many > 1) >= len(labels)


def ask_expert(settings: SkillSettings, pool: Pool) -> str:
    """Return the expert that is asked for skills.

    Raises:
        CoterieError: when the pool has none of this name, or it is an endpoint that shall choose from a list.
    """
    expert = pool.experts[0] if settings.skill_expert is None else pool.expert(settings.skill_expert)
    if settings.skills == "choice" and expert.kind == "endpoint":
        local = next((other.name for other in pool.experts if other.kind != "endpoint"), "(none in this pool)")
        raise CoterieError(
            f"--skills choice reads probabilities, which the endpoint {expert.name!r} does not give; "
            f"add --skill-expert {local}, or take --skills keywords"
        )
    return expert.name


def skill_list(settings: SkillSettings, examples: Sequence[Example]) -> list[str]:
    """Return the skills that are chosen from: those given, or the rows' categories.

    Raises:
        CoterieError: when there are not 2 to 26 of them.
    """
    given = settings.skill_list.split(",") if settings.skill_list else [own.category or "" for own in examples]
    skills = list(dict.fromkeys(cleaned for skill in given if (cleaned := skill.strip().lower())))
    letters(skills)
    return skills


def find_skills(
    scheduler: ExpertScheduler,
    pool: Pool,
    settings: SkillSettings,
    examples: Sequence[Example],
    options: Sequence[str] = (),
    replies: Sequence[Reply] | None = None,
) -> list[tuple[str, ...]]:
    """Return the skills that every question needs, as the model or the data call them.

    Where skills are chosen, it is from these options; where a model names them, these replies to `keyword_asks`
    are read if it was asked already.

    Raises:
        CoterieError: when an expert cannot be asked in this way.
    """
    if settings.skills in LABELS:
        labels = [getattr(example, settings.skills) for example in examples]
        return [(label.strip().lower(),) if label else () for label in labels]
    expert = ask_expert(settings, pool)
    questions = [example.instruction for example in examples]
    if settings.skills == "choice":
        answerer = scheduler.loaded(expert)
        assert isinstance(answerer, LocalAnswerer | WorkerAnswerer)  # endpoints were refused before
        requests = [choice_request(question, options) for question in [*questions, BLANK]]
        found = answerer.option_logprobs(expert, requests, letters(options))
        return chosen_skills(found[:-1], found[-1], options)
    replies = scheduler.ask(keyword_asks(expert, questions)) if replies is None else replies
    texts = [reply.text for reply in replies]
    errors = [reply.error for reply in replies if reply.error]
    if errors:
        logger.warning("%s named no skills %d times of %d: %s", expert, len(errors), len(replies), errors[0])
    skills = [kept_keywords(texts[start : start + SAMPLES]) for start in range(0, len(texts), SAMPLES)]
    if (lacking := skills.count(())) > len(skills) / 2:
        advice = "--skills choice suits small models"
        logger.warning("%s named no skill twice for %d of %d questions; %s", expert, lacking, len(skills), advice)
    return skills


def skills_work(settings: SkillSettings, questions: int) -> float:
    """Return what finding the skills of so many questions weighs (see `coterie.progress`)."""
    return questions * {"keywords": SAMPLES * ANSWERING, "choice": 1.0}.get(settings.skills or "", 0.0)


def keyword_asks(expert: str, questions: Sequence[str]) -> list[Question]:
    """Return the five samples of every question's keywords, question by question."""
    seeds = [KEYWORD_SAMPLING.model_copy(update={"seed": seed}) for seed in range(SAMPLES)]
    messages = [from_prompt(keyword_request(question)).messages for question in questions]
    return [Question(expert, own, sampling) for own in messages for sampling in seeds]

"""Symbolic-MoE (Chen et al. 2025): experts of any kind, recruited for every question by the skills it needs."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from coterie import ranks
from coterie.artifacts import (
    FORMAT,
    as_path,
    check_kind,
    check_output,
    read_json,
    read_run_record,
    run_folder,
    sha256_of,
    write_json,
    write_jsonl,
)
from coterie.combiners.aggregate import MAJORITY, VOTES, WEIGHTED
from coterie.combiners.texts import SAMPLES, TEMPERATURE
from coterie.data.examples import Example, load_examples
from coterie.errors import CoterieError, check_known, naming, unknown_name
from coterie.experts.answering import Question, Reply
from coterie.experts.expert_pool import POOL_FILE, Pool, pool_from, read_pool
from coterie.features.skills import Embed, load_embed, nearest_skills
from coterie.methods.symbolic.aggregator import best_aggregators, judge_aggregators, make_up
from coterie.methods.symbolic.answer import RecruitingPlan
from coterie.methods.symbolic.methods import BEST_SINGLE, METHOD, METHODS, RANDOM, SELF_CONSISTENCY
from coterie.methods.symbolic.profile import PROFILE, REPLIES, VALIDATION, Profiled, read_profile, tell_lone_skills
from coterie.methods.symbolic.skills import LABELS, ask_expert, find_skills, keyword_asks, open_scheduler, skills_work
from coterie.mixture.scheduler import ExpertScheduler
from coterie.routers.base import Routing
from coterie.routers.skill import SkillProfile, profile_from, random_recruits, recruit
from coterie.settings.commands import SymbolicSettings
from coterie.settings.groups import RecruitSettings, SamplingSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import changed, checked, flat_values, from_flat
from coterie.settings.rows import READING

logger = logging.getLogger(__name__)

MOST_CHOICES = 26


@dataclass(frozen=True)
class Symbolic:
    """A fitted run.

    Attributes:
        pool: the experts.
        profiled: what they showed on the validation questions.
        recruiting: how experts are drawn.
        aggregators: how every aggregator did on made-up tasks; nothing where one was given, or there was no task.
        aggregator: the one that was given, or the best of them.
        per: whether the aggregator is chosen for the whole task, or for each question.
    """

    pool: Pool
    profiled: Profiled
    recruiting: RecruitSettings
    aggregators: SkillProfile | None
    aggregator: str
    per: str

    def skill_asks(self, examples: Sequence[Example]) -> list[Question]:
        """Return what an expert is asked so that it names the skills that questions need; nothing where it is not."""
        how = self.profiled.how
        if how.skills != "keywords":
            return []
        return keyword_asks(ask_expert(how, self.pool), [example.instruction for example in examples])

    def skills(
        self, scheduler: ExpertScheduler, examples: Sequence[Example], replies: Sequence[Reply] | None = None
    ) -> list[tuple[str, ...]]:
        """Return the skills that questions need, as the profile calls them; a repeated one counts again.

        Args:
            scheduler: asks experts.
            examples: the questions.
            replies: to `skill_asks`, if those were asked already.

        Raises:
            CoterieError: when an expert cannot be asked, or the encoder cannot be loaded.
        """
        how, known = self.profiled.how, self.profiled.profile.skills
        found = find_skills(scheduler, self.pool, how, examples, self.profiled.options, replies)
        lacking = [number for number, own in enumerate(found) if how.skills in LABELS and not own]
        if lacking and self.chooser is None:
            logger.warning(
                "%d questions have no %s: their experts are drawn by overall accuracy", len(lacking), how.skills
            )
        elif lacking:  # a local expert chooses among the known categories for the questions that bring none
            choice = how.model_copy(update={"skills": "choice", "skill_expert": self.chooser})
            chosen = find_skills(scheduler, self.pool, choice, [examples[number] for number in lacking], known)
            by_number = dict(zip(lacking, chosen, strict=True))
            found = [by_number.get(number, own) for number, own in enumerate(found)]
        renamed = [[self.profiled.names.get(skill, skill) for skill in own] for own in found]
        strange = {skill for own in renamed for skill in own} - set(known)
        nearest = nearest_skills([skill for own in renamed for skill in own], known, self.embed if strange else None)
        return [tuple(nearest[skill] for skill in own if skill in nearest) for own in renamed]

    @cached_property
    def embed(self) -> Embed | None:
        """What finds the nearest skill by meaning."""
        return load_embed(self.profiled.how.encoder)

    @property
    def skill_expert(self) -> str | None:
        """The expert that is asked for the skills of a question that brings none; None where nobody is."""
        how = self.profiled.how
        return self.chooser if how.skills in LABELS else ask_expert(how, self.pool)

    def skills_work(self, examples: Sequence[Example]) -> float:
        """Return what finding the skills of these questions weighs."""
        return skills_work(self.profiled.how, len(examples))

    @property
    def chooser(self) -> str | None:
        """The local expert that chooses among the known skills; None if there is none, or they are too many or few."""
        local = [expert.name for expert in self.pool.experts if expert.kind != "endpoint"]
        if not local or not 2 <= len(self.profiled.profile.skills) <= MOST_CHOICES:
            return None
        asked = self.profiled.how.skill_expert
        return asked if asked in local else local[0]

    def recruiting_plan(
        self, name: str, examples: Sequence[Example], skills: Sequence[tuple[str, ...]], sampling: SamplingSettings
    ) -> RecruitingPlan:
        """Return who answers the questions under one of the methods that are compared.

        Args:
            name: symbolic-moe; majority or weighted-vote of the same experts; best-single; random-experts; the best
                expert's self-consistency; or the name of one expert.
            examples: the questions.
            skills: of every question.
            sampling: how answers are drawn.

        Raises:
            CoterieError: for another name.
        """
        texts = [example.instruction for example in examples]
        own = (
            best_aggregators(self.aggregators, skills, self.per) if self.aggregators else [self.aggregator] * len(texts)
        )
        if name in (METHOD, *VOTES):
            recruits = recruit(self.profiled.profile, skills, texts, self.recruiting, sampling.seed)
            aggregators = own if name == METHOD else [name] * len(texts)
            return RecruitingPlan(recruits.routing, recruits.relevance, aggregators, sampling)
        if name == RANDOM:
            routing = random_recruits(self.pool.names, texts, self.recruiting, sampling.seed)
            return RecruitingPlan(routing, torch.ones(routing.weights.shape), own, sampling)
        best = self.pool.names[int(self.profiled.profile.accuracy.argmax())]
        if name == SELF_CONSISTENCY:
            warm = sampling.model_copy(update={"temperature": sampling.temperature or TEMPERATURE})
            return self._single(best, len(texts), SAMPLES, warm)
        expert = best if name == BEST_SINGLE else name
        if expert not in self.pool.names:
            raise unknown_name("method or expert", name, [*METHODS, *self.pool.names])
        return self._single(expert, len(texts), 1, sampling)

    def _single(self, expert: str, count: int, answers: int, sampling: SamplingSettings) -> RecruitingPlan:
        weights = torch.zeros(count, len(self.pool.names))
        weights[:, self.pool.names.index(expert)] = answers
        routing = Routing(self.pool.names, weights)
        return RecruitingPlan(routing, torch.ones(weights.shape), [MAJORITY] * count, sampling)

    def record(self) -> dict[str, Any]:
        """Return mixture.json."""
        return {
            "format": FORMAT,
            "method": METHOD,
            "experts": list(self.pool.names),
            "pool": self.pool.record(),
            "router": {"kind": "skills", **self.recruiting.model_dump()},
            "combiner": {
                "kind": "texts",
                "aggregator": self.aggregator,
                "for": self.per,
                "judged": None if self.aggregators is None else self.aggregators.record(),
            },
        }


def symbolic(pool: str | Path, *, output: str | Path, **settings: Any) -> Symbolic:  # noqa: ANN401
    """Recruit a profiled pool's experts by skills, and choose who makes one answer of several (Chen et al. 2025).

    Args:
        pool: folder of a pool that was profiled.
        output: folder to write the run to.
        **settings: fields of `SymbolicSettings` and its groups by their plain names, such as recruits=3.

    Raises:
        CoterieError: for a pool without a profile, bad settings, or an output folder that exists.
    """
    return fit_symbolic(from_flat(SymbolicSettings, {"pool": str(pool), "output": str(output), **settings}))


@takes_fields(SymbolicSettings)
@ranks.by_one(lambda settings: load_symbolic(as_path(settings.output)))
def fit_symbolic(settings: SymbolicSettings) -> Symbolic:
    """Choose the aggregator for a profiled pool, and write what answering needs into one folder.

    Raises:
        CoterieError: for a pool without a profile, an unknown aggregator, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    folder = Path(settings.experts)
    pool = read_pool(folder)
    profiled = read_profile(folder / PROFILE)
    if profiled.profile.experts != pool.names or profiled.identities != pool.identities:
        raise CoterieError(
            f"the profile in {folder} is of other experts; type: coterie profile {folder} --overwrite ..."
        )
    profiling = flat_values(read_run_record(folder / PROFILE / "run.yaml")["settings"])
    read_as = {name: profiling.get(name) for name in READING.record()}
    known = ["auto", *VOTES, *pool.names]
    check_known("aggregator", settings.aggregator, known)
    idle = [flag for flag in changed(settings) if flag in ("--aggregator-for", "--aggregator-tasks")]
    if settings.aggregator != "auto" and idle:
        raise CoterieError(f"{idle[0]} says how the best aggregator is found; leave out --aggregator, or this flag")
    inputs = {"pool": sha256_of(folder / POOL_FILE), "profile": sha256_of(folder / PROFILE / "profile.json")}
    with run_folder(output, settings, inputs) as run:
        judged, chosen = None, settings.aggregator
        if chosen == "auto" and (tasks := make_up(profiled, settings.aggregator_tasks, settings.sampling.seed)):
            questions = load_examples(profiled.rows, need_response=False)
            with open_scheduler(pool, settings, questions, folder / REPLIES) as scheduler:
                judged = judge_aggregators(scheduler, profiled, tasks, settings.recruiting, settings.sampling)
            chosen = best_aggregators(judged, [()], "task")[0]
        elif chosen == "auto":
            logger.warning("no validation question has a right and a wrong answer, so %s is the aggregator", WEIGHTED)
            chosen = WEIGHTED
        fitted = Symbolic(pool, profiled, settings.recruiting, judged, chosen, settings.aggregator_for)
        write_json(run.path / "profile.json", profiled.record().plain())
        write_jsonl(run.path / VALIDATION, profiled.rows)
        write_json(run.path / "mixture.json", {**fitted.record(), **read_as})
    tell_lone_skills(profiled)
    return fitted


def is_symbolic(folder: str | Path) -> bool:
    """Tell whether a folder was made by `coterie fit symbolic-moe`."""
    path = Path(folder) / "mixture.json"
    return path.is_file() and read_json(path).get("method") == METHOD


def load_symbolic(folder: str | Path) -> Symbolic:
    """Load a fitted run, and make sure that its experts are still what they were.

    Raises:
        CoterieError: when something is missing or broken, or an expert has changed or is gone.
    """
    path = Path(folder) / "mixture.json"
    check_kind(path.parent, path.name)
    record = read_json(path)
    if record.get("format") != FORMAT or record.get("method") != METHOD:
        raise CoterieError(f"{folder} is no run of symbolic-moe; make one with: coterie fit symbolic-moe")
    pool = pool_from(record.get("pool"), str(path))
    profiled = read_profile(Path(folder))
    try:
        combiner = record["combiner"]
        router = {name: value for name, value in record["router"].items() if name != "kind"}
        judged = None if combiner["judged"] is None else profile_from(combiner["judged"], str(path))
        aggregator, per = str(combiner["aggregator"]), str(combiner["for"])
        with naming(path):
            recruiting = checked(RecruitSettings, router)
    except (KeyError, TypeError, AttributeError) as error:
        raise CoterieError(f"{path} is broken ({error}); fit again") from error
    named = {aggregator, *(() if judged is None else judged.experts)} - {*VOTES, *pool.names}
    if named or profiled.profile.experts != pool.names:
        raise CoterieError(f"{path} names experts that are not in its pool; fit again")
    return Symbolic(pool, profiled, recruiting, judged, aggregator, per)

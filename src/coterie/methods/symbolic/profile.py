"""One pass over validation questions: the skills they need, and who answers them rightly."""

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.artifacts import FORMAT, check_output, hash_json, run_folder, write_json, write_jsonl
from coterie.data.examples import Example
from coterie.errors import CoterieError, naming
from coterie.experts.answering import Question, Reply
from coterie.experts.expert_pool import Pool, read_pool
from coterie.features.skills import load_embed, merge_synonyms
from coterie.grading.grade import is_right
from coterie.grading.lengths import with_length
from coterie.methods.common import hash_examples, load_questions, origin
from coterie.methods.symbolic.skills import (
    LABELS,
    ask_expert,
    find_skills,
    open_scheduler,
    settled,
    skill_list,
    skills_work,
)
from coterie.mixture.local_answers import LocalAnswerer, WorkerAnswerer
from coterie.mixture.scheduler import ExpertScheduler
from coterie.progress import ANSWERING, part, whole
from coterie.records.recruits import Profile, ValidationRow
from coterie.records.schema import read, read_rows
from coterie.records.wording import columns
from coterie.routers.skill import SkillProfile, build_profile, credit_from_likelihood, profile_from
from coterie.settings.commands import ProfileSettings
from coterie.settings.groups import SkillSettings
from coterie.settings.keywords import takes_fields
from coterie.settings.reading import checked

logger = logging.getLogger(__name__)

PROFILE = "profile"
REPLIES = "replies.jsonl"
VALIDATION = "validation.jsonl"
MOST_SHOWN = 6  # skills in the table


@dataclass(frozen=True)
class Profiled:
    """A pool's profile with all that it was made of.

    Attributes:
        profile: what the experts showed.
        how: how the skills of questions are found.
        options: skills that are chosen from, where they are.
        names: what a skill goes by, for skills that were merged into another.
        score: answers or likelihood.
        identities: what stood for each expert's weights.
        rows: a plain record of every validation question, with its skills, replies and scores.
    """

    profile: SkillProfile
    how: SkillSettings
    options: tuple[str, ...]
    names: Mapping[str, str]
    score: str
    identities: Mapping[str, str]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        """Return a table: every expert's accuracy, questions it failed on, its value on the most frequent skills."""
        profile = self.profile
        order = profile.trials.sum(dim=0).argsort(descending=True, stable=True)[:MOST_SHOWN].tolist()
        heads = ["expert", "right", "failed", *(profile.skills[place] for place in order)]
        values = profile.values("counts")
        lines = [
            [name, f"{share:.0%}", f"{self.failed(name)}", *(f"{values[number, place]:+.3g}" for place in order)]
            for number, (name, share) in enumerate(zip(profile.experts, profile.accuracy.tolist(), strict=True))
        ]
        return columns([heads, *lines], "<" * len(heads))

    def failed(self, expert: str) -> int:
        """Count the questions that an expert gave no answer to: they say nothing of it, right or wrong."""
        return sum(row["replies"].get(expert, {}).get("error") is not None for row in self.rows)

    def record(self) -> Profile:
        """Return all but the rows as they are recorded."""
        return Profile(
            format=FORMAT,
            **self.profile.record(),
            skills_by=self.how.model_dump(),
            options=self.options,
            names=dict(self.names),
            score=self.score,
            identities=dict(self.identities),
            failed={name: self.failed(name) for name in self.profile.experts},
        )

    def scores(self) -> Float[Tensor, "expert question"]:
        """Return every expert's scores; NaN where it gave no answer."""
        values = [[row["scores"][name] for row in self.rows] for name in self.profile.experts]
        return torch.tensor([[math.nan if value is None else value for value in own] for own in values])


@takes_fields(ProfileSettings)
def profile_pool(settings: ProfileSettings) -> Profiled:
    """Profile a pool's experts and write the profile into its folder.

    Replies are kept in the pool's folder by the hash of what was asked, so that an interrupted profile goes on, and a
    new one asks only for what is new.

    Raises:
        CoterieError: for bad data or settings, or a profile that exists.
    """
    folder = Path(settings.folder)
    pool = read_pool(folder)
    output = folder / PROFILE
    check_output(output, settings)
    examples = _usable(load_questions(settings.data, settings.limit, settings.reading), settings)
    how = settled(settings.skill, examples)
    if how.skills not in LABELS:
        ask_expert(how, pool)
    remote = [expert.name for expert in pool.experts if expert.kind == "endpoint"]
    if settings.score == "likelihood" and remote:
        raise CoterieError(f"--score likelihood cannot be had from the endpoint {remote[0]!r}; take --score answers")
    options = skill_list(how, examples) if how.skills == "choice" else []
    embed = load_embed(how.encoder) if how.skills == "keywords" else None
    inputs = {"data": hash_examples(examples), "pool": hash_json(pool.record(), ensure_ascii=True)}
    with run_folder(output, settings, inputs) as run:
        with open_scheduler(pool, settings, examples, folder / REPLIES) as scheduler:
            work = {"skills": skills_work(how, len(examples)), "answers": ANSWERING * len(examples) * len(pool.names)}
            with whole(settings.command, work):
                with part("skills"):
                    skills = find_skills(scheduler, pool, how, examples, options)
                with part("answers"):
                    replies, scores = _scored(scheduler, pool, settings, examples)
        names = merge_synonyms(Counter(s for own in skills for s in own), embed, how.synonyms)
        merged = [tuple(dict.fromkeys(names[skill] for skill in own)) for own in skills]
        profile = build_profile(pool.names, merged, scores)
        rows = [_row(number, example, merged, replies, scores, pool) for number, example in enumerate(examples)]
        made = Profiled(profile, how, tuple(options), names, settings.score, pool.identities, rows)
        write_jsonl(run.path / VALIDATION, rows)
        write_json(run.path / "profile.json", made.record().plain())
    tell_lone_skills(made)
    return made


def read_profile(folder: Path) -> Profiled:
    """Read a profile's folder, or that of a run that carries one.

    Raises:
        CoterieError: when a file is missing or broken.
    """
    path = folder / "profile.json"
    if not path.exists():
        raise CoterieError(f"{path} does not exist; make it with: coterie profile {folder.parent} --data val.jsonl")
    record = read(Profile, path, "type: coterie profile --overwrite")
    profile = profile_from(record.plain(), str(path))
    rows = read_rows(ValidationRow, folder / VALIDATION, "type: coterie profile --overwrite")
    if not all(set(row.scores) == set(profile.experts) >= set(row.replies) for row in rows):
        raise CoterieError(f"{folder / VALIDATION} does not fit {path}; type: coterie profile --overwrite")
    with naming(path):
        how = checked(SkillSettings, record.skills_by)
    plain = [row.model_dump(mode="json") for row in rows]
    return Profiled(profile, how, record.options, record.names, record.score, record.identities, plain)


def _usable(examples: Sequence[Example], settings: ProfileSettings) -> list[Example]:
    """Keep the rows that experts can be scored on."""
    if settings.score == "likelihood":
        kept = [example for example in examples if example.response is not None]
        lack = "a response"
    else:
        kept = [example for example in examples if is_right("", example) is not None]
        lack = "an answer that can be checked"
    if not kept:
        hint = "" if settings.score == "likelihood" else ", or take --score likelihood"
        raise CoterieError(f"no row of {', '.join(settings.data)} has {lack}; add the field{hint}")
    if len(kept) < len(examples):
        logger.warning("%d of %d rows have not %s and are left out", len(examples) - len(kept), len(examples), lack)
    return kept


Replies = list[dict[str, Reply]]


def _scored(
    scheduler: ExpertScheduler, pool: Pool, settings: ProfileSettings, examples: Sequence[Example]
) -> tuple[Replies, Float[Tensor, "expert question"]]:
    """Return every question's replies by expert, and their scores."""
    if settings.score == "likelihood":
        found: dict[str, Tensor] = {}
        for name in pool.names:
            if name not in found:
                answerer = scheduler.loaded(name)
                assert isinstance(answerer, LocalAnswerer | WorkerAnswerer)  # endpoints were refused before
                found |= answerer.likelihoods(examples)
            if name not in found:
                raise CoterieError(
                    f"{name!r} could not be loaded, so it cannot be profiled; see above, and mend the pool"
                )
        return [{} for _ in examples], credit_from_likelihood(torch.stack([found[name] for name in pool.names]))
    asks = [
        Question(name, example.prompt, with_length(settings.sampling, example))
        for example in examples
        for name in pool.names
    ]
    replies = scheduler.ask(asks)
    tell_failures(asks, replies)
    if all(reply.error is not None for reply in replies):
        raise CoterieError(f"no expert answered any question; the first failed with: {replies[0].error}")
    width = len(pool.names)
    rows = [dict(zip(pool.names, replies[n * width : (n + 1) * width], strict=True)) for n in range(len(examples))]
    scores = torch.full((width, len(rows)), math.nan)
    for number, (row, example) in enumerate(zip(rows, examples, strict=True)):
        for place, reply in enumerate(row.values()):
            if reply.error is None:
                scores[place, number] = 1 if is_right(reply.text, example) else -1
    return rows, scores


def tell_lone_skills(profiled: Profiled) -> None:
    """Log how many questions share no skill with another one: what an expert showed there helps no other question."""
    count = Counter(skill for row in profiled.rows for skill in set(row["skills"]))
    alone = sum(all(count[skill] == 1 for skill in row["skills"]) for row in profiled.rows)
    if alone and len(profiled.rows) > 1:
        advice = "where skills are unknown, experts are drawn by overall accuracy; --skills choice has few"
        logger.warning("%d of %d questions share no skill with another; %s", alone, len(profiled.rows), advice)


def tell_failures(asks: Sequence[Question], replies: Sequence[Reply]) -> None:
    """Log which experts failed, how often and why first, and how many answers were cut off or withheld."""
    distinct = {id(reply): (ask.expert, reply) for ask, reply in zip(asks, replies, strict=True)}.values()
    failures: dict[str, list[str]] = {}
    for name, reply in distinct:
        if reply.error is not None:
            failures.setdefault(name, []).append(reply.error)
    for name, errors in failures.items():
        logger.warning("%s failed on %d questions: %s", name, len(errors), errors[0])
    reasons = Counter(reply.finish_reason for _, reply in distinct)
    if cut := reasons["length"]:
        logger.warning("%d of %d answers were cut off; --max-new-tokens allows longer ones", cut, len(distinct))
    if withheld := reasons["content_filter"]:
        logger.warning("%d of %d answers were withheld by a content filter", withheld, len(distinct))


def _row(
    number: int,
    example: Example,
    skills: Sequence[tuple[str, ...]],
    replies: Replies,
    scores: Float[Tensor, "expert question"],
    pool: Pool,
) -> dict[str, Any]:
    own = {name: float(score) for name, score in zip(pool.names, scores[:, number], strict=True)}
    return {
        **origin(example),
        "messages": [{"role": message.role, "content": message.content} for message in example.prompt],
        "answer": example.answer,
        "answers": list(example.answers) or None,
        "skills": list(skills[number]),
        "scores": {name: None if math.isnan(score) else score for name, score in own.items()},
        "replies": {name: vars(reply) for name, reply in replies[number].items()},
    }

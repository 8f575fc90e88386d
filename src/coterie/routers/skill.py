"""Recruiting by skills: experts are drawn for every question by how well they did where the same skills were needed.

Symbolic-MoE (Chen et al. 2025). Its released code draws linearly from suitability times competency, competency being
raised to the power 1/0.5 (`power`); its paper takes a softmax at temperature 0.5 (`softmax`). The replacement of
experts that are used for less than 5% of the questions is written there, but never called; here it runs.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from coterie.records.recruits import SkillCounts
from coterie.records.schema import parse
from coterie.routers.base import Routing
from coterie.settings.groups import RecruitSettings

TEMPERATURE = 0.5
STRENGTH = 4.0  # questions that an expert's general accuracy counts for, where values are shrunk


@dataclass(frozen=True, eq=False)
class SkillProfile:
    """What every expert showed on validation questions, skill by skill.

    A question counts for each of its skills; an expert that did not answer it was not tried on it.

    Attributes:
        experts: names.
        skills: names.
        right: (expert, skill): questions answered correctly, or credit from 0 to 1 each, added up.
        trials: (expert, skill): questions tried.
        overall_right: (expert): the same over questions, each once.
        overall_trials: (expert).
    """

    experts: tuple[str, ...]
    skills: tuple[str, ...]
    right: Float[Tensor, "expert skill"]
    trials: Float[Tensor, "expert skill"]
    overall_right: Float[Tensor, " expert"]
    overall_trials: Float[Tensor, " expert"]

    @property
    def accuracy(self) -> Float[Tensor, " expert"]:
        """Every expert's share of correct answers; 0 for one that answered nothing."""
        return self.overall_right / self.overall_trials.clamp(min=1)

    @property
    def general(self) -> Float[Tensor, " expert"]:
        """Every expert's accuracy over all questions, shrunk towards a half by two of them."""
        return (self.overall_right + 1) / (self.overall_trials + 2)

    def values(self, kind: str) -> Float[Tensor, "expert skill"]:
        """Return what each expert's skills are worth.

        `counts` is the published one: +1 for every right answer, -1 for every wrong one. `shrunk` is 2p - 1, with p the
        mean of a Beta posterior whose prior is the expert's own general accuracy, worth four questions, so that a skill
        that was seen once says little.
        """
        if kind == "counts":
            return 2 * self.right - self.trials
        prior = STRENGTH * self.general[:, None]
        return 2 * (self.right + prior) / (self.trials + STRENGTH) - 1

    def without(self, skills: Sequence[str], scores: Float[Tensor, " expert"]) -> "SkillProfile":
        """Return the profile as it were without one question, so that the question can be judged by it."""
        own = build_profile(self.experts, [skills], scores[:, None], self.skills)
        return replace(
            self,
            right=self.right - own.right,
            trials=self.trials - own.trials,
            overall_right=self.overall_right - own.overall_right,
            overall_trials=self.overall_trials - own.overall_trials,
        )

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        tensors = ("right", "trials", "overall_right", "overall_trials")
        return {
            "experts": list(self.experts),
            "skills": list(self.skills),
            **{name: getattr(self, name).tolist() for name in tensors},
        }


def profile_from(record: Mapping[str, Any], place: str) -> SkillProfile:
    """Build a profile from its record.

    Raises:
        CoterieError: when it is broken.
    """
    found = parse(SkillCounts, record, place, "type: coterie profile --overwrite")
    shape = len(found.experts), len(found.skills)
    right, trials = (torch.tensor(values, dtype=torch.float32).reshape(shape) for values in (found.right, found.trials))
    overall = (torch.tensor(values, dtype=torch.float32) for values in (found.overall_right, found.overall_trials))
    return SkillProfile(found.experts, found.skills, right, trials, *overall)


def build_profile(
    experts: Sequence[str],
    questions: Sequence[Sequence[str]],
    scores: Float[Tensor, "expert question"],
    skills: Sequence[str] | None = None,
) -> SkillProfile:
    """Count every expert's scores by skill.

    Args:
        experts: names.
        questions: the skills of every question.
        scores: 1 for right, -1 for wrong, or between; NaN where an expert gave no answer.
        skills: names, in the order wanted; by default those of the questions, in the order of their appearance.
    """
    skills = list(dict.fromkeys(skill for own in questions for skill in own)) if skills is None else list(skills)
    needed = torch.zeros(len(questions), len(skills))
    for number, own in enumerate(questions):
        for skill, count in Counter(own).items():
            if skill in skills:
                needed[number, skills.index(skill)] = count
    tried = (~scores.isnan()).float()
    credit = ((1 + scores) / 2).nan_to_num(0.0)
    return SkillProfile(
        tuple(experts), tuple(skills), credit @ needed, tried @ needed, credit.sum(dim=1), tried.sum(dim=1)
    )


def credit_from_likelihood(logprobs: Float[Tensor, "expert question"]) -> Float[Tensor, "expert question"]:
    """Turn log-likelihoods of the reference answers into scores from -1 to 1, for models too small to answer.

    A score is how far an expert lies above the experts' mean on this question, in standard deviations over all of them,
    cut at 1: what is common to all experts, the question's own difficulty, does not count.
    """
    above = logprobs - logprobs.mean(dim=0, keepdim=True)
    spread = above.square().mean().sqrt()
    return (above / spread).clamp(-1, 1) if spread > 0 else torch.zeros_like(above)


def suitability(
    values: Float[Tensor, "expert skill"], skills: Sequence[str], questions: Sequence[Sequence[str]]
) -> Float[Tensor, "question expert"]:
    """Return the local suitability: an expert's values summed over a question's skills; a repeated one counts again."""
    places = {skill: place for place, skill in enumerate(skills)}
    rows = [values[:, [places[skill] for skill in own if skill in places]].sum(dim=1) for own in questions]
    return torch.stack(rows) if rows else values.new_zeros(0, len(values))


def competency(values: Float[Tensor, "expert skill"]) -> Float[Tensor, " expert"]:
    """Return the global competency: the share of each expert in all values, squared; together 1.

    Sums are shifted to a least one of 1 where some are negative.
    """
    total = values.sum(dim=1)
    if bool((total < 0).any()):
        total = total - total.min() + 1
    powered = total ** (1 / TEMPERATURE)
    return powered / powered.sum() if powered.sum() > 0 else torch.full_like(total, 1 / len(total))


def relevance(
    local: Float[Tensor, "question expert"], general: Float[Tensor, " expert"], sampler: str
) -> Float[Tensor, "question expert"]:
    """Return the weights that experts are drawn by; together 1 for every question.

    `softmax`: exp(suitability x competency / 0.5). `power` and `top`: suitability x competency of the experts whose
    suitability is positive; where none is, suitability is shifted to a least one of 1.
    """
    if sampler == "softmax":
        return (local * general / TEMPERATURE).softmax(dim=1)
    shifted = local - local.min(dim=1, keepdim=True).values + 1
    weights = torch.where((local > 0).any(dim=1, keepdim=True), local.clamp(min=0), shifted) * general
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / total, 1 / len(general))


class Recruits(NamedTuple):
    """Who was recruited.

    Attributes:
        routing: (request, expert): how often each expert answers a question.
        relevance: (request, expert): what they were drawn by.
    """

    routing: Routing
    relevance: Float[Tensor, "question expert"]


def recruit(
    profile: SkillProfile,
    questions: Sequence[Sequence[str]],
    names: Sequence[str],
    settings: RecruitSettings,
    seed: int = 0,
) -> Recruits:
    """Draw experts for every question; what is drawn for one depends on the others only through rare experts.

    A question without a known skill draws as if it needed one that all validation questions had: by general accuracy.

    Args:
        profile: what the experts showed.
        questions: the skills of every question, in the profile's names.
        names: what tells questions apart, such as their text; it seeds the draw.
        settings: how many are drawn, and how.
        seed: another seed gives other draws.
    """
    values = profile.values(settings.profile)
    known = torch.tensor([any(skill in profile.skills for skill in own) for own in questions], dtype=torch.bool)
    weights = relevance(suitability(values, profile.skills, questions), competency(values), settings.sampler)
    overall = 2 * profile.general[:, None] - 1
    weights = torch.where(known[:, None], weights, relevance(overall.T, competency(overall), settings.sampler))
    drawn = [_drawn(row, settings, f"{seed} {name}") for row, name in zip(weights.tolist(), names, strict=True)]
    is_distinct = settings.sampler == "top" or not settings.replacement
    drawn = replace_rare(drawn, settings.min_share, distinct=is_distinct, seed=seed)
    return Recruits(_routing(profile.experts, drawn), weights)


def random_recruits(experts: Sequence[str], names: Sequence[str], settings: RecruitSettings, seed: int = 0) -> Routing:
    """Draw as many experts for every question, from all alike, whatever it needs."""
    alike = [1 / len(experts)] * len(experts)
    return _routing(experts, [_drawn(alike, settings, f"random {seed} {name}") for name in names])


def _drawn(weights: Sequence[float], settings: RecruitSettings, seed: str) -> list[int]:
    """Draw experts by their weights; without replacement never more than have a weight."""
    places = [place for place, weight in enumerate(weights) if weight > 0]
    if settings.sampler == "top":
        return sorted(places, key=lambda place: -weights[place])[: settings.recruits]
    generator = random.Random(seed)
    if settings.replacement:
        return generator.choices(places, [weights[place] for place in places], k=settings.recruits)
    drawn: list[int] = []
    while places and len(drawn) < settings.recruits:
        drawn += generator.choices(places, [weights[place] for place in places])
        places.remove(drawn[-1])
    return drawn


def replace_rare(drawn: Sequence[Sequence[int]], min_share: float, *, distinct: bool, seed: int = 0) -> list[list[int]]:
    """Put frequent experts in the place of those that are recruited for too few of the questions.

    Each is drawn in proportion to how often the frequent ones were drawn. Where experts are distinct, one that answers
    the question already cannot come again, and the place stays empty if there is no other.

    Args:
        drawn: the experts of every question, by number.
        min_share: least share of the questions; experts below it are replaced.
        distinct: whether an expert may stand only once in a question.
        seed: of the draws.
    """
    questions = Counter(expert for own in drawn for expert in set(own))
    draws = Counter(expert for own in drawn for expert in own)
    frequent = sorted(expert for expert, count in questions.items() if count >= min_share * len(drawn))
    if not frequent:
        return [list(own) for own in drawn]
    generator = random.Random(f"rare {seed}")
    result = []
    for own in drawn:
        kept = [expert for expert in own if expert in frequent]
        for _ in range(len(own) - len(kept)):
            free = [expert for expert in frequent if not distinct or expert not in kept]
            kept += generator.choices(free, [draws[expert] for expert in free]) if free else []
        result.append(kept)
    return result


def _routing(experts: Sequence[str], drawn: Sequence[Sequence[int]]) -> Routing:
    weights = torch.zeros(len(drawn), len(experts))
    for number, own in enumerate(drawn):
        for expert in own:
            weights[number, expert] += 1
    return Routing(tuple(experts), weights)

"""Choosing the aggregator on made-up tasks: one right answer among wrong ones, drawn from the profile's replies.

Symbolic-MoE (Chen et al. 2025) chooses one model for each task. Here votes compete too, only questions that have both a
right and a wrong answer make a task, and votes weigh each question by the profile of all others.
"""

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from coterie.combiners.aggregate import VOTES, elect
from coterie.data.examples import load_examples
from coterie.grading.answers import read_answer
from coterie.grading.grade import after_thinking, is_right
from coterie.methods.symbolic.answer import synthesis_ask
from coterie.methods.symbolic.profile import Profiled, tell_failures
from coterie.mixture.scheduler import ExpertScheduler
from coterie.routers.skill import SkillProfile, build_profile, competency, relevance, suitability
from coterie.settings.groups import RecruitSettings, SamplingSettings

logger = logging.getLogger(__name__)

WRONG = 2  # wrong answers in a task, where there are as many


@dataclass(frozen=True)
class MadeUp:
    """A made-up task.

    Attributes:
        number: of its validation question.
        experts: whose answers it holds, in the order in which they are shown.
        texts: the answers, without their thinking.
        right: the place of the right one.
    """

    number: int
    experts: tuple[str, ...]
    texts: tuple[str, ...]
    right: int


def make_up(profiled: Profiled, most: int, seed: int = 0) -> list[MadeUp]:
    """Draw one right and up to two wrong answers for every question that has both, shuffled.

    Of more than `most` tasks, a seeded sample is taken.
    """
    generator = random.Random(seed)
    tasks = []
    for number, row in enumerate(profiled.rows):
        texts = {name: after_thinking(reply["text"]) for name, reply in row["replies"].items()}
        right = [name for name, text in texts.items() if text and row["scores"][name] == 1]
        wrong = [name for name, text in texts.items() if text and row["scores"][name] == -1]
        if not right or not wrong:
            continue
        chosen = generator.choice(right)
        shown = [chosen, *generator.sample(wrong, min(WRONG, len(wrong)))]
        generator.shuffle(shown)
        tasks.append(MadeUp(number, tuple(shown), tuple(texts[name] for name in shown), shown.index(chosen)))
    return sorted(generator.sample(tasks, most), key=lambda task: task.number) if len(tasks) > most else tasks


def judge_aggregators(
    scheduler: ExpertScheduler,
    profiled: Profiled,
    tasks: Sequence[MadeUp],
    settings: RecruitSettings,
    sampling: SamplingSettings,
) -> SkillProfile:
    """Return how every aggregator did on the made-up tasks, skill by skill; votes come first, being free.

    `settings` tell how experts are weighed in a weighted vote, `sampling` how syntheses are drawn.

    Raises:
        CoterieError: when a model does not fit into memory, or replies cannot be written.
    """
    questions = load_examples(profiled.rows, need_response=False)
    experts, shown = profiled.profile.experts, profiled.scores()
    asks = [synthesis_ask(name, questions[t.number], t.texts, sampling) for name in experts for t in tasks]
    replies = scheduler.ask(asks)
    tell_failures(asks, replies)
    judged = [
        bool(reply.error is None and is_right(reply.text, questions[task.number]))
        for reply, task in zip(replies, [task for _ in experts for task in tasks], strict=True)
    ]
    written = torch.tensor(judged).reshape(len(experts), len(tasks))
    skills = [tuple(profiled.rows[task.number]["skills"]) for task in tasks]
    voted = []
    for task, needed in zip(tasks, skills, strict=True):
        others = profiled.profile.without(needed, shown[:, task.number])  # not the question itself
        values = others.values(settings.profile)
        weights = relevance(suitability(values, others.skills, [needed]), competency(values), settings.sampler)[0]
        own = [float(weights[experts.index(name)]) for name in task.experts]
        question = questions[task.number].instruction
        readings = [read_answer(text, question) for text in task.texts]
        voted.append([elect(vote, readings, own, question) == task.right for vote in VOTES])
    scores = 2.0 * torch.cat([torch.tensor(voted).T, written]).float() - 1
    return build_profile([*VOTES, *experts], skills, scores)


def best_aggregators(judged: SkillProfile, questions: Sequence[Sequence[str]], per: str) -> list[str]:
    """Return the aggregator of every question, given by its skills: the first of the best, per task or per question."""
    overall = judged.experts[int(judged.accuracy.argmax())]
    if per == "task":
        return [overall] * len(questions)
    values = judged.values("shrunk")
    return [
        judged.experts[int(suitability(values, judged.skills, [own])[0].argmax())]
        if any(skill in judged.skills for skill in own)
        else overall
        for own in questions
    ]

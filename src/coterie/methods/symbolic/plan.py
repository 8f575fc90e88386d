"""What answering will take, before anything is loaded: the same scheduler on experts that only count.

Loads and memory are exactly what the scheduler will do. Tokens are what the profile's replies took on average, and at
most. Where the skills of questions are not known without asking a model, those of validation questions stand in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coterie.data.examples import Example
from coterie.errors import CoterieError
from coterie.experts.answering import Done, Question, Reply
from coterie.experts.reply_cache import ReplyCache
from coterie.features.skills import BLANK, choice_request
from coterie.grading.lengths import ANSWER_TOKENS
from coterie.methods.symbolic.answer import answer_all
from coterie.methods.symbolic.fit import Symbolic
from coterie.methods.symbolic.skills import LABELS, ask_expert, groups_for, keyword_asks
from coterie.mixture.memory import budget_of
from coterie.mixture.scheduler import GIB, ExpertScheduler
from coterie.progress import whole
from coterie.records.wording import columns
from coterie.settings.commands import GenerateSettings

CHARACTERS_PER_TOKEN = 4.0  # where the profile's replies do not tell


@dataclass
class Tally:
    """What one expert is asked for."""

    calls: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    most_tokens: int = 0

    def add(self, prompt_tokens: int, tokens: int, most: int) -> None:
        """Count one call."""
        self.calls += 1
        self.prompt_tokens += prompt_tokens
        self.tokens += tokens
        self.most_tokens += most


@dataclass(frozen=True)
class Pace:
    """What an expert's replies took in the profile: characters a token of its prompts, tokens a reply if known."""

    characters: float = CHARACTERS_PER_TOKEN
    tokens: float | None = None


@dataclass(frozen=True)
class WorkPlan:
    """What answering will take.

    Attributes:
        questions: how many there are.
        is_exact: whether the questions' skills are known; else validation questions stand in for them.
        experts: what each is asked for, by name; those that are not asked are left out.
        groups: of every group that is loaded: its experts, loads and bytes (None if unknown before it is downloaded).
        peak: most bytes that models take together.
        budget: bytes that they may take; None if one is loaded at a time.
        kinds: of the experts.
    """

    questions: int
    is_exact: bool
    experts: dict[str, Tally]
    groups: dict[str, dict[str, Any]]
    peak: int
    budget: int | None
    kinds: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """Return it as plain values."""
        experts = {name: {"kind": self.kinds[name], **vars(tally)} for name, tally in self.experts.items()}
        return {
            "questions": self.questions,
            "is_exact": self.is_exact,
            "experts": experts,
            "groups": self.groups,
            "peak_bytes": self.peak,
            "budget_bytes": self.budget,
        }

    def __str__(self) -> str:
        """Return a table of experts, one of loads, and the memory."""
        heads = ["expert", "kind", "calls", "prompt tokens", "tokens", "at most"]
        lines = [
            [name, self.kinds[name], *(f"{n:,}" for n in (t.calls, t.prompt_tokens, t.tokens, t.most_tokens))]
            for name, t in self.experts.items()
        ]
        loads = [
            [name, ", ".join(group["experts"]), str(group["loads"]), _gib(group["bytes"])]
            for name, group in self.groups.items()
        ]
        limit = "one at a time" if self.budget is None else f"of {_gib(self.budget)} that there may be"
        sure = "" if self.is_exact else " (skills are not known yet: recruits as on the validation questions)"
        parts = [f"{self.questions} questions{sure}", columns([heads, *lines], "<<<<<<")]
        if loads:
            parts += [
                columns([["loaded", "for", "loads", "memory"], *loads], "<<<<"),
                f"memory: {_gib(self.peak)} {limit}",
            ]
        return "\n\n".join(parts)


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / GIB:.2f} GiB"


@dataclass(frozen=True)
class _Counting:
    """Stands in for loaded experts: it replies at once, with a text of the expected length, and counts."""

    tallies: dict[str, Tally]
    paces: dict[str, Pace]

    def answer(self, questions: Sequence[Question], done: Done) -> None:
        for number, question in enumerate(questions):
            pace, most = self.paces[question.expert], question.sampling.max_new_tokens or ANSWER_TOKENS
            tokens = most if pace.tokens is None else min(most, round(pace.tokens))
            prompt = round(sum(len(message.content) for message in question.messages) / pace.characters)
            self.tallies.setdefault(question.expert, Tally()).add(prompt, tokens, most)
            done(number, Reply("x" * max(1, round(tokens * pace.characters)), prompt, tokens))

    def close(self) -> None:
        pass


def plan_work(
    fitted: Symbolic, settings: GenerateSettings, name: str, examples: Sequence[Example], replies: Path | None
) -> WorkPlan:
    """Count what answering with a method will take; nothing is loaded, and nobody is asked.

    What the file `replies` holds already costs nothing.

    Raises:
        CoterieError: when a model does not exist, or does not fit into memory.
    """
    if settings.serving.ray:
        raise CoterieError("a plan is of what one process takes; leave out --ray")
    paces = {}
    for expert in fitted.pool.names:  # measured on the profile's replies
        rows = [row for row in fitted.profiled.rows if expert in row["replies"]]
        answered = [(row, row["replies"][expert]) for row in rows if not row["replies"][expert]["error"]]
        asked = sum(len(message["content"]) for row, _ in answered for message in row["messages"])
        read = sum(reply["prompt_tokens"] for _, reply in answered)
        written = sum(reply["tokens"] for _, reply in answered)
        paces[expert] = Pace(asked / read, written / len(answered)) if read else Pace()
    tallies: dict[str, Tally] = {}
    counting = _Counting(tallies, paces)
    sizes = groups_for(fitted.pool, settings, examples)
    groups = [replace(group, load=lambda: counting) for group in sizes]
    budget = budget_of(settings.serving, settings.placement)
    cache = ReplyCache(replies, read_only=True)
    with whole("plan", {}), ExpertScheduler(groups, fitted.pool.identities, cache, budget) as scheduler:
        skills, is_exact = _skills(fitted, scheduler, counting, examples)
        plan = fitted.recruiting_plan(name, examples, skills, settings.sampling)
        answer_all(scheduler, examples, {name: plan})
    held = {
        group.name: {"experts": list(group.experts), "loads": scheduler.loads[group.name], "bytes": group.size}
        for group in sizes
        if scheduler.loads[group.name] and not group.is_remote
    }
    kinds = {expert.name: expert.kind for expert in fitted.pool.experts}
    ordered = {expert: tallies[expert] for expert in fitted.pool.names if expert in tallies}
    return WorkPlan(len(examples), is_exact, ordered, held, scheduler.peak, budget, kinds)


def _skills(
    fitted: Symbolic, scheduler: ExpertScheduler, counting: _Counting, examples: Sequence[Example]
) -> tuple[list[tuple[str, ...]], bool]:
    """Return the questions' skills without asking for them, and whether they are the questions' own."""
    how, questions = fitted.profiled.how, [example.instruction for example in examples]
    labels = [getattr(example, how.skills) if how.skills in LABELS else None for example in examples]
    if how.skills in LABELS and (fitted.chooser is None or all(labels)):
        return fitted.skills(scheduler, examples), True
    if how.skills == "keywords":
        asks = keyword_asks(ask_expert(how, fitted.pool), questions)
        if scheduler.knows(asks):
            return fitted.skills(scheduler, examples), True
        scheduler.ask(asks)
    else:
        # choices are read off one prefill each, and so is what the letters mean to the model before any question
        choosing = how.skills == "choice"
        expert = ask_expert(how, fitted.pool) if choosing else fitted.chooser
        options = fitted.profiled.options if choosing else fitted.profiled.profile.skills
        assert expert is not None  # without a chooser, nothing is chosen
        scheduler.loaded(expert)
        asked = [question for question, label in zip(questions, labels, strict=True) if choosing or not label]
        for question in [*asked, BLANK]:
            prompt = round(len(choice_request(question, options)) / counting.paces[expert].characters)
            counting.tallies.setdefault(expert, Tally()).add(prompt, 0, 0)
    rows = fitted.profiled.rows
    return [tuple(rows[number % len(rows)]["skills"]) for number in range(len(examples))], False

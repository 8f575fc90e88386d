"""Questions to recruited experts, and their answers to one: several methods in one batch, each expert loaded once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from jaxtyping import Float
from torch import Tensor

from coterie.combiners.aggregate import VOTES, WEIGHTED, elect, synthesis_request
from coterie.data.examples import Example, from_prompt
from coterie.experts.answering import Question, Reply
from coterie.grading.answers import read_answer
from coterie.grading.grade import after_thinking
from coterie.grading.lengths import with_length
from coterie.methods.symbolic.profile import tell_failures
from coterie.mixture.scheduler import ExpertScheduler
from coterie.progress import part, whole
from coterie.records.recruits import Cost, ExpertAnswerRecord, OutcomeRecord, ReplyRecord
from coterie.routers.base import Routing
from coterie.settings.groups import SamplingSettings


@dataclass(frozen=True)
class RecruitingPlan:
    """Who answers every question, and how their answers become one.

    Attributes:
        routing: (request, expert): how many answers each expert gives.
        relevance: (request, expert): what their answers weigh in a weighted vote.
        aggregators: for every question: majority, weighted-vote, or an expert that writes the synthesis.
        sampling: how answers are drawn; the n-th answer of one expert has the n-th seed after this one.
    """

    routing: Routing
    relevance: Float[Tensor, "request expert"]
    aggregators: Sequence[str]
    sampling: SamplingSettings

    def asks(self, number: int, example: Example) -> list[Question]:
        """Return the questions to the experts that were recruited for one request."""
        sampling = with_length(self.sampling, example)
        return [
            Question(name, example.prompt, sampling.model_copy(update={"seed": sampling.seed + again}))
            for name, count in self.routing.row(number).items()
            for again in range(int(count))
        ]


@dataclass(frozen=True)
class ExpertAnswer:
    """One expert's answer: its reply, what was read in it, and what it weighs."""

    expert: str
    reply: Reply
    reading: str
    weight: float

    def record(self) -> ExpertAnswerRecord:
        """Return it as it is recorded."""
        own = {"expert": self.expert, "reading": self.reading, "weight": self.weight}
        return ExpertAnswerRecord(**own, **vars(self.reply))


@dataclass(frozen=True)
class Outcome:
    """The one answer to a question.

    Attributes:
        text: the answer; empty where no expert gave one.
        given: the experts' answers, failed ones too.
        aggregator: what made one of them: the one that was wanted, or weighted-vote in place of one that failed.
        synthesis: the aggregator's reply, if it is a model.
    """

    text: str
    given: tuple[ExpertAnswer, ...]
    aggregator: str
    synthesis: Reply | None = None

    @property
    def replies(self) -> list[Reply]:
        """All replies that it cost; an expert that was drawn again without chance replied once."""
        own = [given.reply for given in self.given] + ([] if self.synthesis is None else [self.synthesis])
        return list({id(reply): reply for reply in own}.values())

    @property
    def finish_reason(self) -> str:
        """Why the answer ends where it does, if all replies that are it agree, else stop; failed without one."""
        same = (reply for reply in self.replies if reply.error is None and after_thinking(reply.text) == self.text)
        reasons = {reply.finish_reason for reply in same}
        return "stop" if len(reasons) > 1 else reasons.pop() if reasons else "failed"

    @property
    def cost(self) -> Cost:
        """What all replies took."""
        replies = self.replies
        return Cost(
            calls=len(replies),
            prompt_tokens=sum(reply.prompt_tokens for reply in replies),
            tokens=sum(reply.tokens for reply in replies),
            seconds=sum(reply.seconds for reply in replies),
        )

    def record(self) -> OutcomeRecord:
        """Return the answer, every expert's, the synthesis and what they cost, as they are recorded."""
        return OutcomeRecord(
            text=self.text,
            finish_reason=self.finish_reason,
            aggregator=self.aggregator,
            answers=tuple(own.record() for own in self.given),
            synthesis=None if self.synthesis is None else ReplyRecord(**vars(self.synthesis)),
            cost=self.cost,
        )


def answer_all(
    scheduler: ExpertScheduler, examples: Sequence[Example], plans: Mapping[str, RecruitingPlan]
) -> dict[str, list[Outcome]]:
    """Answer all questions with all methods; what they share is asked once, and every group is loaded once.

    Raises:
        CoterieError: when a model does not fit into memory, or replies cannot be written.
    """
    aggregators = [name for plan in plans.values() for name in plan.aggregators if name not in VOTES]
    asked = {
        (name, number): plan.asks(number, example)
        for name, plan in plans.items()
        for number, example in enumerate(examples)
    }
    flat = [question for questions in asked.values() for question in questions]
    with whole("answers", {"answers": len(flat), "syntheses": len(aggregators)}):
        with part("answers"):
            replies = scheduler.ask(flat, last=list(dict.fromkeys(aggregators)))
        tell_failures(flat, replies)
        queue = iter(replies)
        given = {
            (name, number): given_to(examples[number], plans[name], number, own, list(islice(queue, len(own))))
            for (name, number), own in asked.items()
        }
        with part("syntheses"):
            return _aggregated(scheduler, examples, plans, given)


def given_to(
    example: Example, plan: RecruitingPlan, number: int, questions: Sequence[Question], replies: Sequence[Reply]
) -> tuple[ExpertAnswer, ...]:
    """Put the replies to what recruited experts were asked with what is read in them and what they weigh."""
    answers = []
    for question, reply in zip(questions, replies, strict=True):
        text = after_thinking(reply.text)
        reading = read_answer(text, example.instruction) if text else ""
        weight = float(plan.relevance[number, plan.routing.experts.index(question.expert)])
        answers.append(ExpertAnswer(question.expert, reply, reading, weight))
    return tuple(answers)


def _aggregated(
    scheduler: ExpertScheduler,
    examples: Sequence[Example],
    plans: Mapping[str, RecruitingPlan],
    given: Mapping[tuple[str, int], tuple[ExpertAnswer, ...]],
) -> dict[str, list[Outcome]]:
    """Let votes be counted, and aggregators write."""
    wanted = {}
    for (name, number), own in given.items():
        aggregator = plans[name].aggregators[number]
        texts = [text for one in own if (text := after_thinking(one.reply.text))]
        if texts and aggregator not in VOTES:
            wanted[name, number] = synthesis_ask(aggregator, examples[number], texts, plans[name].sampling)
    replies = dict(zip(wanted, scheduler.ask(list(wanted.values())), strict=True))
    tell_failures(list(wanted.values()), list(replies.values()))
    return {
        name: [
            one_of(plan, number, given[name, number], replies.get((name, number)), example)
            for number, example in enumerate(examples)
        ]
        for name, plan in plans.items()
    }


def synthesis_ask(aggregator: str, example: Example, texts: Sequence[str], sampling: SamplingSettings) -> Question:
    """Return what an aggregator is asked: the answers, then the question."""
    messages = from_prompt(synthesis_request(example.instruction, texts)).messages
    return Question(aggregator, messages, with_length(sampling, example))


def one_of(
    plan: RecruitingPlan, number: int, given: tuple[ExpertAnswer, ...], synthesis: Reply | None, example: Example
) -> Outcome:
    """Make one answer of several: the aggregator's, or what a vote elects."""
    aggregator = plan.aggregators[number]
    if synthesis is not None and (text := after_thinking(synthesis.text)):
        return Outcome(text, given, aggregator, synthesis)
    answered = [own for own in given if after_thinking(own.reply.text)]
    voting = aggregator if aggregator in VOTES else WEIGHTED  # a vote stands in for an aggregator that failed
    if not answered:
        return Outcome("", given, voting, synthesis)
    readings, weights = [own.reading for own in answered], [own.weight for own in answered]
    elected = answered[elect(voting, readings, weights, f"{plan.sampling.seed} {example.instruction}")]
    return Outcome(after_thinking(elected.reply.text), given, voting, synthesis)

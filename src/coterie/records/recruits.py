"""What is recorded of recruited experts: what they showed on validation questions, and how they came to an answer."""

from typing import Annotated

from pydantic import Field, StrictBool, StrictStr, model_validator

from coterie.artifacts import FORMAT
from coterie.records.schema import Amount, Count, Facts, Names, Number, Position, Record, Texts, Weight, Whole


class ReplyRecord(Record):
    """What a recruited expert replied; `error` tells why it gave no answer."""

    text: StrictStr
    prompt_tokens: Count = 0
    tokens: Count = 0
    finish_reason: StrictStr = "stop"
    seconds: Number = None
    error: StrictStr | None = None


class Said(Record):
    """A message of a conversation."""

    role: StrictStr
    content: StrictStr


class ValidationRow(Record):
    """A validation question: the skills that it needs, every expert's reply, and its score.

    A score is 1 for right, -1 for wrong, or between; None where the expert gave no answer.
    """

    id: StrictStr | None = None
    source: StrictStr | None = None
    category: StrictStr | None = None
    messages: tuple[Said, ...]
    answer: StrictStr | None = None
    answers: Texts | None = None
    skills: Texts
    scores: dict[StrictStr, Annotated[Position, Field(ge=-1, le=1)] | None]
    replies: dict[StrictStr, ReplyRecord]


class VoteRecord(Record):
    """What was read in an expert's answer, and what it weighs."""

    expert: StrictStr
    reading: StrictStr = ""
    weight: Number = None


class ExpertAnswerRecord(ReplyRecord, VoteRecord):
    """One recruited expert's reply, its vote, and whether it was right."""

    correct: StrictBool | None = None


class Cost(Record):
    """What an answer took: calls of experts and aggregator, tokens that they read and wrote, and seconds."""

    calls: Whole = 0.0
    prompt_tokens: Whole = 0.0
    tokens: Whole = 0.0
    seconds: Weight = 0.0


class OutcomeRecord(Record):
    """How the answers of recruited experts became one, and the cost of it all."""

    text: StrictStr = ""
    finish_reason: StrictStr | None = None
    aggregator: StrictStr
    answers: tuple[ExpertAnswerRecord, ...]
    synthesis: ReplyRecord | None = None
    cost: Cost = Cost()


class SkillCounts(Record):
    """What experts showed on questions: right answers and trials, by expert and skill and over all."""

    experts: Names
    skills: Names
    right: tuple[tuple[Amount, ...], ...]
    trials: tuple[tuple[Amount, ...], ...]
    overall_right: tuple[Amount, ...]
    overall_trials: tuple[Amount, ...]

    @model_validator(mode="after")
    def _check_shapes(self) -> "SkillCounts":
        height, width = len(self.experts), len(self.skills)
        for key in ("right", "trials"):
            rows = getattr(self, key)
            if len(rows) != height or any(len(row) != width for row in rows):
                raise ValueError(f"{key!r} should be {height} lists of {width} numbers")
        if len(self.overall_right) != height or len(self.overall_trials) != height:
            raise ValueError(f"'overall_right' and 'overall_trials' should be lists of {height} numbers")
        return self


class Profile(SkillCounts):
    """What a pool's experts showed on validation questions, and all that questions are routed by.

    That is how skills are found (`skills_by`), those that are chosen from (`options`), the `names` they go by, what
    `score` counts, what stood for each expert's weights, and how many questions each gave no answer to.
    """

    format: int = FORMAT
    skills_by: Facts
    options: Texts
    names: dict[StrictStr, StrictStr]
    score: StrictStr
    identities: dict[StrictStr, StrictStr]
    failed: dict[StrictStr, Count] = {}

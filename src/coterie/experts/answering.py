"""What an expert is asked and what it replies, whatever it is: an adapter, a whole model, or an endpoint."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol, runtime_checkable

from coterie.artifacts import hash_json
from coterie.data.examples import Message
from coterie.errors import first_line
from coterie.settings.groups import SamplingSettings


@dataclass(frozen=True)
class Question:
    """One question to one expert.

    Attributes:
        expert: its name in the pool.
        messages: the conversation, which ends with the user's turn.
        sampling: how the answer is drawn.
    """

    expert: str
    messages: tuple[Message, ...]
    sampling: SamplingSettings

    def key(self, identity: str) -> str:
        """Hash all that the reply depends on; `identity` stands for the expert's weights.

        The seed of greedy decoding is no part of it.
        """
        sampling = self.sampling.acting()
        if not self.sampling.temperature:
            sampling.pop("seed")
        content = [identity, [asdict(message) for message in self.messages], sampling]
        return hash_json(content)


FinishReason = Literal["stop", "length", "content_filter", "other", "failed"]


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        text: the answer; empty where there is none, and also where a model spent all of its tokens on reasoning.
        prompt_tokens: tokens of the question, as the expert counts them.
        tokens: tokens of the answer.
        finish_reason: why it ends there; other where a server gives another reason, or none.
        seconds: time spent on it; questions that were answered together share theirs.
        error: why there is no answer, in one line.
    """

    text: str
    prompt_tokens: int = 0
    tokens: int = 0
    finish_reason: FinishReason = "stop"
    seconds: float = 0.0
    error: str | None = None


def failed(reason: object, seconds: float = 0.0) -> Reply:
    """Return the reply of an expert that failed: the first line of the reason."""
    return Reply("", finish_reason="failed", seconds=seconds, error=first_line(reason))


Done = Callable[[int, Reply], None]
"""Takes the number of a question and its reply, as soon as it is there; it may be called from several threads."""


@runtime_checkable
class Answerer(Protocol):
    """One or several experts, ready to answer."""

    def answer(self, questions: Sequence[Question], done: Done) -> None:
        """Answer all questions and give every reply to `done`, a failed one too, in whatever order they come."""
        ...

    def close(self) -> None:
        """Let go of memory, and stop what is under way."""
        ...


@dataclass(frozen=True)
class ExpertGroup:
    """Experts that are loaded in one go: the adapters of one base model, or a single endpoint.

    Attributes:
        name: the base model, or a name for the endpoint; each group has another.
        experts: their names.
        load: makes them ready.
        size: bytes that they take when they are loaded; None if that cannot be told beforehand.
        is_remote: whether they run elsewhere.
    """

    name: str
    experts: tuple[str, ...]
    load: Callable[[], Answerer]
    size: int | None = None
    is_remote: bool = False

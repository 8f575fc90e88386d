"""The protocol of OpenAI-compatible servers: what is sent, what an answer says, and what an error means.

Servers agree on the happy case. Errors come with a status or inside an answer of status 200, under `error`, `detail` or
`message`, as texts, objects or lists; their meaning is read off the status, then off the words that are in use.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from coterie.errors import shortened, shown
from coterie.experts.answering import FinishReason, Question, Reply
from coterie.grading.lengths import ANSWER_TOKENS

Change = Literal["max_completion_tokens", "no temperature"]
"""What a server may ask for: the longest answer under its newer name, or sampling at the server's own temperature."""

BUSY = frozenset({408, 409, 425, 429, *range(500, 600)})
BUSY_WORDS = re.compile(
    r"rate[ _]?limit|too[ _]many[ _]requests|overload|server_?error|internal_?error|unavailable|time_?d?_?out",
    re.IGNORECASE,
)
NO_MONEY = re.compile(r"credit balance|insufficient (?:balance|credit|funds)", re.IGNORECASE)
QUOTA = re.compile(r"insufficient_(?:quota|balance|credits)|billing|account_deactivated|quota_exceeded", re.IGNORECASE)
KEY = re.compile(r"authentication|invalid_api_key|permission_(?:error|denied)|api[ _-]?key", re.IGNORECASE)
MODERATION = re.compile(r"flagged|moderation|content[ _](?:policy|filter|management)", re.IGNORECASE)
UNSUPPORTED = re.compile(
    r"unsupported|not? (?:longer )?support|only the default|only [\d.]+ is|instead|un(?:known|recognized)|deprecated"
    r"|extra_?forbidden|not permitted|not allowed",
    re.IGNORECASE,
)
PARAMETER = re.compile(r"\b(?:model|max_\w*tokens|temperature|seed|(?:top|min)_[pk]|\w+_penalty|logit_bias|stop)\b")
TOO_LONG = re.compile(r"context|too long|input tokens|prompt", re.IGNORECASE)
ENDINGS: Mapping[FinishReason, tuple[str, ...]] = {
    "stop": ("stop", "eos", "eos_token", "stop_sequence", "end_turn"),
    "length": ("length", "max_tokens", "model_length"),
    "content_filter": ("content_filter", "safety", "recitation"),
}
FINISHED = {word: reason for reason, words in ENDINGS.items() for word in words}
CHARACTERS_PER_TOKEN = 4  # where a server does not count
MOST_TOKENS = 10**9  # a larger count is no count
LONGEST_WORDS = 200  # characters that are shown of what a server says
READ_WORDS = 4000  # characters that are read of it, so that no key is cut in two before it is taken out
DEPTH_OF_WORDS = 5


@dataclass(eq=False)
class Trouble(Exception):
    """A request without an answer.

    Attributes:
        reason: why there is none.
        words: what the server says of it.
        hint: what to check.
        again: whether another try may help.
        pause: seconds that the server asks to wait for.
        for_all: whether no question to this expert can succeed.
        changes: how the server wants to be asked instead.
    """

    reason: str
    words: str = ""
    hint: str = ""
    again: bool = field(default=False, kw_only=True)
    pause: float = field(default=0.0, kw_only=True)
    for_all: bool = field(default=False, kw_only=True)
    changes: frozenset[Change] = field(default=frozenset(), kw_only=True)

    def line(self, hide: Callable[[str], str]) -> str:
        """Tell it in one line that a terminal can show, secrets taken out before anything is cut."""
        words = shortened(shown(" ".join(hide(self.words).split())), LONGEST_WORDS)
        return hide(self.reason) + (f" ({words})" if words else "") + (f"; {self.hint}" if self.hint else "")


def request_body(model: str, question: Question, changes: frozenset[Change] = frozenset()) -> dict[str, Any]:
    """Write a question as a server wants it; what says nothing is left out, as not every server knows it."""
    sampling = question.sampling
    longest = sampling.max_new_tokens or ANSWER_TOKENS
    optional = {
        "temperature": None if "no temperature" in changes else sampling.temperature,
        "seed": sampling.seed if sampling.temperature else None,
        "top_p": sampling.top_p if sampling.top_p < 1 else None,
        "top_k": sampling.top_k or None,
        "min_p": sampling.min_p or None,
        "repetition_penalty": sampling.repetition_penalty if sampling.repetition_penalty != 1 else None,
        "presence_penalty": sampling.presence_penalty or None,
        "frequency_penalty": sampling.frequency_penalty or None,
        "logit_bias": {str(token): bias for token, bias in sampling.biases().items()} or None,
        "stop": sampling.stop or None,
    }
    return {
        "model": model,
        "messages": [{"role": message.role, "content": message.content} for message in question.messages],
        "max_completion_tokens" if "max_completion_tokens" in changes else "max_tokens": longest,
        **{name: value for name, value in optional.items() if value is not None},
    }


def read_json_or_none(content: str) -> object:
    """Parse an answer; None where it is no JSON, or nested too deep to be any."""
    with suppress(ValueError, RecursionError):
        return json.loads(content)
    return None


# ---------------------------------------------------------------------------------------------------------- answers


def reply_from(content: str, question: Question, seconds: float) -> Reply:
    """Read an answer of status 200. One without text is an empty answer: reasoning can take all tokens there are.

    Raises:
        Trouble: when it is no chat completion, or an error after all.
    """
    record = read_json_or_none(content)
    choices = record.get("choices") if isinstance(record, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    for place in (record, choice):
        if isinstance(place, dict) and place.get("error"):
            raise error_inside(place["error"])
    if not choice and ((trouble := error_inside(record)).again or trouble.for_all):  # an error under no name
        raise trouble
    if choice.get("finish_reason") == "error":
        raise Trouble("the server broke the answer off with an error", again=True)
    message = choice.get("message")
    text = _text(message.get("content")) if isinstance(message, dict) else None
    if not isinstance(record, dict) or text is None:
        raise Trouble("the server's answer is no chat completion", content[:READ_WORDS])
    usage = record.get("usage")
    asked = sum(len(message.content) for message in question.messages)
    reason = choice.get("finish_reason")
    return Reply(
        text.encode("utf-8", errors="replace").decode(),  # half characters, which JSON can write and no file can
        _count(usage, "prompt_tokens", asked),
        _count(usage, "completion_tokens", len(text)),
        FINISHED.get(reason.lower(), "other") if isinstance(reason, str) else "other",
        seconds,
    )


def _text(content: object) -> str | None:
    """Return a message's text, that of its text parts together; None where it is neither text, parts nor null."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list) or not all(isinstance(part, str | dict) for part in content):
        return None
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str))


def _count(usage: object, name: str, characters: int) -> int:
    value = usage.get(name) if isinstance(usage, dict) else None
    is_count = type(value) is int and 0 < value <= MOST_TOKENS
    return value if is_count else -(-characters // CHARACTERS_PER_TOKEN)


# ----------------------------------------------------------------------------------------------------------- errors


def error_inside(error: object) -> Trouble:
    """Say what an error means that came with status 200: its own code stands for the status."""
    codes = (str(code) for code in _values(error, ("code", "status", "status_code")))
    status = next((int(code) for code in codes if re.fullmatch(r"[45]\d\d", code)), None)
    return refusal("the server answered with an error" + (f" {status}" if status else ""), status, {"error": error})


def refusal(
    reason: str, status: int | None, record: object, *, key_hint: str = "the key", pause: float = 0.0
) -> Trouble:
    """Say what an error means: whether to try again, whether it holds for every question, and what to check.

    Args:
        reason: who answered what.
        status: of HTTP, or of the error itself.
        record: what the server sent with it.
        key_hint: where the key stands.
        pause: seconds that the server asks to wait for.
    """
    words = error_words(record)
    names = " ".join(_values(record, ("code", "type", "status", "error_type")))
    if status == 402 or QUOTA.search(names) or (status in (400, 403) and NO_MONEY.search(words)):
        return Trouble(reason, words, "check what the account may spend", for_all=True)
    if status in (400, 403) and MODERATION.search(f"{names} {words}"):
        return Trouble(reason, words)
    if status in (401, 403) or KEY.search(names) or (status == 400 and KEY.search(words)):
        return Trouble(reason, words, f"check {key_hint}", for_all=True)
    if status in (404, 405, 410):
        return Trouble(reason, words, "check the model's name and the address", for_all=True)
    if status in BUSY or (status is None and BUSY_WORDS.search(f"{names} {words}")):
        return Trouble(reason, words, again=True, pause=pause)
    return _parameter_trouble(reason, words, " ".join(_values(record, ("param", "loc"))), names)


def _parameter_trouble(reason: str, words: str, param: str, names: str) -> Trouble:
    """Tell a parameter that the server wants otherwise, or not at all, from trouble with this question alone."""
    whole = f"{param} {names} {words}"
    is_unsupported = bool(UNSUPPORTED.search(whole))
    changes: set[Change] = set()
    if is_unsupported and "max_completion_tokens" in whole:
        changes.add("max_completion_tokens")
    if is_unsupported and re.search(r"\btemperature\b", whole):
        changes.add("no temperature")
    is_ours = PARAMETER.search(whole if is_unsupported else param)
    return Trouble(reason, words, for_all=bool(is_ours) and not TOO_LONG.search(words), changes=frozenset(changes))


def seconds_to_wait(retry_after: str | None) -> float:
    """Read the header `Retry-After`: seconds, or the date until which to wait; 0 where it is neither."""
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, float(retry_after or 0))
    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(str(retry_after)).timestamp() - time.time())
    return 0.0


def error_words(value: object, depth: int = DEPTH_OF_WORDS) -> str:
    """Return what a server says of an error, wherever it puts it: the first text that is meant for people."""
    if isinstance(value, str) or not depth:
        return value[:READ_WORDS] if isinstance(value, str) else ""
    if isinstance(value, list):
        return next(filter(None, (error_words(part, depth - 1) for part in value[:3])), "")
    if not isinstance(value, dict):
        return ""
    parts = (value.get(name) for name in ("error", "message", "detail", "msg", "title"))
    found = next(filter(None, (error_words(part, depth - 1) for part in parts)), "")
    place = ".".join(_values({"loc": value.get("loc")}, ("loc",)))  # of a field, as FastAPI says it
    return f"{place}: {found}" if place and found else found


def _values(value: object, names: tuple[str, ...], depth: int = DEPTH_OF_WORDS) -> list[str]:
    """Collect the short texts that stand under these names anywhere in an error's upper levels."""
    if not depth:
        return []
    if isinstance(value, list):
        return [text for part in value[:3] for text in _values(part, names, depth - 1)]
    if not isinstance(value, dict):
        return []
    own = (value.get(name) for name in names)
    texts = [text for one in own for text in (one[:5] if isinstance(one, list) else [one])]
    inner = (value.get(name) for name in ("error", "message", "detail"))
    found = [str(text)[:LONGEST_WORDS] for text in texts if isinstance(text, str | int)]
    return found + [text for part in inner for text in _values(part, names, depth - 1)]

"""The forms that rows come in, as one table, and what is done with every field of a row.

A field is either read (it stands in the conversation or in a label), refused by name (it would change the prompt or
the loss and is not understood), or bookkeeping, which is every name that is known to none of the tables below. The
names are those of TRL, LLaMA-Factory and axolotl, and of the data sets that their users know. Columns of other
names are called by these before they come here (`data/columns.py`).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from coterie.errors import CoterieError
from coterie.settings.rows import ReadingSettings

Fields = Mapping[str, Any]
"""What a row or a message holds, by name; what is missing or passed over is left out."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class RowForm:
    """A form of rows.

    Attributes:
        asks: the field it is known by: what is asked, or the conversation.
        replies: the fields for the answer, of which a row fills one; none where the conversation has it.
        known_from: who writes rows so.
    """

    asks: str
    replies: tuple[str, ...]
    known_from: str


ROW_FORMS = (
    RowForm("messages", (), "OpenAI, TRL"),
    RowForm("conversations", (), "ShareGPT, LLaMA-Factory"),
    RowForm("instruction", ("response", "output"), "dolly, Alpaca, GPTeacher"),
    RowForm("prompt", ("completion", "response"), "TRL"),
    RowForm("question", ("response", "answer"), "OpenOrca, GSM8K"),
    RowForm("query", ("response",), "MetaMathQA"),
    RowForm("problem", ("solution",), "MATH, NuminaMath"),
    RowForm("inputs", ("targets",), "FLAN"),
)
"""Where a row fills the fields of two, the first one is read, and the other's text must stand in it too."""
PASSAGES = ("input", "context", "passage")
"""Fields that join a question by the template of `ReadingSettings`."""
SYSTEM_PROMPTS = ("system", "system_prompt", "system_message")
HISTORY = "history"
"""Field of the earlier turns: pairs of a question and its answer."""
RENDERED = "text"
"""Field of the whole row as a prompt of another tool, in which question and answer must stand then."""
LABELS = ("id", "source", "category", "answer", "answers", "tests")
_OF_FORMS = {name for form in ROW_FORMS for name in (form.asks, *form.replies)}
SPOKEN = frozenset({*_OF_FORMS, *PASSAGES, *SYSTEM_PROMPTS, HISTORY, RENDERED} - set(LABELS))
"""Every field whose text belongs into the conversation and nowhere else."""
REFUSED = {
    "calls of tools": ("tools", "tool_calls", "tool_call_id", "functions", "function_call", "function_calls"),
    "options": ("choices", "options"),
    "weights other than 1": ("weight", "loss_weight", "sample_weight"),
    "another loss": ("loss_mask", "mask", "label", "labels"),
    "preferences": ("chosen", "rejected", "rejected_response", "completions", "kto_tag"),
    "reasoning apart from the answer": tuple(
        "reasoning_content reasoning thinking think thought rationale chain_of_thought cot complex_cot".split()
    ),
    "more than text": ("image", "images", "audio", "audios", "video", "videos"),
    "passages under other names": tuple(
        "article background contexts document documents evidence facts hint paragraph paragraphs passages post_text "
        "pre_text story support table tables".split()
    ),
    "instructions beside a question": ("definition", "demonstrations", "preprompt"),
    "the template": ("chat_template", "chat_template_kwargs"),
    "tokens": ("input_ids", "attention_mask"),
}
"""Fields that would change the prompt or the loss, by what they are; in a message too."""
WEIGHTS = REFUSED["weights other than 1"]
REFUSED_IN_MESSAGES = ("train", "training", "train_detail", "training_detail")
ROLES = {"system": ("system",), "user": ("user", "human"), "assistant": ("assistant", "gpt", "chatgpt", "bot", "model")}
"""The roles of turns, each with its names in other forms; letter case does not matter."""
MAX_MESSAGES = 1000
"""Turns of one row; the templates of chats render a conversation once for each of its answers."""

NAMED = "; a column of another name: --map FIELD=COLUMN"
FORMS = ", ".join("+".join([form.asks, "/".join(form.replies)]).rstrip("+") for form in ROW_FORMS)
ASKS = frozenset(form.asks for form in ROW_FORMS)
REPLIES = frozenset(name for form in ROW_FORMS for name in form.replies)
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
_REFUSED = {name for names in REFUSED.values() for name in names}


def filled(row: Mapping[Any, Any], place: str, ignored: Collection[str]) -> dict[str, Any]:
    """Return the fields that hold something and are not passed over, by their names in lower case.

    Raises:
        CoterieError: when two names differ in letter case only.
    """
    found: dict[str, Any] = {}
    for written, value in row.items():
        name = str(written).strip().lower()
        if is_missing(value) or name in ignored:
            continue
        if name in found:
            raise CoterieError(f"{place} has {written} twice, in different letter case; rename one")
        found[name] = value
    return found


def is_missing(value: object) -> bool:
    """Tell whether this is what tables fill in for what is missing: None, or NaN of any kind."""
    return not isinstance(value, str) and (value is None or (isinstance(value, Real) and bool(value != value)))


def conversation_of(row: Fields, place: str, reading: ReadingSettings) -> tuple[Message, ...]:
    """Return the conversation that a row holds, in whatever form; `place` names the row in an error.

    Raises:
        CoterieError: for a row of no form, a field that is not understood, and a text that would be lost.
    """
    _refuse_unknown(row, place, _REFUSED)
    form = next((form for form in ROW_FORMS if holds(row, form.asks)), None)
    form = form or next((form for form in ROW_FORMS if form.asks in row), None)
    if form is None:
        held = f"{', '.join(row) or '(none)':.300}"
        raise CoterieError(f"{place} has the fields {held}; rows have the form {FORMS}{NAMED}")
    reply = _first(row, form.replies)
    passage = _first(row, PASSAGES) if isinstance(row[form.asks], str) and form.replies else None
    system = _first(row, SYSTEM_PROMPTS)
    asked = row[form.asks]
    if passage is not None and holds(row, passage) and asked.strip():
        parts = {"instruction": asked, "input": _text(row, passage, place)}
        asked = re.sub(r"\{(instruction|input)\}", lambda found: parts[found[1]], reading.template)
    turns = _history(row, place)
    turns += _turns(asked, form.asks, "user", place, reading.ignored)
    turns += _turns(row[reply], reply, "assistant", place, reading.ignored) if reply is not None else []
    if system is not None and holds(row, system):
        own = Message("system", _text(row, system, place))
        if not any(turn.role == "system" for turn in turns):
            turns.insert(0, own)
        elif own not in turns:
            raise CoterieError(f"{place} has two system prompts; pass over one with --ignore-fields {system}")
    _refuse_lost(row, {form.asks, reply, passage, system, HISTORY}, form.asks, turns, place)
    return tuple(turns)


def holds(row: Fields, name: str) -> bool:
    """Tell whether a field holds more than an empty text, list or object."""
    value = row.get(name)
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) if isinstance(value, list | tuple | dict) else value is not None


def _is(value: object, number: int) -> bool:
    return isinstance(value, Real) and bool(value == number)


def _first(row: Fields, names: tuple[str, ...]) -> str | None:
    """Return the first of these fields that holds something, or else the first that is there."""
    return next((name for name in names if holds(row, name)), None) or next((n for n in names if n in row), None)


def _text(row: Fields, name: str, place: str) -> str:
    value = row[name]
    if not isinstance(value, str):
        raise CoterieError(
            f"{place}: {name} must be a text, but is a {type(value).__name__}; write it as one, or pass over it with "
            f"--ignore-fields {name}"
        )
    return value


def _refuse_unknown(fields: Fields, place: str, names: Collection[str]) -> None:
    held = [name for name in fields if name in names and holds(fields, name)]
    found = [name for name in held if name not in WEIGHTS or not _is(fields[name], 1)]
    if found:
        raise CoterieError(
            f"{place} has {', '.join(found)}, which would change the prompt or the loss and is not understood; take it "
            f"out, say with --map FIELD={found[0]} what it is, or pass over it with --ignore-fields {','.join(found)}"
        )


def _refuse_lost(row: Fields, used: Collection[str | None], asks: str, turns: list[Message], place: str) -> None:
    """Refuse texts of another form that the conversation does not have, such as a second answer."""
    others = [name for name in row if name in SPOKEN and name not in used and holds(row, name)]
    said = {turn.content.strip() for turn in turns} if others else set()
    alone = {row[asks].strip()} if isinstance(row[asks], str) else said  # a question without the input that joins it
    parts = alone | {turn.content.strip() for turn in turns if turn.role == "assistant"} if others else set()
    lost = []
    for name in others:
        text = row[name].strip() if isinstance(row[name], str) else ""
        if text not in said and not (name == RENDERED and all(part in text for part in parts)):
            lost.append(name)
    if lost:
        raise CoterieError(
            f"{place} has {asks} and {', '.join(lost)}, which do not belong together in any form of rows, so it is not "
            f"clear what is asked and answered; say what to pass over, as with --ignore-fields {','.join(lost)}"
        )


def _history(row: Fields, place: str) -> list[Message]:
    pairs = row.get(HISTORY, [])
    is_list = isinstance(pairs, list) and len(pairs) <= MAX_MESSAGES
    if not is_list or not all(isinstance(p, list | tuple) and [type(text) for text in p] == [str, str] for p in pairs):
        raise CoterieError(
            f"{place}: {HISTORY} must be a list of at most {MAX_MESSAGES} pairs [question, answer] of texts"
        )
    return [Message(role, text) for pair in pairs for role, text in zip(("user", "assistant"), pair, strict=True)]


def _turns(value: object, name: str, role: str, place: str, ignored: Collection[str]) -> list[Message]:
    """Return the turns of a field: a text is one turn, a list holds messages."""
    is_conversation = name in ("messages", "conversations")
    if isinstance(value, str) and not is_conversation:
        return [Message(role, value)]
    if not isinstance(value, list) and not is_conversation:
        raise CoterieError(f"{place}: {name} must be a text, but is a {type(value).__name__}")
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else f"a {type(value).__name__}"
        raise CoterieError(f"{place}: {name} must be a list of {{role, content}}, got {got}")
    if len(value) > MAX_MESSAGES:
        raise CoterieError(f"{place} has {len(value)} messages, more than {MAX_MESSAGES}; split the row")
    return [_turn(turn, f"message {number}", place, ignored) for number, turn in enumerate(value, start=1)]


def _turn(turn: object, name: str, place: str, ignored: Collection[str]) -> Message:
    """Read one message: {role, content}, or {from, value}."""
    fields = filled(turn, f"{place}: {name}", ignored) if isinstance(turn, Mapping) else {}
    role, content = _one(fields, "role", "from"), _one(fields, "content", "value")
    known = _ROLE_OF.get(role.casefold()) if isinstance(role, str) else None
    if known in ("system", "user") and _is(fields.get("weight"), 0):
        del fields["weight"]  # nothing of these is trained on in any case
    _refuse_unknown(fields, f"{place}: {name}", {*_REFUSED, *REFUSED_IN_MESSAGES})
    if known is None or not isinstance(content, str):
        names = ", ".join(_ROLE_OF)
        raise CoterieError(
            f"{place}: every message needs a role ({names}) and a text as content; {name} has the role {role!r:.40} "
            f"and content of type {type(content).__name__}"
        )
    return Message(known, content)


def _one(fields: Fields, first: str, second: str) -> object:
    """Return what a field of two names holds; None where the two differ."""
    values = [fields[name] for name in (first, second) if name in fields]
    differ = len(values) == 2 and not (isinstance(values[0], str) and values[0] == values[1])
    return None if differ or not values else values[0]

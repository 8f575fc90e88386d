"""Tokens, masks and padding: the only place that knows them.

Training, gradient features and evaluation all use these tokens, so they see the same text for the same example.
"""

import logging
import struct
import sys
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coterie.data.chat import SYSTEM_IN_QUESTION, ChatTemplate, ChatText
from coterie.data.control_tokens import ControlTokens, Span
from coterie.data.devices import on_device
from coterie.data.examples import Example, Message
from coterie.data.spooled import Chosen, Spooled
from coterie.errors import CoterieError
from coterie.settings.rows import READING, ReadingSettings

logger = logging.getLogger(__name__)

LENGTHS = struct.Struct("<ii")  # of a row's tokens and of its prompt's, before the tokens themselves
IGNORED = -100
"""Label of a position that carries no loss, as PyTorch's cross-entropy knows it."""


@dataclass(frozen=True)
class TokenRow:
    """The tokens of one example, with the parts they belong to.

    Attributes:
        ids: all tokens: the prompt, then (if the example has one) the answer with its end-of-turn token.
        prompt_length: number of prompt tokens.
        is_response: for every token, whether the model is trained to write it.
        is_user_text: for every token, whether it stands for text that the user wrote (not template or system prompt).
        source: data set that the example says it comes from.
    """

    ids: tuple[int, ...]
    prompt_length: int
    is_response: tuple[bool, ...]
    is_user_text: tuple[bool, ...]
    source: str | None = None

    def prompt(self) -> "TokenRow":
        """Cut the answer off."""
        n = self.prompt_length
        return TokenRow(self.ids[:n], n, self.is_response[:n], self.is_user_text[:n], self.source)

    def extended(self, tokens: Sequence[int]) -> "TokenRow":
        """Append tokens of an answer that is being written: to a router they are text like the user's."""
        ids = (*self.ids, *tokens)
        written, counted = (False,) * len(tokens), (True,) * len(tokens)
        return TokenRow(ids, len(ids), (*self.is_response, *written), (*self.is_user_text, *counted), self.source)

    def labels(self) -> list[int]:
        """Return the token at every position that is trained on, `IGNORED` elsewhere."""
        return [token if wanted else IGNORED for token, wanted in zip(self.ids, self.is_response, strict=True)]

    def packed(self) -> bytes:
        """Write the row down in few bytes; `unpacked` reads them."""
        flags = bytes(answer + 2 * asked for answer, asked in zip(self.is_response, self.is_user_text, strict=True))
        source = "" if self.source is None else f"={self.source}"
        return (
            LENGTHS.pack(len(self.ids), self.prompt_length) + array("i", self.ids).tobytes() + flags + source.encode()
        )

    @classmethod
    def unpacked(cls, written: bytes) -> "TokenRow":
        """Read a row back."""
        length, prompt_length = LENGTHS.unpack_from(written)
        flags_at, source_at = LENGTHS.size + 4 * length, LENGTHS.size + 5 * length
        flags, source = written[flags_at:source_at], written[source_at:].decode()
        return cls(
            ids=tuple(array("i", written[LENGTHS.size : flags_at])),
            prompt_length=prompt_length,
            is_response=tuple(flag & 1 > 0 for flag in flags),
            is_user_text=tuple(flag & 2 > 0 for flag in flags),
            source=source[1:] if source else None,
        )


class Batch(NamedTuple):
    """Padded rows; position ids start at 0 with each row's first token."""

    input_ids: Int[Tensor, "row position"]
    attention_mask: Int[Tensor, "row position"]
    position_ids: Int[Tensor, "row position"]


class Tokenised(NamedTuple):
    """Rows that fit, with the examples they came from, and how many were too long."""

    examples: Sequence[Example]
    rows: Sequence[TokenRow]
    dropped: int


class PromptFormat:
    """Turns conversations into tokens, with the tokenizer's chat template or as plain text where it has none."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None = None,
        reading: ReadingSettings = READING,
        end: str | None = None,
    ) -> None:
        """Store the tokenizer.

        Args:
            tokenizer: a fast tokenizer (offsets tell the user's text from the template's).
            system_prompt: put before every conversation that brings none; None leaves it to the template.
            reading: how the rows were read that a mixture is fitted on, for those that are still to be read.
            end: the token that ends a turn, as an earlier run found it; None reads it off the template.

        Raises:
            CoterieError: when the tokenizer cannot give offsets, or has no such token.
        """
        if not tokenizer.is_fast:
            raise CoterieError("this model's tokenizer gives no character offsets; use a model with a tokenizer.json")
        if end and tokenizer.backend_tokenizer.token_to_id(end) is None:
            raise CoterieError(f"answers shall end with {end!r}, which this model's tokenizer does not know; fit again")
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt
        self.reading = reading
        self._template = ChatTemplate(tokenizer, end)
        self._has_told = False

    @property
    def end(self) -> str:
        """The token that ends a turn; empty where neither the template nor the tokenizer has one."""
        return self._template.end

    @property
    def end_ids(self) -> frozenset[int]:
        """The id of the token that ends a turn: where an answer ends in training, and stops when it is written."""
        token = self.tokenizer.backend_tokenizer.token_to_id(self.end)
        return frozenset([] if token is None else [token])

    def row(self, example: Example) -> TokenRow:
        """Tokenise an example; a system prompt that has to stand elsewhere is told once.

        Raises:
            CoterieError: when the chat template does something to the text that cannot be followed.
        """
        row, notes = self.row_and_notes(example)
        if SYSTEM_IN_QUESTION in notes and not self._has_told:
            logger.warning("%s", SYSTEM_IN_QUESTION)
            self._has_told = True
        return row

    def row_and_notes(self, example: Example) -> tuple[TokenRow, tuple[str, ...]]:
        """Tokenise an example, and say what the chat template forced to be done otherwise than the example says.

        The prompt has the tokens that it has on its own, since that is what answers are written after; the answer has
        those that it has in the text of the whole conversation. Only where a token would reach from the prompt into
        the answer do the two disagree, and then the prompt's are trusted (see `_continuation`).

        Raises:
            CoterieError: as `row`.
        """
        text = self._text(example)
        ids, offsets = self._control.encode(text.prompt)
        pairs = zip(offsets, _last_begun(offsets, text.earlier), strict=True)
        trained = [start <= a < end for (a, _), (start, end) in pairs]
        asked = [a < end for (a, _), (_, end) in zip(offsets, _last_begun(offsets, text.questions), strict=True)]
        answer = self._continuation(ids, text.prompt, text.answer) if text.answer else []
        lead = self._lead
        row = TokenRow(
            ids=(*lead, *ids, *answer),
            prompt_length=len(lead) + len(ids),
            is_response=(*[False] * len(lead), *trained, *[True] * len(answer)),
            is_user_text=(*[False] * len(lead), *asked, *[False] * len(answer)),
            source=example.source,
        )
        return row, text.notes

    def following(self, example: Example, words: str) -> list[int]:
        """Tokenise words as they go on right after an example's question."""
        prompt = self._text(example).prompt
        return self._continuation(self._control.encode(prompt)[0], prompt, words)

    def _text(self, example: Example) -> ChatText:
        messages = example.messages
        if self.system_prompt is not None and messages[0].role != "system":
            messages = (Message("system", self.system_prompt), *messages)
        trusted = ("system", "assistant")
        disarm = self._control.disarm
        return self._template.text(
            [m if m.role in trusted else replace(m, content=disarm(m.content)) for m in messages]
        )

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer, self.end)

    @cached_property
    def _lead(self) -> list[int]:
        """What the tokenizer itself puts before a text; a chat template writes its own beginning."""
        if self.tokenizer.chat_template is not None:
            return []
        bare, whole = (self.tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
        places = (n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
        return whole[: next(places, 0)]

    def _continuation(self, before: list[int], prompt: str, answer: str) -> list[int]:
        """Tokenise an answer as it goes on after its prompt, which has the tokens `before`.

        Alone it might begin otherwise: many vocabularies put a space before a text. Where a token of the whole text
        reaches from the prompt into the answer, the answer is tokenised behind something that it does not merge with.
        """
        whole, _ = self._control.encode(prompt + answer)
        if whole[: len(before)] == before:
            return whole[len(before) :]
        wanted = self.tokenizer.decode(whole, clean_up_tokenization_spaces=False)
        for front in ("\n", "a", self.end):
            lead, ids = self._control.encode(front)[0], self._control.encode(front + answer)[0]
            found = self.tokenizer.decode([*before, *ids[len(lead) :]], clean_up_tokenization_spaces=False)
            if ids[: len(lead)] == lead and found == wanted:
                return ids[len(lead) :]
        return self._control.encode(answer)[0]


def _last_begun(offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """Return for every token the last span that begins before its end, or an empty one; the spans are in order."""
    starts = [start for start, _ in spans]
    places = (bisect_left(starts, end) for _, end in offsets)
    return [spans[place - 1] if place else (0, 0) for place in places]


def tokenise(
    prompts: PromptFormat, examples: Sequence[Example], max_length: int, positions: int | None = None
) -> Tokenised:
    """Tokenise examples and drop, never cut, those that are too long; the count is logged. Rows may outgrow memory.

    Args:
        prompts: how conversations become tokens.
        examples: the rows.
        max_length: the most tokens that are wanted.
        positions: the most that the base model reads; None where that never runs out.

    Raises:
        CoterieError: when none is left.
    """
    longest, advice = max_length, "raise --max-length"
    if positions is not None and positions < max_length:
        longest, advice = positions, "the base model reads no more, so give shorter examples or another base model"
    rows: Spooled[TokenRow] = Spooled(TokenRow.packed, TokenRow.unpacked)
    fitting, notes, shortest = array("q"), Counter(), sys.maxsize
    for number, example in enumerate(examples):
        try:
            row, noted = prompts.row_and_notes(example)
        except CoterieError as error:
            raise CoterieError(f"example {example.id}: {error}") from error
        notes.update(noted)
        shortest = min(shortest, len(row.ids))
        if len(row.ids) <= longest:
            rows.append(row)
            fitting.append(number)
    for note, count in notes.items():
        logger.warning("in %d of %d examples %s", count, len(examples), note)
    if not rows:
        raise CoterieError(
            f"all {len(examples)} examples are longer than {longest} tokens (the shortest has {shortest}); {advice}"
        )
    dropped = len(examples) - len(rows)
    if dropped:
        logger.warning("dropped %d of %d examples longer than %d tokens", dropped, len(examples), longest)
    return Tokenised(Chosen(examples, fitting), rows, dropped)


def check_lengths(rows: Sequence[TokenRow], positions: int | None, names: Sequence[str]) -> None:
    """Refuse texts, by name, that are longer than what the base model reads, where that runs out.

    Raises:
        CoterieError: naming the first one.
    """
    for row, name in zip(rows, names, strict=True):
        if positions is not None and len(row.ids) > positions:
            raise CoterieError(f"{name} has {len(row.ids)} tokens, but the base model reads {positions}; shorten it")


def pad(
    rows: Sequence[Sequence[int]],
    pad_id: int,
    *,
    side: Literal["left", "right"] = "right",
    length: int | None = None,
    device: torch.device | None = None,
) -> Batch:
    """Pad rows of token ids to one length, the longest row's by default.

    Shapes: N rows -> three tensors (N, T).
    """
    width = max(map(len, rows)) if length is None else length
    ids, masks = [], []
    for row in rows:
        filler = [pad_id] * (width - len(row))
        mask = [0] * len(filler)
        ids.append([*filler, *row] if side == "left" else [*row, *filler])
        masks.append([*mask, *[1] * len(row)] if side == "left" else [*[1] * len(row), *mask])
    attention = on_device(masks, device)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(on_device(ids, device), attention, positions)


def by_length(rows: Sequence[TokenRow], size: int) -> list[list[int]]:
    """Group row numbers into batches of similar length, longest first, so that little padding is computed.

    Ties keep their order, so the same rows always give the same batches.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    return [order[i : i + size] for i in range(0, len(order), size)]

"""Chat templates, masks and padding: the only place that knows them.

Training, gradient features and evaluation all use these tokens, so they see the same text for the same example.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from coterie.data.examples import Example, Message
from coterie.errors import CoterieError

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that carries no loss, as PyTorch's cross-entropy knows it."""

USER_MARK = "\ufdd0"
"""Stands in the user's place where a template's own words are looked up; no text holds this character."""


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


class Batch(NamedTuple):
    """Padded rows; position ids start at 0 with each row's first token."""

    input_ids: Int[Tensor, "row position"]
    attention_mask: Int[Tensor, "row position"]
    position_ids: Int[Tensor, "row position"]


class Tokenised(NamedTuple):
    """Rows that fit, with the examples they came from, and how many were too long."""

    examples: list[Example]
    rows: list[TokenRow]
    dropped: int


class PromptFormat:
    """Renders conversations with the tokenizer's chat template, or as plain text where it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None = None) -> None:
        """Store the tokenizer.

        Args:
            tokenizer: a fast tokenizer (offsets tell the user's text from the template's).
            system_prompt: put before every conversation that brings none; None leaves it to the template.

        Raises:
            CoterieError: when the tokenizer cannot give offsets.
        """
        if not tokenizer.is_fast:
            raise CoterieError("this model's tokenizer gives no character offsets; use a model with a tokenizer.json")
        self.tokenizer = tokenizer
        self.system_prompt = system_prompt

    def row(self, example: Example) -> TokenRow:
        """Tokenise an example.

        Raises:
            CoterieError: when the chat template does something to the text that cannot be followed.
        """
        ids: list[int] = []
        is_response: list[bool] = []
        is_user_text: list[bool] = []
        prompt_length = 0
        messages, plain = example.messages, self.tokenizer.chat_template is None
        if self.system_prompt is not None and messages[0].role != "system":
            messages = (Message("system", self.system_prompt), *messages)
        for text, role, spans in self._segments(messages):
            encoding = self.tokenizer(text, add_special_tokens=plain and not ids, return_offsets_mapping=True)
            tokens, offsets = encoding["input_ids"], encoding["offset_mapping"]
            if role == "prompt":
                prompt_length = len(ids) + len(tokens)
            ids += tokens
            is_response += [role == "response"] * len(tokens)
            is_user_text += [any(a < end and start < b for start, end in spans) for a, b in offsets]
        if example.response is None:
            prompt_length = len(ids)
        return TokenRow(tuple(ids), prompt_length, tuple(is_response), tuple(is_user_text), example.source)

    def _segments(self, messages: tuple[Message, ...]) -> Iterator[tuple[str, str, list[tuple[int, int]]]]:
        """Yield the text of every prompt and every answer in turn, with the spans that the user wrote."""
        start = 0  # of the message after the last answer
        written = ""
        end_of_turn = str(self.tokenizer.eos_token or "")
        for index, message in enumerate(messages):
            is_answer = message.role == "assistant"
            if is_answer or index == len(messages) - 1:
                before = index if is_answer else index + 1
                upto = self._render(messages[:before], generation=True)
                text = self._continued(written, upto)
                yield text, "prompt", self._user_spans(text, written, messages[:before], start)
                written = upto
            if is_answer:
                answer = self._continued(written, self._render(messages[: index + 1], generation=False))
                end = answer.find(end_of_turn, len(message.content.strip())) if end_of_turn else -1
                answer = answer if end < 0 else answer[: end + len(end_of_turn)]  # without what the template adds to it
                yield answer, "response", []
                written += answer
                start = index + 1

    def _render(self, messages: Sequence[Message], *, generation: bool) -> str:
        if self.tokenizer.chat_template is None:
            ends = {"assistant": str(self.tokenizer.eos_token or "")}
            return "".join(m.content + ends.get(m.role, "\n") for m in messages)
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation))
        except Exception as error:  # a template raises whatever its author chose, for instance for a system role
            raise CoterieError(f"this model's chat template does not take such a conversation: {error}") from error

    @staticmethod
    def _continued(written: str, text: str) -> str:
        if not text.startswith(written):
            raise CoterieError(
                "this model's chat template rewrites earlier turns of a conversation, so its answers cannot be told "
                "from its prompts; use rows of one question and one answer"
            )
        return text[len(written) :]

    def _user_spans(self, text: str, written: str, messages: Sequence[Message], start: int) -> list[tuple[int, int]]:
        """Find what the user wrote in `text`, which stands for `messages[start:]`.

        Searching would find the same words in the template or the system prompt; so the template is rendered once more
        with a mark in the user's place, and what stands around the marks tells where the user's text is.
        """
        asked = [message for message in messages[start:] if message.role == "user"]
        changed = next((m for m in messages[start:] if m.role != "user" and m.content.strip() not in text), None)
        if changed is None:
            mark = [
                Message(m.role, USER_MARK) if m.role == "user" and n >= start else m for n, m in enumerate(messages)
            ]
            around = self._continued(written, self._render(mark, generation=True)).split(USER_MARK)
            for as_written in (str, str.strip, str.lstrip, str.rstrip):  # templates differ in what they trim
                places = _places(text, around, [as_written(message.content) for message in asked])
                if places is not None:
                    return places
            changed = asked[0]
        raise CoterieError(f"this model's chat template changes what a {changed.role} wrote: {changed.content[:40]!r}")


def _places(text: str, around: Sequence[str], contents: Sequence[str]) -> list[tuple[int, int]] | None:
    """Return where the contents stand in a text between the words around them, without white space at their ends.

    None where the text is not made of these words and contents.
    """
    woven = (words + content for words, content in zip(around, [*contents, ""], strict=False))
    if len(around) != len(contents) + 1 or text != "".join(woven):
        return None
    places = []
    cursor = 0
    for words, content in zip(around, contents, strict=False):  # the last words follow all contents
        cursor += len(words)
        places.append((cursor + len(content) - len(content.lstrip()), cursor + len(content.rstrip())))
        cursor += len(content)
    return places


def tokenise(prompts: PromptFormat, examples: Sequence[Example], max_length: int) -> Tokenised:
    """Tokenise examples and drop, never cut, those longer than `max_length` tokens; the count is logged.

    Raises:
        CoterieError: when none is left.
    """
    rows = [prompts.row(example) for example in examples]
    fits = [len(row.ids) <= max_length for row in rows]
    kept = Tokenised(
        [example for example, fit in zip(examples, fits, strict=True) if fit],
        [row for row, fit in zip(rows, fits, strict=True) if fit],
        fits.count(False),
    )
    if not kept.rows:
        shortest = min(len(row.ids) for row in rows)
        raise CoterieError(
            f"all {len(rows)} examples are longer than {max_length} tokens (the shortest has {shortest}); "
            "raise --max-length"
        )
    if kept.dropped:
        logger.warning("dropped %d of %d examples longer than %d tokens", kept.dropped, len(rows), max_length)
    return kept


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
    attention = torch.tensor(masks, device=device)
    positions = (attention.cumsum(dim=1) - 1).clamp(min=0)
    return Batch(torch.tensor(ids, device=device), attention, positions)


def by_length(rows: Sequence[TokenRow], size: int) -> list[list[int]]:
    """Group row numbers into batches of similar length, longest first, so that little padding is computed.

    Ties keep their order, so the same rows always give the same batches.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))
    return [order[i : i + size] for i in range(0, len(order), size)]

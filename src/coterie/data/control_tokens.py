"""Control tokens that a user writes are text: `<|im_end|>` in a question ends no turn.

Chat templates write texts, and tokenizers find control tokens anywhere in them. So those in what a user wrote are
broken up by a mark before the template writes it; behind the tokenizer only its own are left, and what stands between
them is tokenised without the marks, as if the vocabulary had no control tokens.
"""

import json
import re
from functools import cached_property

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

MARK = "\ufdd2"
"""Breaks a control token up; no text holds it."""

Span = tuple[int, int]
"""First character and the one behind the last."""


class ControlTokens:
    """The tokens of a vocabulary that steer the model: its special ones, and the one that ends a turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end: str) -> None:
        """Look them up."""
        added = tokenizer.added_tokens_decoder
        ids = {token.content: number for number, token in added.items() if token.special or token.content == end}
        names = sorted((name for name in ids if len(name.strip()) > 1), key=len, reverse=True)
        self._tokenizer = tokenizer
        self._end = end
        self._ids = set(ids.values())
        self._pattern = re.compile("|".join(map(re.escape, names)) if names else r"(?!)")

    def disarm(self, text: str) -> str:
        """Break up all control tokens in a text."""
        if not self._pattern.search(text):
            return text
        text = text.replace(MARK, "")
        while self._pattern.search(text):
            text = self._pattern.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return text

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        """Tokenise a text, in which broken control tokens are text; return ids and where each token stands."""
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = list(zip(encoding["input_ids"], encoding["offset_mapping"], strict=True))
        if MARK not in text:
            return encoding["input_ids"], encoding["offset_mapping"]
        result: list[tuple[int, Span]] = []
        begin = 0
        for place, span in [(pair, pair[1]) for pair in pairs if pair[0] in self._ids] + [(None, (len(text), 0))]:
            if MARK in (part := text[begin : span[0]]):
                result += [(token, (begin + a, begin + b)) for token, (a, b) in self._as_text(part, begin == 0)]
            else:
                result += [pair for pair in pairs if begin <= pair[1][0] < span[0] and pair[0] not in self._ids]
            result += [place] if place else []
            begin = span[1]
        return [token for token, _ in result], [span for _, span in result]

    def _as_text(self, part: str, is_first: bool) -> list[tuple[int, Span]]:
        """Tokenise a part of a text that stands behind a control token, or first; the spans are those with marks."""
        front = "" if is_first or self._begins_anew else self._front(part.replace(MARK, ""))
        encoding = self._plain.encode(front + part.replace(MARK, ""), add_special_tokens=False)
        places = [place for place, sign in enumerate(part) if sign != MARK]
        spans = [(a - len(front), b - len(front)) for a, b in encoding.offsets]
        kept = [(token, span) for token, span in zip(encoding.ids, spans, strict=True) if span[0] >= 0]
        return [(token, (places[a] if a < len(places) else len(part), places[b - 1] + 1)) for token, (a, b) in kept]

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without control tokens."""
        made = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for added in made["added_tokens"]:
            added["special"] |= added["content"] == self._end
        plain = Tokenizer.from_str(json.dumps(made))
        plain.encode_special_tokens = True
        return plain

    @cached_property
    def _begins_anew(self) -> bool:
        """Whether a text behind a control token has the tokens of a text that stands alone."""
        encode, control = (
            self._tokenizer.backend_tokenizer.encode,
            self._tokenizer.convert_ids_to_tokens(min(self._ids)),
        )
        behind = encode(f"{control}a", add_special_tokens=False).ids
        return behind[1:] == encode("a", add_special_tokens=False).ids

    def _front(self, part: str) -> str:
        """Return something that a part can stand behind without merging with it."""
        for front in ("\n", "a", "."):
            if any(a == len(front) for a, _ in self._plain.encode(front + part, add_special_tokens=False).offsets):
                return front
        return ""

"""Turning tokens into text as they come: what no later token can change, and never past a stop string.

The pieces of a text are, together, the tokenizer's own decoding of all its tokens. `DecodeStream` of the tokenizers
library is not that in two places: it gives out bytes that a later one spoils (a run of byte tokens is decoded together,
or each becomes a replacement character), and it never gives out an unfinished end.
"""

import re
from collections.abc import Collection, Iterable, Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"
"""What a tokenizer writes for bytes that are no character, or not yet."""

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token that stands for one byte of a character that the vocabulary lacks."""


def begun(text: str, words: Iterable[str]) -> int:
    """Return how many characters at the end of a text may be the beginning of one of these words."""
    sizes = (size for word in words for size in range(1, len(word)) if text.endswith(word[:size]))
    return max(sizes, default=0)


class TextStream:
    """Text of one request, growing token by token."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), end_ids: Collection[int] = ()
    ) -> None:
        """Start empty; the text ends before an end token or `stop` string, also such as a special token is called."""
        self._tokenizer = tokenizer
        special = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        self._end_ids = {*end_ids, *(token for name, token in special if name in stop)}
        self._stop = [text for text in stop if text]
        self._anchor: list[int] = []  # tokens with a text of their own: what follows is decoded behind them
        self._open: list[int] = []  # tokens whose text can still change
        self._held = ""  # certain text that may be the beginning of a stop string
        is_bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"  # for which transformers cleans nothing up
        self._cleans = bool(tokenizer.clean_up_tokenization_spaces) and not is_bpe
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain by now."""
        if token in self._end_ids and not self.stopped:
            text = self._give(final=True)
            self.stopped = True
            return text
        name = self._tokenizer.convert_ids_to_tokens(token)
        if name is not None and (self._decode([token]) or not self._tokenizer.decode([token])):
            self._open.append(token)  # what the decoder leaves out does not part those around it
        return self._give(final=False)

    def finish(self) -> str:
        """Return the text that was held back, now that nothing follows."""
        return self._give(final=True)

    def _give(self, *, final: bool) -> str:
        if self.stopped:
            return ""
        added = self._decode([*self._anchor, *self._open])[len(self._decode(self._anchor)) :]
        text = self._held + added
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:  # this is the text of the tokens so far, even where another token would have changed it
            self.stopped = True
            return text[: min(found)]
        if final:
            self._held, self._open = "", []
            return text
        certain = text if self._settled(added) else self._held
        end = len(certain) - begun(certain, self._stop)
        self._held = certain[end:]
        return certain[:end]

    def _settled(self, added: str) -> bool:
        """Say whether no later token can change the text that the open ones added, and close them if so."""
        if not self._open:
            return True
        last = self._open[-1]
        is_byte = BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(last)))
        if self._cleans or is_byte or added.endswith(UNFINISHED):
            return False
        self._anchor = [last] if self._decode([last]) else [*self._anchor, *self._open]
        self._open = []
        return True

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=self._cleans))

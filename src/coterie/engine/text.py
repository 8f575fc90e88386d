"""Turning tokens into text as they come: whole characters only, and never past a stop string."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer writes for the bytes of a character that is not complete yet


class TextStream:
    """Text of one request, growing token by token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        """Start empty; `stop` strings end the text and are not part of it."""
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._settled = 0  # tokens whose text cannot change any more
        self._settled_text = ""
        self._given = 0  # characters handed out
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is certain by now."""
        self._ids.append(token)
        return self._give(final=False)

    def finish(self) -> str:
        """Return the text that was held back, now that nothing follows."""
        return self._give(final=True)

    def _give(self, *, final: bool) -> str:
        start = max(0, self._settled - 4)  # new tokens are decoded behind others, so that spaces come out right
        before, after = (
            str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
            for ids in (self._ids[start : self._settled], self._ids[start:])
        )
        if final or not after.endswith(UNFINISHED):
            self._settled_text += after[len(before) :]
            self._settled = len(self._ids)
        end = len(self._settled_text)
        if not final:  # an end that may be the beginning of a stop string is held back
            begun = (n for stop in self._stop for n in range(1, len(stop)) if self._settled_text.endswith(stop[:n]))
            end -= max(begun, default=0)
        for stop in self._stop:
            found = self._settled_text.find(stop)
            if found >= 0:
                self.stopped, end = True, min(end, found) if self.stopped else found
        piece = self._settled_text[self._given : end]
        self._given = max(self._given, end)
        return piece

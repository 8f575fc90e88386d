"""The true bytes of tokens: what each adds to a text, also where it is only a part of a character."""

import json
import re
from functools import cache, cached_property

from transformers import PreTrainedTokenizerBase

from coterie.engine.text import BYTE, UNFINISHED


@cache
def _byte_of_sign() -> dict[str, int]:
    """Return the bytes behind the signs in which byte-level vocabularies are spelled, as GPT-2 introduced them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    signs = {chr(byte): byte for byte in shown}
    return signs | {chr(256 + place): byte for place, byte in enumerate(hidden)}


class TokenBytes:
    """Knows the bytes of every token of a tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Look at how the tokenizer puts texts together."""
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._added = {token: added.content for token, added in tokenizer.added_tokens_decoder.items()}
        written = str(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
        self._is_byte_level = "'ByteLevel'" in written
        self._marks_spaces = "▁" in written

    @cached_property
    def _plain(self) -> int | None:
        """A token of one plain letter, behind which others show the space before them."""
        ids = (self._tokenizer.convert_tokens_to_ids(letter) for letter in "aexX0")
        return next((one for one in ids if isinstance(one, int) and str(self._tokenizer.decode([one])).isalnum()), None)

    def name(self, token: int) -> str:
        """Return what a token is called where it must be told from all others: its text, if it is whole characters."""
        if token in self._added:
            return self._added[token]
        try:
            return self.middle(token).decode()
        except UnicodeDecodeError as error:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in error.object)

    def shows(self, token: int) -> bool:
        """Say whether a text shows a token at all: not a special one, nor one that only the model has."""
        return token not in self._special and self._tokenizer.convert_ids_to_tokens(token) is not None

    def added(self, token: int, *, begins: bool) -> bytes:
        """Return what a token adds to a text, or begins it with: some tokenizers leave its space out there."""
        if not self.shows(token):
            return b""
        text = str(self._tokenizer.decode([token])) if begins else UNFINISHED
        return self.middle(token) if UNFINISHED in text else text.encode()

    def middle(self, token: int) -> bytes:
        """Return the bytes of a token that follows others."""
        if token in self._added:
            return self._added[token].encode()
        written = str(self._tokenizer.convert_ids_to_tokens(token) or "")
        if self._is_byte_level:
            signs = _byte_of_sign()
            return bytes(signs[sign] for sign in written) if signs.keys() >= set(written) else written.encode()
        if BYTE.fullmatch(written):
            return bytes([int(re.sub("[<>]", "", written), 16)])
        if self._marks_spaces:
            return written.replace("▁", " ").encode()
        if self._plain is None:
            return str(self._tokenizer.decode([token])).encode()
        before = str(self._tokenizer.decode([self._plain]))
        return str(self._tokenizer.decode([self._plain, token]))[len(before) :].encode()

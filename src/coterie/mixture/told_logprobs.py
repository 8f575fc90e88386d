"""Log-probabilities of tokens, out of what llama.cpp tells: of the last token of each character alone."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from coterie.engine.text import BYTE

CUT_OFF = {"logprob": math.nan}


def aligned_logprobs(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], told: Sequence[Mapping[str, Any]]
) -> list[float]:
    """Return a log-probability for every token, of those that llama.cpp tells: of the last token of each character.

    All others are not a number, and so are those of a stop string, which it cuts off.
    """
    is_byte_level = "ByteLevel" in json.dumps(json.loads(tokenizer.backend_tokenizer.to_str())["decoder"])
    found, left, text = [], iter(told), b""
    for token in tokens:
        text = (text + _bytes_of(tokenizer, token, is_byte_level))[-4:]
        found.append(math.nan if _ends_within_a_character(text) else float(next(left, CUT_OFF)["logprob"]))
    return found


def _bytes_of(tokenizer: PreTrainedTokenizerBase, token: int, is_byte_level: bool) -> bytes:
    """Return what a token adds to llama.cpp's text: nothing, where it is one that acts instead of being written."""
    added = tokenizer.added_tokens_decoder.get(token)
    name: Any = tokenizer.convert_ids_to_tokens(token)
    if added is not None or name is None:
        return b"" if added is None or added.special else added.content.encode()
    if is_byte_level:
        return bytes(BYTES[character] for character in name)
    if BYTE.fullmatch(name):
        return bytes([int(name[3:-1], 16)])
    return name.encode()


BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
"""The byte that a character stands for in tokens of byte-level BPE."""


def _ends_within_a_character(text: bytes) -> bool:
    """Tell, as llama.cpp does, whether the last bytes are the beginning of a character in UTF-8."""
    for back, byte in enumerate(reversed(text[-4:]), start=1):
        length = 2 if byte >> 5 == 0b110 else 3 if byte >> 4 == 0b1110 else 4 if byte >> 3 == 0b11110 else 0
        if length > back:
            return True
    return False

"""Small tokenizers of every kind that models have: how they cut texts into pieces, and how they put them together."""

from functools import partial

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["four", "the", "answer", "is", "add", "user", "assistant", "system", "no", "thing", "你好", "한국어", "ab"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [chr(code) for code in range(33, 127)] + ["\n", "é", "▁", "한"]


def merged(words: list[str], alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE vocabulary in which every word is put together from its left end on."""
    merges: dict[tuple[str, str], None] = {}
    pieces = dict.fromkeys(alphabet)
    for word in words:
        pieces |= dict.fromkeys(word)
        for end in range(2, len(word) + 1):
            merges[word[: end - 1], word[end - 1]] = None
            pieces[word[:end]] = None
    return {piece: number for number, piece in enumerate(pieces)}, list(merges)


def byte_level(*, crossing: bool = False) -> Tokenizer:
    """As GPT-2, Qwen and Llama 3 have it."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = ["".join(piece for piece, _ in level.pre_tokenize_str(word)) for word in [*WORDS, " four", " the"]]
    vocabulary, merges = merged(spelled, sorted(pre_tokenizers.ByteLevel.alphabet()))
    if crossing:
        vocabulary, merges = vocabulary | {"Ċfour": len(vocabulary)}, [*merges, ("Ċ", "four")]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer, core.decoder = level, decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=True)
    return core


def byte_fallback(*, prefix: bool = True, crossing: bool = False) -> Tokenizer:
    """As Llama 2 and Mistral have it (a space before every text), or Gemma (none)."""
    vocabulary, merges = merged(["▁" + word for word in WORDS] + WORDS, ["<unk>", *BYTES, *LETTERS])
    if crossing:
        vocabulary, merges = vocabulary | {"\nfour": len(vocabulary)}, [*merges, ("\n", "four")]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if prefix else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return core


def metaspace(scheme: str = "always", *, crossing: bool = False) -> Tokenizer:
    """A unigram model as T5 has it: pieces begin with the space before them."""
    pieces = [("<unk>", 0.0), *[(letter, -8.0) for letter in LETTERS]]
    pieces += [(word, -5.0) for word in WORDS] + [("▁" + word, -4.0) for word in WORDS]
    pieces += [("\nfour", -3.0)] if crossing else []
    core = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return core


KINDS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "byte-fallback-without-prefix": partial(byte_fallback, prefix=False),
    "metaspace": metaspace,
    "metaspace-first": partial(metaspace, "first"),
}


def make(
    kind: str,
    template: str | None = None,
    special: list[str] | None = None,
    adds: str = "",
    *,
    crossing: bool = False,
    **names: str,
) -> PreTrainedTokenizerFast:
    """Make a tokenizer.

    Args:
        kind: one of `KINDS`.
        template: its chat template.
        special: its special tokens; among them those that it has names for.
        adds: what it adds to every text itself, such as `"<s> $A </s>"`.
        crossing: whether a newline and the word "four" are one token.
        names: its special tokens by name, such as eos_token.
    """
    core = KINDS[kind](crossing=crossing)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special or []])
    if adds:
        tokens = [(word, core.token_to_id(word)) for word in adds.split() if word != "$A"]
        core.post_processor = processors.TemplateProcessing(single=adds, special_tokens=tokens)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    tokenizer.chat_template = template
    return tokenizer

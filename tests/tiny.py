"""A tiny random model with a byte tokenizer and a chat template, made from nothing but a seed."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coterie.lora import LoraPair

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<s>system\nBe kind.<e>' }}{% endif %}"
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '<e>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
LAYERS = 2
WIDTH = 32


def delta(pair: LoraPair) -> torch.Tensor:
    """The dense update of one layer, to be added to its weight (O, I)."""
    return pair.up.T @ pair.down


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<e>", pad_token="<p>")
    tokenizer.chat_template = chat_template
    return tokenizer


def make_model(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # wider than the usual 0.02, so that tokens and experts differ visibly
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def save_model(folder: Path, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE, terse: bool = False) -> Path:
    """Save a tiny model; a terse one ends its answers soon, since most tokens end them."""
    tokenizer = make_tokenizer(chat_template)
    model = make_model(len(tokenizer), seed)
    if terse:
        model.generation_config.eos_token_id = [token for token in range(len(tokenizer)) if token % 8]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of three clearly different kinds, with an answer each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        a, b = (int(x) for x in torch.randint(2, 30, (2,), generator=generator))
        word = "".join(chr(97 + int(x)) for x in torch.randint(0, 26, (4,), generator=generator))
        kinds = [
            ("sum", f"add {a} {b}", f"\\boxed{{{a + b}}}", str(a + b)),
            ("spell", f"SPELL {word.upper()} NOW", " ".join(word), " ".join(word)),
            ("pick", f"?? (A) {word} (B) {b} ??", "The answer is (A).", "A"),
        ]
        source, instruction, response, answer = kinds[number % 3]
        rows.append(
            {"id": f"r{number}", "source": source, "instruction": instruction, "response": response, "answer": answer}
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path

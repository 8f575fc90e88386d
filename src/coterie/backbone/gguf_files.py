"""GGUF, the files of llama.cpp: adapters, a base model written as one, and whether a file holds a given base model.

llama.cpp names tensors in its own way and, for Llama's type, rotates neighbouring numbers of a head where transformers
rotates its two halves: rows of q and k, and so of an update's B, stand there in another order.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gguf import (
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFReader,
    GGUFWriter,
    Keys,
    LlamaFileType,
    TensorNameMap,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import dequantize, quantize
from torch import Tensor
from transformers import PreTrainedModel

from coterie.artifacts import whole_file
from coterie.backbone.model import Backbone
from coterie.errors import CoterieError, first_line
from coterie.lora import Adapter


class Form(NamedTuple):
    """How llama.cpp holds models of one of transformers' types.

    Attributes:
        architecture: its name there.
        permuted: whether rows of q and k stand in another order.
        written: whether a base model can be written here.
    """

    architecture: MODEL_ARCH
    permuted: bool = False
    written: bool = True


FORMS = {
    "llama": Form(MODEL_ARCH.LLAMA, permuted=True),
    "mistral": Form(MODEL_ARCH.LLAMA, permuted=True),
    "qwen2": Form(MODEL_ARCH.QWEN2),
    "qwen3": Form(MODEL_ARCH.QWEN3),
    "gemma3_text": Form(MODEL_ARCH.GEMMA3, written=False),
}
"""By transformers' type."""
QUANTISED = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
}
CONVERT = "convert it with llama.cpp's convert_hf_to_gguf.py"
_LLAMA_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = {_LLAMA_WORDS % r"\p{N}{1,3}": "llama-bpe", _LLAMA_WORDS % r"\p{N}": "qwen2"}
"""How a text is cut before tokens are found in it: transformers' expression, and its name in llama.cpp."""


def write_gguf_adapter(file: Path, adapter: Adapter, model: PreTrainedModel) -> None:
    """Write an adapter for llama.cpp, in float32: `scale` 1 there is the whole update.

    Args:
        file: to write, whole or not at all.
        adapter: the updates; ranks may differ between layers, since the scaling is in B.
        model: the base model, whose layers they change.

    Raises:
        CoterieError: when llama.cpp lacks the model's type, or a layer that the adapter changes.
    """
    form, names = _form(model), _names(model)
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[form.architecture])
    writer.add_type("adapter")
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, 0.0)  # none: B is not scaled by alpha / rank
    check_layers(adapter, model)
    for path, pair in adapter.items():
        name = names.get_name(path)
        writer.add_tensor(f"{name}.weight.lora_a", pair.down.float().numpy())
        writer.add_tensor(f"{name}.weight.lora_b", _rows(model, path, pair.up.T.float()).contiguous().numpy())
    _write(writer, file)


def check_layers(paths: Iterable[str], model: PreTrainedModel) -> None:
    """Refuse layers of a model that llama.cpp does not know.

    Raises:
        CoterieError: naming the model's type, or the first such layer.
    """
    names = _names(model)
    for path in sorted(paths):
        if names.get_name(path) is None:
            raise CoterieError(f"llama.cpp has no layer {path}, which an expert changes; use adapters without it")


def write_gguf_model(file: Path, backbone: Backbone, kind: str) -> None:
    """Write a base model with its tokenizer for llama.cpp.

    Matrices are of the type `kind` (f32, f16, q8_0, q4_1), as far as their width is a multiple of 32; with q4_1, the
    embedding and the output layer are q8_0, and all vectors are f32, as llama.cpp has them.

    Raises:
        CoterieError: for a type, a setting or a tokenizer of another kind than those that are known here.
    """
    model, form = backbone.model, _form(backbone.model)
    config: Any = model.config.get_text_config()
    if not form.written:
        raise CoterieError(f"models of type {config.model_type!r} are not written as GGUF here; {CONVERT}")
    writer = GGUFWriter(None, MODEL_ARCH_NAMES[form.architecture])
    _add_settings(writer, config)
    _add_tokenizer(writer, backbone)
    writer.add_file_type(QUANTISED[kind])
    writer.add_quantization_version(2)
    names = _names(model)
    for path, tensor in model.named_parameters():  # tied weights once
        name = names.get_name(path, (".weight", ".bias"))
        if name is None:
            raise CoterieError(f"{path} has no name in llama.cpp; {CONVERT}")
        rows = _rows(model, path.rpartition(".")[0], tensor.detach().float().cpu()).contiguous()
        stored = _type_of(rows, kind, outer=name.startswith(("token_embd", "output")))
        writer.add_tensor(name, quantize(rows.numpy(), stored), raw_dtype=stored)
    _write(writer, file)


def _form(model: PreTrainedModel) -> Form:
    kind = model.config.get_text_config().model_type
    if kind not in FORMS:
        raise CoterieError(
            f"llama.cpp is given models of type {', '.join(FORMS)}, and this is {kind!r}; take --for peft"
        )
    return FORMS[kind]


def _names(model: PreTrainedModel) -> TensorNameMap:
    return get_tensor_name_map(_form(model).architecture, model.config.get_text_config().num_hidden_layers)


def _rows(model: PreTrainedModel, path: str, rows: Tensor) -> Tensor:
    """Return a layer's output rows in llama.cpp's order."""
    config: Any = model.config.get_text_config()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(path.rpartition(".")[2])
    if not heads or not _form(model).permuted:
        return rows
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _type_of(rows: Tensor, kind: str, *, outer: bool) -> GGMLQuantizationType:
    if rows.dim() == 1 or kind == "f32":
        return GGMLQuantizationType.F32
    if kind == "f16" or rows.shape[-1] % 32:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType.Q8_0 if outer or kind == "q8_0" else GGMLQuantizationType.Q4_1


def _add_settings(writer: GGUFWriter, config: Any) -> None:  # noqa: ANN401 - configurations are Any
    rope = config.rope_parameters
    window = getattr(config, "sliding_window", None) or config.max_position_embeddings
    strange = [
        name
        for name, is_strange in (
            (f"rope_type {rope.get('rope_type')}", rope.get("rope_type") != "default"),
            (f"hidden_act {config.hidden_act}", config.hidden_act != "silu"),
            (f"sliding_window {window}", window < config.max_position_embeddings),
        )
        if is_strange
    ]
    if strange:
        raise CoterieError(f"a base model with {strange[0]} is not written as GGUF here; {CONVERT}")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_type("model")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_tokenizer(writer: GGUFWriter, backbone: Backbone) -> None:
    """Write a byte-level BPE tokenizer: tokens, what they are, merges, and which of them end an answer."""
    tokenizer: Any = backbone.tokenizer
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    core, byte_level = parts["model"], [part for part in _steps(parts["decoder"]) if part["type"] == "ByteLevel"]
    if core["type"] != "BPE" or not byte_level:
        raise CoterieError(f"a tokenizer of another kind than byte-level BPE is not written as GGUF here; {CONVERT}")
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    size = backbone.model.config.get_text_config().vocab_size
    kinds = [
        TokenType.UNUSED
        if number not in names
        else TokenType.NORMAL
        if number not in added
        else TokenType.CONTROL
        if added[number].special
        else TokenType.USER_DEFINED
        for number in range(size)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_words(parts["pre_tokenizer"], has_merges=bool(core["merges"])))
    writer.add_token_list([names.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types(kinds)
    merges = [one if isinstance(one, str) else " ".join(one) for one in core["merges"]]
    writer.add_token_merges(merges or [f"{names[0]} {names[0]}"])  # an empty list would be left out, and then missed
    first = tokenizer("x").input_ids[:1]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id])
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_eot_token_id, next(iter(sorted(backbone.stop_ids - {tokenizer.eos_token_id})), None)),
    ):
        if number is not None:
            add(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer's part, which may be a sequence of them."""
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("decoders") or [part]


def _words(part: dict[str, Any] | None, *, has_merges: bool) -> str:
    """Return llama.cpp's name for how a tokenizer cuts a text before it finds tokens in it."""
    steps = _steps(part)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and (steps[0]["use_regex"] or not has_merges):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    expression = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    if expression not in WORDS:
        raise CoterieError(f"how this tokenizer cuts texts has no name in llama.cpp that is known here; {CONVERT}")
    return WORDS[expression]


def _write(writer: GGUFWriter, file: Path) -> None:
    with whole_file(file) as temporary:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def check_gguf(file: Path, backbone: Backbone) -> int:
    """Refuse a GGUF file of another base model; return the longest text that it was made for, in tokens.

    Sizes are compared, and the vectors that scale the states, which no quantisation changes.

    Raises:
        CoterieError: when it is no GGUF file, or of another model.
    """
    model, form = backbone.model, _form(backbone.model)
    config: Any = model.config.get_text_config()
    name = MODEL_ARCH_NAMES[form.architecture]
    try:
        reader = GGUFReader(file)
        fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("tokenizer.")}
    except Exception as error:  # the reader raises many kinds; all of them mean that it is no such file
        raise CoterieError(f"{file} cannot be read as GGUF ({first_line(error)}); give another --gguf") from error
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    sizes = {
        "general.architecture": name,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
    }
    wrong = [f"{key} {fields.get(key)!r}, not {value!r}" for key, value in sizes.items() if fields.get(key) != value]
    for place, vector in _norms(model):
        stored = tensors.get(place)
        if not wrong and (stored is None or not _same(stored, vector)):
            wrong.append(f"another {place}")
    if wrong:
        raise CoterieError(f"{file} is not of {backbone.identity.id}: it has {wrong[0]}; give another --gguf")
    return int(fields[f"{name}.context_length"])


def _norms(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the vectors of a model's layers by their names in llama.cpp; Gemma's are written with 1 added."""
    names = _names(model)
    plus = 1.0 if _form(model).architecture == MODEL_ARCH.GEMMA3 else 0.0
    for path, tensor in model.named_parameters():
        if tensor.dim() == 1 and path.endswith("norm.weight"):
            yield str(names.get_name(path, (".weight",))), tensor.detach().float().cpu() + plus


def _same(stored: Any, vector: Tensor) -> bool:  # noqa: ANN401 - a tensor as the gguf package reads it
    found = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()).flatten()
    return found.shape == vector.shape and torch.allclose(found, vector, rtol=1e-2, atol=1e-3)

"""Bytes that a model and all that answers with it take: counted on the tensors themselves.

Before anything is loaded they are counted in the same way on a twin of the model, whose tensors have no numbers.
"""

import copy
import gc
from collections.abc import Iterator
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from coterie.backbone.int8 import hold_in_int8
from coterie.backbone.model import Backbone, BaseModelIdentity

SHARED = (type, ModuleType, BuiltinFunctionType)  # of the whole program, not of what is counted


def tensors_in(*roots: object) -> Iterator[Tensor]:
    """Yield every tensor that can be reached from some objects, whoever holds it there."""
    seen: dict[int, object] = {}
    stack = list(roots)
    while stack:
        found = stack.pop()
        if id(found) in seen or isinstance(found, SHARED):
            continue
        seen[id(found)] = found
        if isinstance(found, Tensor):
            yield found
        elif isinstance(found, FunctionType):
            stack += found.__closure__ or ()
        elif gc.is_tracked(found):
            stack += gc.get_referents(found)


def held_bytes(*roots: object, device: torch.device | None = None) -> int:
    """Return the bytes of all tensors that can be reached from some objects, each storage once.

    Args:
        roots: the objects.
        device: count what lies there alone.
    """
    storages = {}
    for tensor in tensors_in(*roots):
        if device is None or tensor.device.type == device.type:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def twin(location: Path, dtype: torch.dtype, *, in_int8: bool = False) -> Backbone:
    """Return a model as it would be loaded from a folder or GGUF file, on the meta device: shapes without numbers.

    Raises:
        OSError, ValueError, KeyError: as the model's loading.
    """
    file = {"gguf_file": location.name} if location.is_file() else {}
    folder = location.parent if file else location
    config = copy.deepcopy(AutoConfig.from_pretrained(folder, trust_remote_code=False, **file))
    config.get_text_config().pad_token_id = None  # or models look for it in what they read
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="batched_mm", trust_remote_code=False
        )
    if in_int8:
        hold_in_int8(model)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    return Backbone(model.eval(), tokenizer, BaseModelIdentity(str(location), None, ""))

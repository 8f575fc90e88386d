"""Fresh adapters: which layers they change, and the proof before the first step that they can be read back."""

import logging
import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie import ranks
from coterie.artifacts import disk_errors, is_full, read_json, write_json
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_layers
from coterie.backbone.loading import Backbone, loaded_by
from coterie.errors import CoterieError, first_line
from coterie.experts.bank import CONFIG_FILE, factor_names, load_adapter, rank_and_alpha, read_config
from coterie.experts.target_layers import ALL_LINEAR, asked_layers, is_transposed, layers_to_change, unchangeable
from coterie.settings.groups import LoraSettings

if TYPE_CHECKING:
    import peft

logger = logging.getLogger(__name__)


def lora_config(backbone: Backbone, settings: LoraSettings) -> "peft.LoraConfig":
    """Return PEFT's config of a fresh adapter, with the layers that it changes.

    Raises:
        CoterieError: as `layers_to_change`.
    """
    import peft

    layers = layers_to_change(backbone.model, settings.target_modules)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha or 4 * settings.rank,
        lora_dropout=settings.dropout,
        target_modules=layers,
        fan_in_fan_out=is_transposed(backbone.model, layers),
    )


def plain_config(folder: Path, model: PreTrainedModel) -> "peft.LoraConfig":
    """Tell PEFT what an adapter does in fields that were checked: its own config may be a stranger's.

    Every layer is named by its whole path, so that no pattern is searched for in the names of modules.

    Raises:
        CoterieError: as `load_adapter`.
    """
    import peft

    config, adapter = read_config(folder), load_adapter(folder, model)
    numbers = {path: rank_and_alpha(config, path, folder / CONFIG_FILE) for path in adapter}
    rank, alpha = Counter(numbers.values()).most_common(1)[0][0]
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=cast(int, alpha),  # PEFT takes what is not whole, too
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        target_modules=list(adapter),
        fan_in_fan_out=is_transposed(model, adapter),
        rank_pattern={f"^{re.escape(path)}": own for path, (own, _) in numbers.items() if own != rank},
        alpha_pattern={f"^{re.escape(path)}": own for path, (_, own) in numbers.items() if own != alpha},
    )


def check_fresh_adapter(backbone: Backbone, settings: LoraSettings) -> None:
    """Make sure that what training will write can be read back and run, before anything is spent on it.

    A fresh adapter is trained on nothing but one backward pass, saved, read by PEFT and by the reader that mixtures
    use, and attached. What the adapters leave as it is, beyond the output layer, is said in one line.

    Raises:
        CoterieError: when any of it does not work.
    """
    config = lora_config(backbone, settings)
    try:
        with tempfile.TemporaryDirectory() as folder, disk_errors(Path(folder)):
            _write_and_read(backbone, config, Path(folder))
    except Exception as error:  # PEFT and the model raise whatever they like
        if isinstance(error.__cause__, Exception) and is_full(error.__cause__):
            raise
        raise CoterieError(
            f"adapters of {backbone.identity.id} ({backbone.model.config.model_type}) could not be trained and read "
            f"back: {first_line(error)}; choose other --target-modules or another base model"
        ) from error
    _tell_what_stays(backbone.model, settings.target_modules)


def _write_and_read(backbone: Backbone, config: "peft.LoraConfig", folder: Path) -> None:
    import peft

    ids = torch.tensor([[1, 2, 3], [3, 2, 1]], device=backbone.device)
    model = peft.get_peft_model(backbone.model, config)
    try:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=1e-3)
        written = trainable_factors(model)
        with torch.enable_grad():
            model.train()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        if all(parameter.grad is None for parameter in model.parameters()):
            raise ValueError("no layer gets a gradient")
        save_adapter(model, folder, loaded_by(backbone.identity))
    finally:
        model.unload()
        backbone.model.eval()
    again = peft.PeftModel.from_pretrained(backbone.model, folder, is_trainable=True)
    try:
        check_taken(again, written)
    finally:
        again.unload()
    adapter = load_adapter(folder, backbone.model)
    if {name for path in adapter for name in factor_names(path)} != set(written):
        raise ValueError("other layers were read back than were written")
    layers = ExpertLayers(backbone.model, [adapter])
    with torch.inference_mode(), layers.running(layers.weighted(torch.ones(len(ids), 1))):
        backbone.hidden(ids)


def trainable_factors(model: "peft.PeftModel") -> dict[str, Tensor]:
    """Return the factors that a PEFT model trains, by the names that they have in its file."""
    return {
        name.replace(".default.", "."): parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def check_taken(model: "peft.PeftModel", written: Mapping[str, Tensor]) -> None:
    """Refuse to go on from an adapter that PEFT attached otherwise than it stands in its file: it only warns.

    Args:
        model: what PEFT made of it.
        written: its tensors by their names in the file.

    Raises:
        CoterieError: naming the first tensor that differs.
    """
    found = trainable_factors(model)
    for name in sorted({*found, *written}):
        if name not in found or name not in written or not torch.equal(found[name], written[name].to(found[name])):
            raise CoterieError(
                f"PEFT does not attach {name} to this model as it is written; train without this layer or adapter"
            )


def save_adapter(model: "peft.PeftModel", folder: Path, base: str) -> None:
    """Save as PEFT does, with what it loads the base model by (see `loaded_by`), and everything in a fixed order.

    Of several processes, which all have the same adapter, the first one saves.
    """
    if ranks.rank():
        return
    model.save_pretrained(str(folder), save_embedding_layers=False)  # they are frozen; 'auto' would ask the hub
    (folder / "README.md").unlink(missing_ok=True)
    config = read_json(folder / CONFIG_FILE)
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])  # a set, so its order is another in every process
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def _tell_what_stays(model: PreTrainedModel, target_modules: str) -> None:
    """Say in one line which weights stay as they are where somebody might think that adapters change them."""
    linear, left_out = linear_layers(model), unchangeable(model)
    stays = {path: left_out[path] for path in asked_layers(model, target_modules) if path in left_out}
    if target_modules == ALL_LINEAR:
        for name, parameter in model.named_parameters():
            owner = model.get_submodule(name.rpartition(".")[0])
            known = owner in linear.values() or isinstance(owner, (nn.Embedding, nn.Conv1d))
            if not known and sum(size > 1 for size in parameter.shape) > 1:
                stays[name] = "is no linear layer"
    by_reason: dict[str, dict[str, None]] = {}
    for path, reason in stays.items():
        if linear.get(path) is not model.get_output_embeddings():
            by_reason.setdefault(reason, {})[re.sub(r"\.\d+(?=\.|$)", ".*", path)] = None
    if by_reason:
        parts = [f"{', '.join(paths)} ({reason})" for reason, paths in by_reason.items()]
        logger.warning("adapters leave as it is: %s", "; ".join(parts))

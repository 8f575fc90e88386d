"""Loading a base model and naming it so that a mixture can be held to it."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from coterie import ranks
from coterie.artifacts import as_path, hash_json, may_be_on_hub, read_json, sha256_of, write_json
from coterie.backbone.aliases import ALIASES, cache_folder, densify, fetch_alias, named_model
from coterie.backbone.int8 import hold_in_int8
from coterie.backbone.model import Backbone, BaseModelIdentity
from coterie.backbone.probe import checked
from coterie.backbone.sharding import one_reads, shard
from coterie.errors import CoterieError, first_line, missing_extra, unknown_name
from coterie.settings.groups import ModelSettings
from coterie.settings.keywords import takes_fields

logger = logging.getLogger(__name__)


@takes_fields(ModelSettings)
def load_backbone(settings: ModelSettings) -> Backbone:
    """Load a frozen base model by alias, hub id, local folder or GGUF file, in evaluation mode.

    Raises:
        CoterieError: when the model, its revision, the device or an extra is not there.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda") and ranks.local() is not None:
        if name != "cuda":
            raise CoterieError(f"several processes take a GPU each, not all {name!r}; leave --device out")
        name = f"cuda:{ranks.local()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CoterieError(f"device {name!r} is not there on this machine; use --device auto or cpu") from error
    settings = settings.model_copy(update={"model": named_model(settings.model)})
    folder, revision = _locate(settings)
    _refuse_adapter(settings.model, folder, revision)
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "revision": revision}
    if isinstance(folder, Path) and folder.is_file():
        source |= {"pretrained_model_name_or_path": folder.parent, "gguf_file": folder.name}
    try:
        model = _load_model(source, settings, device)
        tokenizer: Any = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CoterieError(f"the base model {settings.model!r} cannot be loaded: {first_line(error)}") from error
    model.requires_grad_(False).eval()
    if settings.quantize:
        try:
            hold_in_int8(model)
        except ValueError as error:
            raise CoterieError(f"--quantize does not fit {settings.model!r}: {error}; leave it out") from error
    commit = getattr(model.config, "_commit_hash", None)
    backbone = Backbone(model, tokenizer, _identity(settings.model, folder, commit))
    if ranks.is_sharded():
        shard(backbone, device)
    return checked(backbone)


def _locate(settings: ModelSettings) -> tuple[str | Path, str | None]:
    """Return what transformers loads from, and the revision that applies to it."""
    name = settings.model
    if name in ALIASES:
        return fetch_alias(name), None
    path = as_path(name)
    if path.is_dir() or path.is_file():
        if path.is_file() and path.suffix != ".gguf":
            raise CoterieError(f"{name} is a file but not a .gguf file; give a model folder, a hub id or a .gguf file")
        return path, None
    if not may_be_on_hub(name):
        raise unknown_name("model folder or alias", name, ALIASES)
    return name, settings.revision


def _refuse_adapter(name: str, location: str | Path, revision: str | None) -> None:
    """Refuse an adapter in place of a base model: transformers would load both together, without a word."""
    file = find_adapter_config_file(str(location), revision=revision)
    if file is not None:
        base = read_json(Path(file)).get("base_model_name_or_path")
        raise CoterieError(
            f"{name} holds an adapter (adapter_config.json), not a base model; give the one that it was trained on"
            + (f": --model {base}" if isinstance(base, str) and base else "")
        )


def _load_model(source: dict[str, Any], settings: ModelSettings, device: torch.device) -> PreTrainedModel:
    dtype = settings.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    if settings.quantize and (settings.load_in_4bit or device.type != "cpu"):
        raise CoterieError(
            f"--quantize {settings.quantize} is for a CPU and without --load-in-4bit, got --device {device}"
            f"{' --load-in-4bit' if settings.load_in_4bit else ''}; leave one of them out"
        )
    if ranks.is_sharded() and (settings.quantize or settings.load_in_4bit):
        raise CoterieError("a sharded base model stays in its own type; leave --quantize and --load-in-4bit out")
    source = {**source, "dtype": dtype}
    if settings.load_in_4bit:
        return _load_in_4bit(source, device)
    with nullcontext() if "gguf_file" in source else one_reads():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            **source, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    model, report = loaded
    if "gguf_file" in source:
        model = densify(model)
    elif report["missing_keys"]:
        raise ValueError(f"its files lack the weight {min(report['missing_keys'])!r}")
    return model if ranks.is_sharded() else model.to(device)


def _load_in_4bit(source: dict[str, Any], device: torch.device) -> PreTrainedModel:
    try:
        import bitsandbytes  # noqa: F401  # pyrefly: ignore[missing-import] - only to say early what is missing
    except ImportError as error:
        raise missing_extra("bitsandbytes", "quant") from error
    compute = torch.bfloat16 if source["dtype"] == "auto" else getattr(torch, source["dtype"])
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=four_bits, device_map={"": device}, use_safetensors=True, trust_remote_code=False
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # else the first answer packs the weights, with coarser scales, into a form that passes no gradients on
            module.support_avx512bf16_for_cpu = False
    return model


def _identity(name: str, location: str | Path, commit: str | None) -> BaseModelIdentity:
    """Identify a model by what is computed with: its weight files, and what its configuration says of their use."""
    if isinstance(location, str):
        location = Path(str(cached_file(location, "config.json", revision=commit))).parent
    config = location / "config.json"
    derived = name in ALIASES or location.is_file()  # from the weight file itself
    stated = None if derived else hash_json(_of_computing(read_json(config)))
    return BaseModelIdentity(name, commit, _hash_files(_weight_files(location)), stated)


UNCOMPUTED = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of a configuration that change with the version that wrote it, or by choice, and no model by themselves."""


def _of_computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out of a configuration, and of those within it, names, versions, types and the ids of special tokens."""
    kept = {k: v for k, v in config.items() if k not in UNCOMPUTED and not k.startswith("_") and not k.endswith("_id")}
    return {key: _of_computing(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _weight_files(location: Path) -> list[Path]:
    """Return the files whose weights are loaded; others may lie beside them."""
    index, whole = location / "model.safetensors.index.json", location / "model.safetensors"
    if location.is_file():
        return [location]
    if whole.exists() or not index.exists():
        return [whole]
    return [location / name for name in sorted(set(read_json(index)["weight_map"].values()))]


def _hash_files(files: Sequence[Path]) -> str:
    """Hash weight files; large ones only once, since the result is cached with their size and time."""
    known_path = cache_folder() / "weight-hashes.json"
    key = json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    known: dict[str, str] = {}
    with suppress(CoterieError):
        known = {name: found for name, found in read_json(known_path).items() if isinstance(found, str)}
    if key not in known:
        known[key] = sha256_of(*files)
        with suppress(CoterieError, OSError):  # without a writable cache the hash is computed again next time
            write_json(known_path, known)
    return known[key]


def local_path(name: str) -> Path | None:
    """Return where a model lies on this machine: its folder or GGUF file; None if the hub has still to be asked.

    An alias is fetched and converted on first use.

    Raises:
        CoterieError: when there is no such model.
    """
    from huggingface_hub import try_to_load_from_cache

    location, _ = _locate(ModelSettings(model=name))
    if isinstance(location, Path):
        return location
    config = try_to_load_from_cache(location, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def loaded_by(identity: BaseModelIdentity) -> str:
    """Return what other programs load a base model by: its hub id, or the place where it lies on this machine."""
    if identity.revision:
        return identity.id
    path = fetch_alias(identity.id) if identity.id in ALIASES else as_path(identity.id)
    return str(path.resolve()) if path.exists() else identity.id


def local_weights(name: str) -> str | None:
    """Return the SHA-256 of a model's weight files, as its identity has it; None if they are not on this machine yet.

    Raises:
        CoterieError: when there is no such model.
    """
    path = local_path(name)
    files = [] if path is None else _weight_files(path)
    return _hash_files(files) if files and all(file.exists() for file in files) else None


def check_identity(wanted: BaseModelIdentity, found: BaseModelIdentity, relation: str) -> None:
    """Refuse a base model that computes otherwise than the wanted one; `relation` as in "FOLDER was trained on".

    Raises:
        CoterieError: when the hashes differ.
    """
    if wanted.sha256 not in (found.sha256, _older_hash(found)):
        raise CoterieError(
            f"{relation} {wanted.id} (sha256 {wanted.sha256[:12]}), but the base model loaded is "
            f"{found.id} (sha256 {found.sha256[:12]}); load that model, or make the folder anew"
        )
    if None not in (wanted.config_sha256, found.config_sha256) and wanted.config_sha256 != found.config_sha256:
        raise CoterieError(
            f"{relation} {wanted.id}, and {found.id} has the same weights, but its config.json says something else of "
            "their use; put back the config.json of then, or make the folder anew"
        )


def _older_hash(found: BaseModelIdentity) -> str:
    """Return the hash that earlier versions gave a model: of all safetensors files beside its configuration."""
    path = local_path(found.id)
    return found.sha256 if path is None or path.is_file() else _hash_files(sorted(path.glob("*.safetensors")))

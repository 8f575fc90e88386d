"""Taking experts to other people's engines: each expert, or one static mixture, as PEFT, vLLM or llama.cpp reads it.

llama.cpp adds up several adapters by scales that a request brings, so every routing is a list of scales there. In vLLM
and PEFT one mixture is one adapter.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.artifacts import FORMAT, RunFolder, as_path, check_output, run_folder, write_json, write_text
from coterie.backbone.gguf_files import check_layers, write_gguf_adapter, write_gguf_model
from coterie.backbone.loading import loaded_by
from coterie.errors import CoterieError
from coterie.experts.plain_adapter import rank_of, vllm_rank, write_plain_adapter
from coterie.lora import Adapter, check_merge
from coterie.mixture.core import Mixture
from coterie.mixture.folder import hash_mixture
from coterie.settings.commands import ExportSettings
from coterie.settings.keywords import takes_fields

LLAMA_CPP = "llama.cpp"
BASE_FILE = "base.gguf"


@dataclass(frozen=True)
class Exported:
    """What was written, and how it is used.

    Attributes:
        folder: where.
        target: the program that reads it.
        base_model: what the program loads the base model by.
        ranks: of the adapters, by their place in the folder.
        weights: of the static mixture, by expert; None where the experts alone were asked for.
        merge: how they were merged into one adapter; None where they were not.
        error: how far the merged adapter is from the exact mixture: relative, Frobenius over all layers.
    """

    folder: Path
    target: str
    base_model: str
    ranks: Mapping[str, int]
    weights: Mapping[str, float] | None = None
    merge: str | None = None
    error: float = 0.0

    @property
    def scales(self) -> list[dict[str, Any]] | None:
        """What a request to llama.cpp brings as `lora`: the adapters that it mixes; None for one adapter by itself."""
        if self.weights is None or self.merge is not None:
            return None
        return lora_list(self.weights, [Path(place).stem for place in self.ranks])

    def record(self) -> dict[str, Any]:
        """Return what export.json holds."""
        return {
            "format": FORMAT,
            "target": self.target,
            "base_model": self.base_model,
            "adapters": dict(self.ranks),
            "weights": None if self.weights is None else dict(self.weights),
            "merge": self.merge,
            "relative_error": self.error,
            "lora": self.scales,
        }

    def __str__(self) -> str:
        """List the adapters, one a line, and the request's list of scales."""
        off = f", relative error {self.error:.2g}" if self.error else ""
        lines = [f"{self.folder / place}: rank {rank}{off}" for place, rank in self.ranks.items()]
        return "\n".join([*lines, *([f'"lora": {json.dumps(self.scales)}'] if self.scales else [])])


def lora_list(weights: Mapping[str, float], names: list[str]) -> list[dict[str, Any]]:
    """Return the `lora` of a request to llama.cpp, which knows adapters by their place among `names`."""
    return [{"id": number, "scale": weights[name]} for number, name in enumerate(names) if weights.get(name)]


@takes_fields(ExportSettings)
def export_mixture(settings: ExportSettings) -> Exported:
    """Write a mixture's experts, or one static mixture of them, for another program, with what to type there.

    Raises:
        CoterieError: for weights that do not fit, what the program cannot run, or an output folder that exists.
    """
    output = as_path(settings.output)
    check_output(output, settings)
    given = _given_weights(settings)
    mixture = Mixture.from_pretrained(settings.mixture, **settings.placement.model_dump())
    assert mixture.folder is not None  # it was loaded from one
    weights = _weights(mixture, settings, given)
    merge = None if weights is None else settings.merge or (None if settings.target == LLAMA_CPP else "exact")
    adapters, error = _adapters(mixture, weights, merge)
    ranks = {
        f"{place}.gguf" if settings.target == LLAMA_CPP else place: rank_of(own) for place, own in adapters.items()
    }
    base = _base_model(mixture, settings)
    exported = Exported(output, settings.target, base, ranks, weights, merge, error)
    readme = _readme(exported, mixture)
    with run_folder(output, settings, {"mixture": hash_mixture(mixture.folder)}) as run:
        _write(run, exported, mixture, adapters, settings.base_type)
        write_json(run.path / "export.json", exported.record())
        write_text(run.path / "README.md", readme)
    return exported


def _write(
    run: RunFolder, exported: Exported, mixture: Mixture, adapters: Mapping[str, Adapter], base_type: str | None
) -> None:
    """Write the adapters, and the base model where it was asked for; what an interrupted run has written stays."""
    model = mixture.backbone.model
    if base_type and not (run.path / BASE_FILE).exists():
        write_gguf_model(run.path / BASE_FILE, mixture.backbone, base_type)
    how = {"base": exported.base_model, "merge": exported.merge, "weights": dict(exported.weights or {})}
    for place, adapter in zip(exported.ranks, adapters.values(), strict=True):
        if exported.target == LLAMA_CPP:
            write_gguf_adapter(run.path / place, adapter, model)
        else:
            run.stage(place, lambda to, own=adapter: write_plain_adapter(to, own, model, exported.base_model), how)


def _base_model(mixture: Mixture, settings: ExportSettings) -> str:
    """Return what the other program loads the base model by, where it can run it.

    Raises:
        CoterieError: when it cannot.
    """
    model, base = mixture.backbone.model, loaded_by(mixture.backbone.identity)
    if settings.target == LLAMA_CPP:
        check_layers({path for adapter in mixture.bank.adapters for path in adapter}, model)
        return BASE_FILE if settings.base_type else base
    if settings.target == "vllm" and base.endswith(".gguf"):
        raise CoterieError(f"vLLM takes adapters on model folders, and {base} is a GGUF file; take --for llama.cpp")
    return base


def _given_weights(settings: ExportSettings) -> dict[str, float] | None:
    """Read --weights, and refuse what does not go with it."""
    if settings.weights and settings.prompt:
        raise CoterieError("--weights and --prompt both weigh the experts; give one of them")
    if settings.merge:
        check_merge(settings.merge)
        if not settings.weights and not settings.prompt:
            raise CoterieError("--merge makes one adapter of several; say which, with --weights or --prompt")
    if not settings.weights:
        return None
    found: dict[str, float] = {}
    for part in settings.weights.split(","):
        name, _, written = part.strip().rpartition("=")
        try:
            weight = float(written)
        except ValueError:
            weight = math.nan
        if not name or name in found or not (math.isfinite(weight) and weight >= 0):
            raise CoterieError(f"--weights: {part.strip()!r} is no NAME=W with a weight from 0 upwards, each name once")
        found[name] = weight
    if not any(found.values()):
        raise CoterieError("--weights: all of them are 0, which is the base model alone; give one above 0")
    return found


def _weights(mixture: Mixture, settings: ExportSettings, given: Mapping[str, float] | None) -> dict[str, float] | None:
    """Return the static mixture's weights above 0, in the bank's order: those given, or the router's for the prompt."""
    found = given
    if settings.prompt is not None:
        routed = mixture.replace(router=settings.router, combiner="layers")  # which follows every router
        if routed.router.grain == "layer":
            raise CoterieError(
                f"router {routed.router.kind!r} weighs experts anew at every layer's input, which no static mixture "
                "holds; give --weights, or another --router"
            )
        found = routed.route(settings.prompt, settings.top_k_experts).row(0)
    if found is None:
        return None
    for name in found:
        mixture.bank.index(name)
    return {name: found[name] for name in mixture.bank.names if found.get(name)}


def _adapters(
    mixture: Mixture, weights: Mapping[str, float] | None, merge: str | None
) -> tuple[dict[str, Adapter], float]:
    """Return the adapters to write, by their place in the folder, and the relative error of the merged one."""
    if weights is None or merge is None:
        pairs = zip(mixture.bank.names, mixture.bank.adapters, strict=True)
        return {f"experts/{name}": adapter for name, adapter in pairs}, 0.0
    row = tuple(weights.get(name, 0.0) for name in mixture.bank.names)
    error = 0.0 if merge == "exact" else mixture.layers.merge_error(row, merge)
    return {"mixture": mixture.layers.merged(row, merge)}, error


def _readme(exported: Exported, mixture: Mixture) -> str:
    """Return what to type in the other program.

    Raises:
        CoterieError: when vLLM does not take adapters on such a model, or of such a rank.
    """
    usage = {"vllm": _for_vllm, "peft": _for_peft, LLAMA_CPP: _for_llama_cpp}[exported.target]
    what = "Experts" if exported.weights is None else "A static mixture of experts"
    text = f"# {what} on {mixture.backbone.identity.id}, for {exported.target}\n\n{usage(exported, mixture)}"
    if exported.weights:
        text += f"\nWeights: {json.dumps(exported.weights)}"
        text += f", merged by {exported.merge}.\n" if exported.merge else ".\n"
    if mixture.prompts.system_prompt is not None:
        told = json.dumps(mixture.prompts.system_prompt)
        text += f"\nThe experts were trained with this system prompt, which every conversation needs: {told}\n"
    return text


def _for_vllm(exported: Exported, mixture: Mixture) -> str:
    places = list(exported.ranks)
    limit = vllm_rank(max(exported.ranks.values()), mixture.backbone.model.config.get_text_config().model_type)
    modules = " ".join(f"{Path(place).name}={place}" for place in places)
    flags = f"--enable-lora --max-lora-rank {limit} --max-loras {len(places)}"
    return (
        f"```bash\nvllm serve {exported.base_model} {flags} \\\n    --lora-modules {modules}\n```\n\n"
        f'A request names its adapter: `"model": "{Path(places[0]).name}"`.\n'
    )


def _for_peft(exported: Exported, mixture: Mixture) -> str:
    place, base = next(iter(exported.ranks)), Path(exported.base_model)
    if base.suffix != ".gguf":
        kind, model = "AutoPeftModelForCausalLM", f'AutoPeftModelForCausalLM.from_pretrained("{place}")'
        return f"```python\nfrom peft import {kind}\n\nmodel = {model}\n```\n"
    return (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base.parent}", gguf_file="{base.name}")\n'
        f'model = PeftModel.from_pretrained(base, "{place}")\n```\n'
    )


def _for_llama_cpp(exported: Exported, mixture: Mixture) -> str:
    is_file = exported.base_model.endswith(".gguf")
    base = exported.base_model if is_file else "BASE.gguf"
    hint = "" if is_file else "BASE.gguf is the base model as GGUF: --base-type writes it here.\n\n"
    adapters = " ".join(f"--lora {place}" for place in exported.ranks)
    scales = exported.scales or [{"id": 0, "scale": 1.0}]
    return (
        f"{hint}```bash\nllama-server -m {base} --lora-init-without-apply {adapters}\n```\n\n"
        "A request brings the experts' scales, and no cache of what was read under others:\n\n"
        f'```json\n{{"messages": [...], "lora": {json.dumps(scales)}, "cache_prompt": false}}\n```\n'
    )

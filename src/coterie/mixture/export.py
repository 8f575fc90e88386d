"""Taking experts to other people's engines: each expert, or one static mixture, as PEFT, vLLM or llama.cpp reads it.

Every request may have a mixture of its own only here and in llama.cpp; elsewhere one static mixture is one adapter.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.artifacts import FORMAT, as_path, check_output, run_folder, sha256_of, write_json, write_text
from coterie.backbone.loading import loaded_by
from coterie.errors import CoterieError
from coterie.experts.plain_adapter import rank_of, vllm_rank, write_plain_adapter
from coterie.lora import Adapter, check_merge
from coterie.mixture.core import Mixture
from coterie.settings.commands import ExportSettings
from coterie.settings.keywords import takes_fields

MIXTURE = "mixture"


@dataclass(frozen=True)
class Exported:
    """What was written, and how it is used.

    Attributes:
        folder: where.
        target: the program that reads it.
        base_model: what the program loads the base model by.
        ranks: of the adapters, by their place in the folder.
        weights: of the static mixture, by expert; None where the experts themselves were written.
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
        }

    def __str__(self) -> str:
        """List the adapters, one a line."""
        off = f", relative error {self.error:.2g}" if self.error else ""
        return "\n".join(f"{self.folder / place}: rank {rank}{off}" for place, rank in self.ranks.items())


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
    base = _base_model(mixture, settings.target)
    weights = _weights(mixture, settings, given)
    adapters, error = _adapters(mixture, weights, settings.merge or "exact")
    ranks = {place: rank_of(adapter) for place, adapter in adapters.items()}
    if settings.target == "vllm":
        vllm_rank(max(ranks.values()), _model_type(mixture))
    assert mixture.folder is not None  # it was loaded from one
    files = sorted(mixture.folder.glob("experts/*/adapter_model.safetensors"))
    inputs = {"mixture": sha256_of(mixture.folder / "mixture.json", *files)}
    merge = None if weights is None else settings.merge or "exact"
    exported = Exported(output, settings.target, base, ranks, weights, merge, error)
    with run_folder(output, settings, inputs) as run:
        for place, adapter in adapters.items():
            run.stage(place, lambda folder, own=adapter: write_plain_adapter(folder, own, mixture.backbone.model, base))
        write_json(run.path / "export.json", exported.record())
        write_text(run.path / "README.md", _readme(exported, mixture))
    return exported


def _base_model(mixture: Mixture, target: str) -> str:
    """Return what other programs load the base model by."""
    base = loaded_by(mixture.backbone.identity)
    if target == "vllm" and base.endswith(".gguf"):
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


def _adapters(mixture: Mixture, weights: Mapping[str, float] | None, how: str) -> tuple[dict[str, Adapter], float]:
    """Return the adapters to write, by their place in the folder, and the relative error of the merged one."""
    if weights is None:
        pairs = zip(mixture.bank.names, mixture.bank.adapters, strict=True)
        return {f"experts/{name}": adapter for name, adapter in pairs}, 0.0
    row = tuple(weights.get(name, 0.0) for name in mixture.bank.names)
    error = 0.0 if how == "exact" else mixture.layers.merge_error(row, how)
    return {MIXTURE: mixture.layers.merged(row, how)}, error


def _readme(exported: Exported, mixture: Mixture) -> str:
    """Return what to type in the other program."""
    places = list(exported.ranks)
    if exported.target == "vllm":
        most = vllm_rank(max(exported.ranks.values()), _model_type(mixture))
        modules = " ".join(f"{Path(place).name}={place}" for place in places)
        code = (
            f"```bash\nvllm serve {exported.base_model} --enable-lora --max-lora-rank {most} "
            f"--max-loras {len(places)} \\\n    --lora-modules {modules}\n```\n\n"
            f'A request names its adapter as its model: `"model": "{Path(places[0]).name}"`.\n'
        )
    elif exported.base_model.endswith(".gguf"):
        file = Path(exported.base_model)
        code = (
            "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'base = AutoModelForCausalLM.from_pretrained("{file.parent}", gguf_file="{file.name}")\n'
            f'model = PeftModel.from_pretrained(base, "{places[0]}")\n```\n'
        )
    else:
        code = (
            "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
            f'model = AutoPeftModelForCausalLM.from_pretrained("{places[0]}")\n```\n'
        )
    what = "Experts" if exported.weights is None else "One static mixture of experts"
    told = (
        "" if exported.weights is None else f"\nWeights: {json.dumps(exported.weights)}, merged by {exported.merge}.\n"
    )
    return f"# {what} on {mixture.backbone.identity.id}, for {exported.target}\n\n{code}{told}{_system_prompt(mixture)}"


def _model_type(mixture: Mixture) -> str:
    return mixture.backbone.model.config.get_text_config().model_type


def _system_prompt(mixture: Mixture) -> str:
    system = mixture.prompts.system_prompt
    if system is None:
        return ""
    return f"\nThe experts were trained with this system prompt, which every conversation needs: {json.dumps(system)}\n"

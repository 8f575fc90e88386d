"""Training of a token-gated mixture on a task's rows: what `coterie fit kshot-moe` and its ablations share."""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie import ranks
from coterie.artifacts import read_json, write_json
from coterie.data.batching import TokenRow
from coterie.experts.bank import CONFIG_FILE, load_bank, write_adapter
from coterie.experts.gated_model import GateTraining
from coterie.experts.gates_training import TrainedMixture, collapsed, start_gates, train_mixture
from coterie.experts.training_plan import read_log
from coterie.lora import Adapter
from coterie.methods.common import base_plan
from coterie.methods.kshot.task import KshotTask
from coterie.records.task import GateLoads, LayerLoad, StepLoad
from coterie.routers.gate import GateRouter
from coterie.settings.commands import KshotSettings

logger = logging.getLogger(__name__)

GATES_FILE = "gates.json"


@dataclass(frozen=True)
class Tuned:
    """A mixture that was trained on a task.

    Attributes:
        experts: folders of the trained experts, by name.
        router: their gates.
        record: what `gates.json` holds: how the gates spread the tokens.
    """

    experts: Mapping[str, Path]
    router: GateRouter
    record: GateLoads


def tune(
    folder: Path, task: KshotTask, experts: Mapping[str, str], rows: Sequence[TokenRow], settings: KshotSettings
) -> Tuned:
    """Train gates, and the experts with them, from adapters of a bank (arXiv 2408.15915, eq. 9).

    What an interrupted training left in the folder is used to go on.

    Args:
        folder: where the trained experts, `experts/<name>`, and the training's log are written.
        task: its bank holds the adapters.
        experts: the adapter in the bank that every expert starts from, by the expert's name.
        rows: what they are trained on.
        settings: of gates and training.

    Raises:
        CoterieError: when an adapter does not fit, or the loss is not finite.
    """
    bank, backbone = task.bank, task.backbone
    adapters = load_bank({name: bank.folder_of(origin) for name, origin in experts.items()}, backbone.model)
    how = settings.gates
    top_k = gate_options(settings, len(adapters))["top_k"]
    gates = start_gates(how.gate_start, backbone, adapters.adapters, adapters.names, top_k=top_k, seed=settings.seed)
    training = GateTraining(experts=how.train == "all", dropout=how.expert_dropout, balance=how.balance)
    plan = base_plan(settings, f"mixture of {', '.join(adapters.names)}")
    configs = {name: read_json(bank.folder_of(origin) / CONFIG_FILE) for name, origin in experts.items()}
    with tempfile.TemporaryDirectory() as trial:  # what cannot be read back is told now, not after the training
        ranks.each(lambda: load_bank(_write_experts(Path(trial), configs, adapters.adapters), backbone.model))
    trained = train_mixture(backbone, adapters.adapters, gates, rows, plan, folder, training)
    folders = _write_experts(folder, configs, trained.adapters)
    record = _gate_record(trained, folder)
    write_json(folder / GATES_FILE, record.plain())
    if (taken := collapsed(trained.load, trained.gates.experts)) is not None:
        logger.warning(
            "the gates give more than 90%% of all weight to %s; the others are hardly used: add --balance 0.01, or "
            "start with --gate-start arrow",
            taken,
        )
    return Tuned(folders, GateRouter(backbone, trained.adapters, trained.gates), record)


def _write_experts(folder: Path, configs: Mapping[str, dict[str, Any]], adapters: Sequence[Adapter]) -> dict[str, Path]:
    """Write experts to `experts/<name>` of a folder, under the configs that they came with."""
    folders = {name: folder / "experts" / name for name in configs}
    for (name, config), adapter in zip(configs.items(), adapters, strict=True):
        write_adapter(folders[name], config, adapter)
    return folders


def gate_options(settings: KshotSettings, experts: int) -> dict[str, Any]:
    """Return how a mixture's gates turn scores into weights."""
    score = "arrow" if settings.gates.gate_start == "arrow" else "linear"
    return {"top_k": min(settings.gates.top_k_experts, experts), "score": score}


def _gate_record(trained: TrainedMixture, folder: Path) -> GateLoads:
    """Return how tokens were spread over the experts: in all, by layer, and along the training."""
    loads = torch.stack(list(trained.load.values()))
    steps = [
        StepLoad(step=entry["step"], load=entry["expert_load"], entropy=entry["gate_entropy"])
        for entry in read_log(folder)
        if "expert_load" in entry
    ]
    return GateLoads(
        experts=trained.gates.experts,
        top_k=trained.gates.top_k,
        load=_plain(loads.mean(dim=0)),
        entropy=sum(trained.entropy.values()) / len(trained.entropy),
        layers=tuple(
            LayerLoad(path=path, load=_plain(load), entropy=trained.entropy[path])
            for path, load in trained.load.items()
        ),
        steps=tuple(steps),
    )


def _plain(values: Tensor) -> tuple[float, ...]:
    return tuple(round(value, 6) for value in values.tolist())

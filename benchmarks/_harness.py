"""What every benchmark shares: interleaved timing, ratios of medians of pairs, and the record with the hardware."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from coterie.artifacts import environment_record
from coterie.backbone.loading import Backbone, load_backbone
from coterie.cli.process import bound_spinning
from coterie.experts.fresh_adapter import save_adapter
from coterie.lora import Adapter
from coterie.settings.groups import ModelSettings


def arguments(description: str) -> argparse.Namespace:
    """Read the flags that all benchmarks have; begin anew where torch was loaded without a bound on its waiting."""
    before = dict(os.environ)
    bound_spinning()
    if os.environ != before:
        os.execv(sys.executable, sys.orig_argv)
    return _parser(description).parse_args()


def _parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--quick", action="store_true", help="an answer within a minute, with few repeats")
    parser.add_argument("--beside", type=int, default=0, metavar="N", help="measure beside N other busy processes")
    parser.add_argument("--minutes", type=float, help="of a benchmark that keeps its rounds: stop then, to go on later")
    parser.add_argument("--rounds", type=int, help="of a benchmark that keeps its rounds: how many it takes")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    return parser


def interleaved(
    ways: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Run every way once per round, by default after one round that does not count, and return seconds by way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with busy(arguments("").beside):
        for number in range(rounds + warm_up):
            for name, run in ways.items():
                taken = seconds_of(run)
                if number or not warm_up:
                    seconds[name].append(taken)
    return seconds


def seconds_of(run: Callable[[], object]) -> float:
    """Return what something takes, until a GPU has done all that it was asked."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else bool
    wait()
    started = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - started


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Context manager: this many other processes, each of which keeps a core busy."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def median_ratio(above: list[float], below: list[float]) -> float:
    """Return the median over rounds of one way's time divided by another's."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def hardware_record() -> dict[str, Any]:
    """Return what a result was measured on: the machine, its threads, and the versions of what ran."""
    record = environment_record()
    waiting = {key: os.environ[key] for key in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY") if key in os.environ}
    beside = _parser("").parse_known_args()[0].beside  # scripts may have further flags of their own
    threads = {"threads": torch.get_num_threads(), "beside": beside, **waiting}
    card = {"card": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
    return {"name": record["machine"], **card, **threads, "versions": record["versions"]}


def publish(name: str, settings: Mapping[str, Any], medians: Mapping[str, float], ratios: Mapping[str, float]) -> None:
    """Print the result as one JSON object, and write it where `--output` says."""
    result = {
        "name": name,
        "hardware": hardware_record(),
        "settings": dict(settings),
        "medians": {key: round(value, 6) for key, value in medians.items()},
        "ratios": {key: round(value, 4) for key, value in ratios.items()},
    }
    tell(result, arguments(name).output)


def tell(result: Mapping[str, Any], output: Path | None) -> None:
    """Print a result as one JSON object, and write it to a file if one is given."""
    text = json.dumps(result, indent=1)
    print(text)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")


def load(model: str) -> Backbone:
    """Load the base model on the best device there is."""
    return load_backbone(ModelSettings(model=model))


def random_adapter(backbone: Backbone, seed: int = 0, rank: int = 8) -> Path:
    """Write an adapter with random weights in both factors to a temporary PEFT folder."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=4 * rank, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model = get_peft_model(backbone.model, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.mul_(0.01)  # small against the base model, as trained updates are
    folder = Path(tempfile.mkdtemp(prefix="coterie-benchmark-"))
    save_adapter(model, folder, backbone.identity.id)
    model.unload()
    return folder


def floor(backbone: Backbone, adapter: Adapter, experts: int) -> float:
    """Return the seconds that it takes to read the base weights and the experts' updates once from memory."""
    weights = [p for p in backbone.model.parameters() if p.dim() == 2]
    updates = sum(pair.down.numel() + pair.up.numel() for pair in adapter.values()) * experts
    size = sum(weight.numel() * weight.element_size() for weight in weights) + 4 * updates
    large = max(weights, key=torch.numel)
    times = []
    for _ in range(5):
        times.append(seconds_of(lambda: large.detach().sum()) / (large.numel() * large.element_size()))
    return size * statistics.median(times)

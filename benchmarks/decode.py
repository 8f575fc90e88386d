"""Time per token of an ensemble of 9 experts, against the base adapter merged and against PEFT's mixed batch.

The nine experts are copies of one adapter, so all ways must write the same tokens; their cost does not depend on
the values. `floor` is the time to read the base weights and the nine updates once from memory. `proposed_by_...` is the
ensemble with speculation, on longer answers to a prompt that repeats itself: `merged` always agrees here, so that its
time is the least that it can take.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from _harness import arguments, floor, interleaved, load, median_ratio, publish, random_adapter
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import TokenRow
from coterie.engine.engine import WHOLE_PROMPTS, Engine
from coterie.engine.request import Request, Token
from coterie.experts.bank import load_adapter
from coterie.lora import Adapter
from coterie.routers.base import Routing
from coterie.settings.sampling import SamplingSettings

EXPERTS = 9
LONGER = 4
"""Answers with speculation are so many times longer: costs are measured in the first passes of each."""
PROMPT = "Explain in simple words why the sky is blue during the day and red in the evening. " * 3


def plain_steps(model: PreTrainedModel | PeftModel, ids: list[int], rows: int, **options: list[str]) -> Iterator[int]:
    """Decode greedily with a KV cache, the mean of `rows` equal rows deciding."""
    cache = DynamicCache(config=model.config)
    inputs = torch.tensor([ids] * rows, device=model.device)
    while True:
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
        logits: Tensor = output.logits[:, -1].float().mean(dim=0)
        token = int(logits.argmax())
        yield token
        inputs = torch.full((rows, 1), token, device=model.device)


def our_steps(
    backbone: Backbone, layers: ExpertLayers, ids: list[int], steps: int, proposer: str = "off"
) -> Iterator[int]:
    """Decode with the ensemble."""
    names = tuple(f"expert-{number}" for number in range(EXPERTS))
    routing = Routing(names, torch.ones(1, EXPERTS))
    prompt = TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))
    engine = Engine(backbone, layers, chunk=WHOLE_PROMPTS)
    settings = SamplingSettings(speculate=proposer)
    for token in engine.run([Request(prompt, routing, LogitCombiner(), steps + 1, (settings,))]):
        assert isinstance(token, Token), token.error
        yield token.id


def compare(makers: Mapping[str, Callable[[], Iterator[int]]], steps: int, rounds: int) -> dict[str, list[float]]:
    """Return seconds a token by way, one a round, behind the prompt; all ways must write the same tokens."""
    written: dict[str, list[int]] = {}
    per_token: dict[str, list[float]] = {name: [] for name in makers}

    def timed(name: str) -> None:
        source = makers[name]()
        tokens = [next(source)]  # the prefill
        started = time.perf_counter()
        tokens += [next(source) for _ in range(steps)]
        per_token[name].append((time.perf_counter() - started) / steps)
        written[name] = tokens

    with torch.inference_mode():
        interleaved({name: lambda name=name: timed(name) for name in makers}, rounds)
    if len({tuple(tokens) for tokens in written.values()}) != 1:
        raise SystemExit(f"the ways wrote different tokens: {written}")
    return {name: values[1:] for name, values in per_token.items()}


def main() -> None:
    """Run the ways in turn and print the result."""
    flags = arguments("decode")
    rounds, steps = (2, 5) if flags.quick else (7, 16)
    backbone = load(flags.model)
    backbone.__dict__["stop_ids"] = frozenset()  # all ways write the same number of tokens
    folder = random_adapter(backbone)
    adapter: Adapter = load_adapter(folder, backbone.model)
    layers = ExpertLayers(backbone.model, [adapter] * EXPERTS)
    merged = PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder).merge_and_unload().eval()
    mixed = PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder, adapter_name="e0")
    names = [f"e{number}" for number in range(EXPERTS)]
    for name in names[1:]:
        mixed.load_adapter(folder, adapter_name=name)
    mixed.eval()
    ids = backbone.tokenizer(PROMPT)["input_ids"]
    makers = {
        "merged": lambda: plain_steps(merged, ids, 1),
        "peft": lambda: plain_steps(mixed, ids, EXPERTS, adapter_names=names),
        "ensemble": lambda: our_steps(backbone, layers, ids, steps),
    }
    kept = compare(makers, steps, rounds)
    proposers = ("off", "lookup", "base", "merged", f"blocks:{max(1, len(backbone.blocks) // 4)}")
    ways = {how: lambda how=how: our_steps(backbone, layers, ids, LONGER * steps, how) for how in proposers}
    speculating = compare(ways, LONGER * steps, rounds)
    medians = {f"{name}_seconds_per_token": statistics.median(values) for name, values in kept.items()}
    medians |= {f"proposed_by_{how}_seconds_per_token": statistics.median(own) for how, own in speculating.items()}
    medians["floor_seconds_per_token"] = floor(backbone, adapter, EXPERTS)
    ratios = {
        "ensemble_over_merged": median_ratio(kept["ensemble"], kept["merged"]),
        "peft_over_ensemble": median_ratio(kept["peft"], kept["ensemble"]),
    }
    ratios |= {
        f"proposed_by_{how}_over_off": median_ratio(own, speculating["off"])
        for how, own in speculating.items()
        if how != "off"
    }
    settings = {"experts": EXPERTS, "rank": 8, "prompt_tokens": len(ids), "steps": steps, "rounds": rounds}
    publish("decode", {"model": flags.model, **settings, "speculating_steps": LONGER * steps}, medians, ratios)


if __name__ == "__main__":
    main()

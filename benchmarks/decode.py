"""Time per token of an ensemble of 9 experts, against the base adapter merged and against PEFT's mixed batch.

The nine experts are copies of one adapter, so all three ways must write the same tokens; their cost does not depend on
the values. `floor` is the time to read the base weights and the nine updates once from memory.
"""

import copy
import statistics
import time
from collections.abc import Iterator

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

EXPERTS = 9
PROMPT = "Explain in simple words why the sky is blue during the day and red in the evening. " * 3


def plain_steps(model: PreTrainedModel | PeftModel, ids: list[int], rows: int, **options: list[str]) -> Iterator[int]:
    """Decode greedily with a KV cache, the mean of `rows` equal rows deciding."""
    cache = DynamicCache(config=model.config)
    inputs = torch.tensor([ids] * rows)
    while True:
        output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1, **options)
        logits: Tensor = output.logits[:, -1].float().mean(dim=0)
        token = int(logits.argmax())
        yield token
        inputs = torch.full((rows, 1), token)


def our_steps(backbone: Backbone, layers: ExpertLayers, ids: list[int], steps: int) -> Iterator[int]:
    """Decode with the ensemble."""
    names = tuple(f"expert-{number}" for number in range(EXPERTS))
    routing = Routing(names, torch.ones(1, EXPERTS))
    prompt = TokenRow(tuple(ids), len(ids), (False,) * len(ids), (True,) * len(ids))
    engine = Engine(backbone, layers, chunk=WHOLE_PROMPTS)
    for token in engine.run([Request(prompt, routing, LogitCombiner(), steps + 1)]):
        assert isinstance(token, Token), token.error
        yield token.id


def main() -> None:
    """Run the three ways in turn and print the result."""
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
        raise SystemExit(f"the three ways wrote different tokens: {written}")
    kept = {name: values[1:] for name, values in per_token.items()}
    medians = {f"{name}_seconds_per_token": statistics.median(values) for name, values in kept.items()}
    medians["floor_seconds_per_token"] = floor(backbone, adapter, EXPERTS)
    publish(
        "decode",
        {
            "model": flags.model,
            "experts": EXPERTS,
            "rank": 8,
            "prompt_tokens": len(ids),
            "steps": steps,
            "rounds": rounds,
        },
        medians,
        {
            "ensemble_over_merged": median_ratio(kept["ensemble"], kept["merged"]),
            "peft_over_ensemble": median_ratio(kept["peft"], kept["ensemble"]),
        },
    )


if __name__ == "__main__":
    main()

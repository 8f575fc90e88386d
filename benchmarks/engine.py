"""Requests of mixed lengths, combiners and arrivals: all in one engine, against one fixed batch after another.

Sixteen requests come one after another, each with an answer of its own length and one of three combiners. `continuous`
lets each join when a place is free. `fixed` takes them as a batch with one combiner can: those of a combiner together,
up to as many as there are places, and the next batch when the slowest answer of the last one has ended. Prompts take as
long to read in both; with their first tokens alone, what is left is the writing.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from _harness import arguments, interleaved, load, median_ratio, publish, random_adapter

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.combiners.table import make_combiner
from coterie.data.batching import TokenRow
from coterie.engine.engine import WHOLE_PROMPTS, Engine
from coterie.engine.request import Failure, Request
from coterie.experts.bank import load_adapter
from coterie.routers.base import Routing

EXPERTS = 4
PLACES = 8
SHORT = 8  # tokens of prompts that take next to no time
NAMES = tuple(f"expert-{number}" for number in range(EXPERTS))
COMBINERS = ("logits", "layers", "weights")


def mixed(backbone: Backbone, count: int, longest: int) -> list[Request]:
    """Make requests whose prompts and answers differ in length, most of them short."""
    words = backbone.tokenizer("Explain in simple words why the sky is blue during the day. " * 9)["input_ids"]
    draw = random.Random(0)
    requests = []
    for number in range(count):
        length, limit = draw.randint(8, len(words)), max(2, round(longest * draw.random() ** 2))
        prompt = TokenRow(tuple(words[:length]), length, (False,) * length, (True,) * length)
        weights = torch.tensor([[draw.random() + 0.1 for _ in NAMES]])
        combiner = make_combiner(COMBINERS[number % len(COMBINERS)])
        requests.append(Request(prompt, Routing(NAMES, weights), combiner, limit))
    return requests


def in_turn(requests: Sequence[Request]) -> list[list[Request]]:
    """Return the fixed batches: those of a combiner together, up to as many as there are places."""
    alike = [[one for one in requests if one.combiner.kind == kind] for kind in COMBINERS]
    return [own[start : start + PLACES] for own in alike for start in range(0, len(own), PLACES)]


def tokens_per_second(engine: Callable[[], Engine], batches: Sequence[Sequence[Request]]) -> float:
    """Answer batches one after another."""
    started, written = time.perf_counter(), 0
    for batch in batches:
        for token in engine().run(batch):
            if isinstance(token, Failure):
                raise token.error
            written += 1
    return written / (time.perf_counter() - started)


def main() -> None:
    """Run both ways in turn and print the result."""
    flags = arguments("engine")
    rounds, longest = (2, 12) if flags.quick else (5, 96)
    backbone = load(flags.model)
    backbone.__dict__["stop_ids"] = frozenset()  # answers are as long as they may be
    layers = ExpertLayers(backbone.model, [load_adapter(random_adapter(backbone), backbone.model)] * EXPERTS)
    requests = mixed(backbone, 16, longest)
    short = [replace(one, prompt=replace(one.prompt, prompt_length=SHORT).prompt()) for one in requests]
    speeds: dict[str, list[float]] = {}

    def engine() -> Engine:
        return Engine(backbone, layers, places=PLACES, chunk=WHOLE_PROMPTS)

    def timed(name: str, batches: Sequence[Sequence[Request]]) -> None:
        speeds.setdefault(name, []).append(tokens_per_second(engine, batches))

    asked = {"continuous": [requests], "fixed": in_turn(requests), "writing": [short], "fixed_writing": in_turn(short)}
    interleaved({name: partial(timed, name, batches) for name, batches in asked.items()}, rounds)
    speeds = {name: own[1:] for name, own in speeds.items()}  # without the round that warms up
    publish(
        "engine",
        {"model": flags.model, "requests": len(requests), "places": PLACES, "longest": longest, "rounds": rounds},
        {f"{name}_tokens_per_second": sorted(own)[len(own) // 2] for name, own in speeds.items()},
        {
            "continuous_over_fixed": median_ratio(speeds["continuous"], speeds["fixed"]),
            "writing_over_fixed_writing": median_ratio(speeds["writing"], speeds["fixed_writing"]),
        },
    )


if __name__ == "__main__":
    main()

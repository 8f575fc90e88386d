"""Time per token of `--engine llama.cpp`: six experts mixed, one of them alone, and none; beside our own engine.

The experts are random adapters of rank 8 on all linear layers: their cost does not depend on the values. Our own engine
mixes the same six in the layers, with the numbers of the same GGUF file in float32. Times are from the first piece of
text to the last, so reading the prompt is not in them.
"""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from _harness import arguments, interleaved, load, median_ratio, publish, random_adapter

from coterie.combiners.table import make_combiner
from coterie.data.batching import PromptFormat
from coterie.experts.bank import ExpertBank, load_adapter
from coterie.mixture import Mixture
from coterie.mixture.llama_cpp import LlamaCpp
from coterie.routers.fixed import one_hot, uniform

EXPERTS = 6
PROMPT = "Explain in simple words why the sky is blue during the day and red in the evening. " * 3


class WithoutExperts(LlamaCpp):
    """llama.cpp on the base model alone."""

    def _requests(self, examples: Any, settings: Any, top_k_experts: int | None) -> Iterator[Any]:
        for request in super()._requests(examples, settings, top_k_experts):
            request.fields["lora"] = []
            yield request


def main() -> None:
    """Run the ways in turn and print the result."""
    flags = arguments("llamacpp")
    rounds, steps = (2, 8) if flags.quick else (7, 48)
    backbone = load(flags.model)
    names = tuple(f"expert-{number}" for number in range(EXPERTS))
    adapters = tuple(load_adapter(random_adapter(backbone, seed), backbone.model) for seed in range(EXPERTS))
    combiner, prompts = make_combiner("layers"), PromptFormat(backbone.tokenizer)
    mixed = Mixture(backbone, ExpertBank(names, adapters), uniform(names), combiner, prompts, "none")
    endless = [f"{token}=-100" for token in backbone.stop_ids | prompts.end_ids]  # all write as many tokens
    per_token: dict[str, list[float]] = {}

    def timed(name: str, answering: Any) -> None:
        pieces = answering.stream(PROMPT, max_new_tokens=steps + 1, logit_bias=endless)
        times = [time.perf_counter() for _ in pieces]
        per_token.setdefault(name, []).append((times[-1] - times[0]) / (len(times) - 1))

    with (
        LlamaCpp(mixed) as six,
        LlamaCpp(mixed.replace(router=one_hot(names[0], names))) as one,
        WithoutExperts(mixed) as none,
    ):
        ways = {"six": six, "one": one, "none": none, "layers": mixed}
        interleaved({name: partial(timed, name, way) for name, way in ways.items()}, rounds)
    kept = {name: values[1:] for name, values in per_token.items()}
    publish(
        "llamacpp",
        {"model": flags.model, "experts": EXPERTS, "rank": 8, "steps": steps, "rounds": rounds},
        {f"{name}_seconds_per_token": statistics.median(values) for name, values in kept.items()},
        {
            "layers_over_six": median_ratio(kept["layers"], kept["six"]),
            "six_over_none": median_ratio(kept["six"], kept["none"]),
            "one_over_none": median_ratio(kept["one"], kept["none"]),
        },
    )


if __name__ == "__main__":
    main()

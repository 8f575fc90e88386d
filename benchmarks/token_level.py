"""Time per token of weights that are renewed while an answer is written, against fixed ones and the published way.

Four random adapters stand for four domains; the cost does not depend on their values. The published way embeds the
text, merges the adapters and runs the whole text without a cache, at every token; the text here is nearly as long as
the 256 tokens that it stops at. It knows no batches; `every1_batch` is the time for a token of one of eight requests
that are decoded together, each with weights of its own. `floor` is the time to read the base weights and the four
updates once from memory.
"""

import copy
import statistics
import time
from collections.abc import Iterator

import torch
from _harness import arguments, floor, interleaved, load, median_ratio, publish, random_adapter
from decode import plain_steps
from peft import PeftModel

from coterie.backbone.loading import Backbone
from coterie.combiners.layers import LayerCombiner
from coterie.data.batching import PromptFormat
from coterie.engine.engine import WHOLE_PROMPTS
from coterie.engine.request import Token
from coterie.experts.bank import ExpertBank, load_adapter
from coterie.mixture import Mixture
from coterie.routers.centroid import CentroidRouter
from coterie.routers.feature import growing_text_extractor
from coterie.routers.token import TokenLevel
from coterie.settings.groups import SamplingSettings

NAMES = ("maths", "science", "reading", "code")
BATCH = 8
PROMPT = "Explain in simple words why the sky is blue during the day and red in the evening. " * 9


def mixture_with(backbone: Backbone, bank: ExpertBank, encoder: str, every: int | None) -> Mixture:
    """Return a mixture whose experts have random centroids."""
    extractor, embedder = growing_text_extractor(encoder, None, backbone)
    generator = torch.Generator().manual_seed(0)
    centroids = {name: torch.randn(1, embedder.dimensions, generator=generator) for name in bank.names}
    router = TokenLevel(CentroidRouter.by_similarity(extractor, centroids), every)
    return Mixture(backbone, bank, router, LayerCombiner(), PromptFormat(backbone.tokenizer, end=""), "token-level")


def published_steps(model: PeftModel, mixture: Mixture) -> Iterator[int]:
    """Embed, merge with PEFT, run the whole text, delete the merged adapter; for every token."""
    row = mixture.tokens([PROMPT])[0]
    while True:
        weights = mixture.router.route([row]).weights[0].tolist()
        model.add_weighted_adapter(list(NAMES), weights, "now", combination_type="linear")
        model.set_adapter("now")
        logits = model(input_ids=torch.tensor([row.ids], device=model.device), use_cache=False, logits_to_keep=1).logits
        model.delete_adapter("now")
        token = int(logits[0, -1].argmax())
        yield token
        row = row.extended([token])


def batch_steps(mixture: Mixture) -> Iterator[int]:
    """Decode several requests together, one step at a time."""
    requests = mixture.requests(mixture.tokens([PROMPT] * BATCH), [1000] * BATCH, [SamplingSettings()])
    for token in mixture.engine(places=BATCH, chunk=WHOLE_PROMPTS).run(requests):
        if isinstance(token, Token) and token.request == BATCH - 1:
            yield token.id


def main() -> None:
    """Run the ways in turn and print the result."""
    flags = arguments("token_level")
    rounds, steps = (2, 4) if flags.quick else (5, 12)
    backbone = load(flags.model)
    backbone.__dict__["stop_ids"] = frozenset()  # with no end of turn either: all ways write the same number of tokens
    folder = random_adapter(backbone)
    adapter = load_adapter(folder, backbone.model)
    bank = ExpertBank(NAMES, (adapter,) * len(NAMES))
    merged = PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder).merge_and_unload().eval()
    peft = PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder, adapter_name=NAMES[0])
    for name in NAMES[1:]:
        peft.load_adapter(folder, adapter_name=name)
    peft.eval()
    ways = {
        "fixed": mixture_with(backbone, bank, "hidden", None),
        "every1": mixture_with(backbone, bank, "hidden", 1),
        "every2": mixture_with(backbone, bank, "hidden", 2),
        "every1_minilm": mixture_with(backbone, bank, "minilm", 1),
        "every2_minilm": mixture_with(backbone, bank, "minilm", 2),
    }
    sentence = ways["every1_minilm"]
    ids = list(sentence.tokens([PROMPT])[0].ids)
    makers = {
        "merged": lambda: plain_steps(merged, ids, 1),
        **{
            name: lambda mixture=mixture: (token.id for token in mixture.stream(PROMPT, max_new_tokens=steps + 1))
            for name, mixture in ways.items()
        },
        "every1_batch": lambda: batch_steps(ways["every1"]),
        "published": lambda: published_steps(peft, sentence),
    }
    per_token: dict[str, list[float]] = {name: [] for name in makers}

    def timed(name: str) -> None:
        source = makers[name]()
        next(source)  # the prefill
        started = time.perf_counter()
        for _ in range(steps):
            next(source)
        requests = BATCH if name == "every1_batch" else 1
        per_token[name].append((time.perf_counter() - started) / steps / requests)

    with torch.inference_mode():
        interleaved({name: lambda name=name: timed(name) for name in makers}, rounds)
    kept = {name: values[1:] for name, values in per_token.items()}
    medians = {f"{name}_seconds_per_token": statistics.median(values) for name, values in kept.items()}
    medians["floor_seconds_per_token"] = floor(backbone, adapter, len(NAMES))
    publish(
        "token_level",
        {
            "model": flags.model,
            "experts": len(NAMES),
            "rank": 8,
            "prompt_tokens": len(ids),
            "steps": steps,
            "rounds": rounds,
        },
        medians,
        {
            "every1_over_fixed": median_ratio(kept["every1"], kept["fixed"]),
            "every1_over_merged": median_ratio(kept["every1"], kept["merged"]),
            "every1_minilm_over_fixed": median_ratio(kept["every1_minilm"], kept["fixed"]),
            "every2_minilm_over_fixed": median_ratio(kept["every2_minilm"], kept["fixed"]),
            "published_over_every1": median_ratio(kept["published"], kept["every1"]),
            "published_over_every1_batch": median_ratio(kept["published"], kept["every1_batch"]),
            "published_over_every1_minilm": median_ratio(kept["published"], kept["every1_minilm"]),
        },
    )


if __name__ == "__main__":
    main()

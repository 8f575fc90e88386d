"""What `--quantize int8` gains and costs: time a token, and how far likelihoods and greedy tokens move.

`nll` is the mean negative log-likelihood per token of a few texts, `agreement` the share of positions at which the
likeliest token is the same, `kl` the mean divergence in nats of the model in 8 bits from the one in float32.
"""

import statistics
import time

import torch
from _harness import arguments, interleaved, median_ratio, publish
from transformers import DynamicCache

from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone, load_backbone
from coterie.settings.groups import ModelSettings

TEXTS = """The sky is blue because air scatters short waves of light more than long ones; at dusk it goes further.
---
Question: Tom has 3 boxes of 12 apples and eats 5. How many are left? Answer: 3 * 12 = 36, and 36 - 5 = 31.
---
def largest(numbers):
    best = numbers[0]
    for number in numbers:
        best = max(best, number)
    return best
---
Photosynthesis turns carbon dioxide and water into sugar and oxygen, with the energy of light that leaves take up.
---
Once upon a time there was a miller who had three sons, a mill, a donkey and a cat; the sons ground.""".split("---")


@torch.inference_mode()
def logprobs(backbone: Backbone, ids: list[int]) -> torch.Tensor:
    """Return the log-probabilities of all tokens behind every token but the last."""
    return backbone.head(backbone.hidden(torch.tensor([ids[:-1]]))[0]).log_softmax(dim=-1)


@torch.inference_mode()
def decode(backbone: Backbone, ids: list[int], steps: int) -> float:
    """Return the seconds that a token takes, after the prompt, without experts."""
    none = ExpertLayers(backbone.model, [{}])
    mix, cache = none.weighted(torch.ones(1, 1)), DynamicCache(config=backbone.model.config)
    taken = []
    inputs = torch.tensor([ids])
    for _ in range(steps + 2):
        started = time.perf_counter()
        with none.running(mix):
            hidden = backbone.hidden(inputs, cache=cache)
        inputs = backbone.head(hidden[:, -1]).argmax(dim=-1)[:, None]
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def main() -> None:
    """Compare the two and print the result."""
    flags = arguments("quantize")
    rounds, steps = (2, 5) if flags.quick else (5, 16)
    plain, held = (
        load_backbone(ModelSettings(model=flags.model, device="cpu", quantize=how)) for how in (None, "int8")
    )
    texts = [plain.tokenizer(text)["input_ids"] for text in TEXTS]
    nll: dict[str, list[float]] = {"plain": [], "int8": []}
    same, divergence = [], []
    for ids in texts:
        one, other = logprobs(plain, ids), logprobs(held, ids)
        targets = torch.tensor(ids[1:])[:, None]
        nll["plain"] += (-one.gather(1, targets)).flatten().tolist()
        nll["int8"] += (-other.gather(1, targets)).flatten().tolist()
        same += (one.argmax(dim=1) == other.argmax(dim=1)).tolist()
        divergence += (one.exp() * (one - other)).sum(dim=1).tolist()
    seconds: dict[str, list[float]] = {"plain": [], "int8": []}
    ways = {
        "plain": lambda: seconds["plain"].append(decode(plain, texts[0], steps)),
        "int8": lambda: seconds["int8"].append(decode(held, texts[0], steps)),
    }
    interleaved(ways, rounds)
    kept = {name: values[1:] for name, values in seconds.items()}
    medians = {f"{name}_seconds_per_token": statistics.median(values) for name, values in kept.items()}
    medians |= {f"{name}_nll": statistics.mean(values) for name, values in nll.items()}
    medians |= {"agreement": statistics.mean(same), "kl": statistics.mean(divergence)}
    settings = {"model": flags.model, "positions": len(same), "steps": steps, "rounds": rounds}
    publish("quantize", settings, medians, {"plain_over_int8": median_ratio(kept["plain"], kept["int8"])})


if __name__ == "__main__":
    main()

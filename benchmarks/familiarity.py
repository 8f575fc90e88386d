"""Which prompts a mixture would leave alone: familiar families and strange ones, by states of a real model.

    python benchmarks/familiarity.py DATA [--rows 144] [--output FILE]

DATA is a folder of data sets, as for `examples/evidence.py`. For each mix that is trained on, prompts of its own tests
should be answered, and those of sets that it has nothing of should not. The threshold is the one that loses a tenth of
the training rows, which is what the default caution allows where all gain alike. Rows are compared around the training
mean, as it was done before, and as they are.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _harness import hardware_record, tell

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from evidence_rows import MIXES, draw, draw_evenly, group
from torch import Tensor

from coterie.backbone.loading import Backbone, load_backbone
from coterie.data.batching import PromptFormat
from coterie.data.examples import load_examples
from coterie.features.prefill import POOLINGS, candidate_layers, prefill_states
from coterie.routers.refusal import CAUTION, Familiarity

EACH, LONGEST = 24, 420  # rows of a strange family; characters of a row
STRANGE = {
    "maths": ("boolq/validation", "arc_challenge/test", "dolly/train", "mmlu/test", "bbh/test", "codealpaca/train")
    + ("squad_v2/dev", "commonsenseqa/validation", "piqa/validation", "siqa/validation", "strategyqa/train")
    + ("medmcqa/test", "mbpp/test", "flan_cot/train"),
    "general": ("gsm8k/test", "squad_v2/dev", "piqa/validation", "siqa/validation", "mbpp/test", "bbh/test"),
}
"""Families that are in neither the training rows nor the sample that comes along."""


def around_mean(rows: Tensor) -> Familiarity:
    """Compare rows around their mean."""
    centre = rows.mean(dim=0)
    return Familiarity(torch.nn.functional.normalize(rows - centre, dim=-1), None, centre)


TOLD = ("inside answered", "strange answered", "of the worst family", "parted")
WAYS = {"around the mean": around_mean, "as they are": Familiarity.of}


def states(backbone: Backbone, rows: list[dict[str, Any]]) -> Tensor:
    """Return the states of some rows' prompts, (row, layer, pooling, width)."""
    prompts = PromptFormat(backbone.tokenizer, "")
    examples = [prompts.row(example).prompt() for example in load_examples(rows)]
    return prefill_states(backbone, examples, candidate_layers(backbone))


def answered(rows: Tensor, inside: Tensor, strange: list[Tensor], make: Callable[[Tensor], Familiarity]) -> list[float]:
    """Return the shares of new rows of the kind, and of strange ones, that are answered, and how well both part."""
    familiarity = make(rows)
    threshold, own = familiarity(rows).quantile(CAUTION), familiarity(inside)
    others = [familiarity(family) for family in strange]
    parted = [float((own[:, None] > family).float().mean()) for family in others]
    shares = [float((found >= threshold).float().mean()) for found in (own, *others)]
    return [shares[0], fmean(shares[1:]), max(shares[1:]), fmean(parted)]


def main() -> None:
    """Read the states of all rows, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=144, help="training rows of each mix, and as many tests")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    flags = parser.parse_args()
    backbone = load_backbone(flags.model)
    results: dict[str, Any] = {}
    for name, files in STRANGE.items():
        mix = MIXES[name]
        tests = draw_evenly(flags.data, mix.inside, flags.rows, LONGEST, 0, ())
        rows = draw_evenly(flags.data, mix.train, flags.rows, LONGEST, 0, {group(row) for row in tests})
        seen, inside = states(backbone, rows), states(backbone, tests)
        strange = [states(backbone, draw(flags.data, file, EACH, LONGEST, 5)) for file in files]
        kinds = product(enumerate(candidate_layers(backbone)), enumerate(POOLINGS))
        for (layer, block), (pool, pooling) in kinds:
            sides = seen[:, layer, pool], inside[:, layer, pool], [own[:, layer, pool] for own in strange]
            for way, make in WAYS.items():
                found = [round(number, 3) for number in answered(*sides, make)]
                results[f"{name}, block {block}, {pooling}, {way}"] = dict(zip(TOLD, found, strict=True))
    settings = {"rows": flags.rows, "each": EACH, "caution": CAUTION, "strange": STRANGE}
    tell({"name": "familiarity", "hardware": hardware_record(), "settings": settings, "results": results}, flags.output)


if __name__ == "__main__":
    main()

"""Which prompts a mixture would leave alone: familiar families and strange ones, by states of a real model.

    python benchmarks/familiarity.py DATA [--rows 144] [--output FILE]

DATA is a folder of data sets, as for `examples/evidence.py`. For each mix that is trained on, prompts of its own tests
should be answered, and those of sets that it has nothing of should not. The threshold is the one that loses a tenth of
the training rows, which is what the default caution allows where all gain alike. Rows are compared around the training
mean, as it was done before, as they are, and also with strangers: the sample that comes along, or rows of the sets that
the mix meets outside, of which others are tested ("told kinds").
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from _harness import hardware_record, tell

sys.path.append(str(Path(__file__).parents[1] / "examples"))
from evidence_rows import MIXES, UNLIKE_ROWS, draw, draw_evenly, group, read
from torch import Tensor

from coterie.backbone.loading import Backbone, load_backbone
from coterie.data.batching import PromptFormat
from coterie.data.examples import load_examples
from coterie.data.unlike import UNLIKE
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


def around_mean(rows: Tensor, _: Tensor | None) -> Familiarity:
    """Compare rows around their mean, and with no strangers."""
    centre = rows.mean(dim=0)
    return Familiarity(torch.nn.functional.normalize(rows - centre, dim=-1), None, centre)


def as_they_are(rows: Tensor, strangers: Tensor | None) -> Familiarity:
    """Compare rows as they are, and with strangers, where some are known."""
    return Familiarity.of(rows, strangers=strangers)


TOLD = ("inside answered", "strange answered", "of the worst family", "parted", "told kinds answered")
WAYS = {
    "around the mean": (around_mean, None),
    "as they are": (as_they_are, None),
    "beside the sample that comes along": (as_they_are, "sample"),
    f"beside {UNLIKE_ROWS} rows of the told kinds": (as_they_are, "told"),
}
"""By name: how rows are compared, and with which strangers."""


def states(backbone: Backbone, rows: list[dict[str, Any]]) -> Tensor:
    """Return the states of some rows' prompts, (row, layer, pooling, width)."""
    prompts = PromptFormat(backbone.tokenizer, "")
    examples = [prompts.row(example).prompt() for example in load_examples(rows)]
    return prefill_states(backbone, examples, candidate_layers(backbone))


def answered(
    familiarity: Familiarity, rows: Tensor, inside: Tensor, strange: list[Tensor], told: Tensor
) -> list[float]:
    """Return the shares answered of new rows of the kind and of strange ones, how well both part, and of told kinds."""
    threshold, own = familiarity(rows).quantile(CAUTION), familiarity(inside)
    others = [familiarity(family) for family in strange]
    parted = [float((own[:, None] > family).float().mean()) for family in others]
    shares = [float((found >= threshold).float().mean()) for found in (own, familiarity(told), *others)]
    return [shares[0], fmean(shares[2:]), max(shares[2:]), fmean(parted), shares[1]]


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
        known = {group(row) for row in [*tests, *rows]}
        outside = draw_evenly(flags.data, mix.outside, 2 * UNLIKE_ROWS, LONGEST, 0, known)
        seen, inside, sample = (states(backbone, own) for own in (rows, tests, read(UNLIKE)))
        given, other = states(backbone, outside).split(UNLIKE_ROWS)
        strange = [states(backbone, draw(flags.data, file, EACH, LONGEST, 5)) for file in files]
        kinds = product(enumerate(candidate_layers(backbone)), enumerate(POOLINGS))
        for (layer, block), (pool, pooling) in kinds:
            own, new, *families = (one[:, layer, pool] for one in (seen, inside, other, *strange))
            strangers = {None: None, "sample": sample[:, layer, pool], "told": given[:, layer, pool]}
            for way, (make, beside) in WAYS.items():
                found = answered(make(own, strangers[beside]), own, new, families[1:], families[0])
                results[f"{name}, block {block}, {pooling}, {way}"] = dict(
                    zip(TOLD, [round(number, 3) for number in found], strict=True)
                )
    settings = {"rows": flags.rows, "each": EACH, "caution": CAUTION, "strange": STRANGE}
    means = {}
    for name, way in product(STRANGE, WAYS):
        own = [found for key, found in results.items() if key.startswith(name) and key.endswith(way)]
        means[f"{name}, {way}"] = {told: round(fmean(found[told] for found in own), 3) for told in TOLD}
    results = {"mean over blocks and poolings": means, **results}
    tell({"name": "familiarity", "hardware": hardware_record(), "settings": settings, "results": results}, flags.output)


if __name__ == "__main__":
    main()

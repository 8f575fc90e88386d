"""Which prompts a mixture would leave alone: familiar families and strange ones, by states of a real model.

    python benchmarks/familiarity.py DATA [--rows 144] [--draws 3] [--output FILE]

DATA is a folder of data sets, as for `examples/evidence.py`. For each mix that is trained on, prompts of its own tests
should be answered, and those of sets that it has nothing of should not. The threshold is the one that loses a tenth of
the training rows, which is what the default caution allows where all gain alike. Rows are compared around the training
mean, as it was done before, as they are, and also with strangers: the sample that comes along, or rows of the sets that
the mix meets outside, of which others are tested ("told kinds"). They are described by one kind of states, as it was
done before (the mean over the eight kinds that `prefill` chooses among), and by those of the middle of the model.
"""

import argparse
import sys
from collections import defaultdict
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
from coterie.features.prefill import POOLINGS, candidate_layers, middle_layers, prefill_states, side_by_side
from coterie.routers.familiarity import Familiarity
from coterie.routers.refusal import CAUTION

EACH, LONGEST = 24, 420  # rows of a strange family; characters of a row
STRANGE = {
    "maths": ("boolq/validation", "arc_challenge/test", "dolly/train", "mmlu/test", "bbh/test", "codealpaca/train")
    + ("squad_v2/dev", "commonsenseqa/validation", "piqa/validation", "siqa/validation", "strategyqa/train")
    + ("medmcqa/test", "mbpp/test", "flan_cot/train"),
    "general": ("gsm8k/test", "squad_v2/dev", "piqa/validation", "siqa/validation", "mbpp/test", "bbh/test"),
    "domains": ("boolq/validation", "dolly/train", "mmlu/test", "piqa/validation", "siqa/validation", "bbh/test")
    + ("commonsenseqa/validation", "mbpp/test", "flan_cot/train", "medmcqa/test", "mathqa/test"),
}
"""Families that are in neither the training rows nor the sample that comes along."""


def around_mean(rows: Tensor, _: Tensor | None) -> Familiarity:
    """Compare rows around their mean, and with no strangers."""
    centre = rows.mean(dim=0)
    return Familiarity(torch.nn.functional.normalize(rows - centre, dim=-1), None, centre)


def as_they_are(rows: Tensor, strangers: Tensor | None) -> Familiarity:
    """Compare rows as they are, and with strangers, where some are known."""
    return Familiarity.of(rows, strangers=strangers)


MIDDLE = "middle"
TOLD = ("inside answered", "strange answered", "of the worst family", "parted", "told kinds answered")
WAYS = {
    "around the mean": (around_mean, None),
    "as they are": (as_they_are, None),
    "beside the sample that comes along": (as_they_are, "sample"),
    f"beside {UNLIKE_ROWS} rows of the told kinds": (as_they_are, "told"),
}
"""By name: how rows are compared, and with which strangers."""


def descriptions(backbone: Backbone, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Return what describes some rows' prompts, by its name: one kind of states, or those of the model's middle."""
    prompts, layers = PromptFormat(backbone.tokenizer, ""), candidate_layers(backbone)
    examples = [prompts.row(example).prompt() for example in load_examples(rows)]
    states = prefill_states(backbone, examples, layers)
    kinds = product(enumerate(layers), enumerate(POOLINGS))
    found = {f"block {block}, {pooling}": states[:, layer, pool] for (layer, block), (pool, pooling) in kinds}
    return {**found, MIDDLE: side_by_side(states[:, [layers.index(block) for block in middle_layers(backbone)]])}


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
    parser.add_argument("--draws", type=int, default=3, help="of the rows, over which the shares are averaged")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    flags = parser.parse_args()
    backbone = load_backbone(flags.model)
    sample, found = descriptions(backbone, read(UNLIKE)), defaultdict(list)
    for (name, files), seed in product(STRANGE.items(), range(flags.draws)):
        mix = MIXES[name]
        tests = draw_evenly(flags.data, mix.inside, flags.rows, mix.longest, seed, ())
        rows = draw_evenly(flags.data, mix.train, flags.rows, mix.longest, seed, {group(row) for row in tests})
        known = {group(row) for row in [*tests, *rows]}
        outside = draw_evenly(flags.data, mix.outside, 2 * UNLIKE_ROWS, mix.longest, seed, known)
        seen, inside, other = (descriptions(backbone, own) for own in (rows, tests, outside))
        strange = [descriptions(backbone, draw(flags.data, file, EACH, LONGEST, 5 + seed)) for file in files]
        for (kind, own), (way, (make, beside)) in product(seen.items(), WAYS.items()):
            given, told = other[kind].split([UNLIKE_ROWS, len(other[kind]) - UNLIKE_ROWS])
            strangers = {None: None, "sample": sample[kind], "told": given}[beside]
            shares = answered(make(own, strangers), own, inside[kind], [one[kind] for one in strange], told)
            found[f"{name}, {'middle' if kind == MIDDLE else 'one kind'}, {way}"].append(shares)
    results = {
        key: {told: round(fmean(own), 3) for told, own in zip(TOLD, zip(*shares, strict=True), strict=True)}
        for key, shares in found.items()
    }
    settings = {"rows": flags.rows, "draws": flags.draws, "each": EACH, "caution": CAUTION, "strange": STRANGE}
    tell({"name": "familiarity", "hardware": hardware_record(), "settings": settings, "results": results}, flags.output)


if __name__ == "__main__":
    main()

"""What cheaper features of prompts cost, and which share of the oracle's gain a router that reads them captures.

    python benchmarks/feature_share.py RUN [--rows 16] [--output FILE]

RUN is a run of `coterie fit auto`: its training rows, its checkpoints, and the losses of its experts on rows that their
copies were not trained on. For Adam's steps (ELREA) and plain gradients, of all blocks or of the last ones, whole or
in their strongest directions (GIST), and for hidden states, a router is fitted to the losses; its share of what the
oracle gains over the base adapter is cross-validated. Seconds are of making features, alternately, as ratios to Adam's
of all blocks; directions need no labels, so they are those of all rows.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from _harness import hardware_record, seconds_of, tell
from torch import Tensor

from coterie.data.batching import TokenRow
from coterie.experts.checkpoint import load_checkpoint
from coterie.features.gradient import GradientFeatures, counted_blocks
from coterie.features.prefill import candidate_layers
from coterie.features.subspace import strongest_directions
from coterie.methods.elrea.run import ElreaRun
from coterie.methods.extras import load_extra, read_losses
from coterie.mixture import Mixture
from coterie.routers.feature import prefill_extractor
from coterie.routers.loss import CrossFitLosses, fit_loss_router
from coterie.settings.groups import ExtrasSettings, FeatureSettings

PAIRS = 3  # timings of every way
DIRECTIONS = (None, 16, 64)


class Way(NamedTuple):
    """A kind of features, and what makes them of rows."""

    name: str
    make: Callable[[list[TokenRow]], Tensor]


def ways(run: ElreaRun) -> Iterator[Way]:
    """Yield the kinds of features, those of the paper first."""
    backbone = run.mixture.backbone
    depth = len(backbone.blocks)
    folders = sorted((run.folder / "checkpoints").glob("epoch-*"))
    checkpoints = [load_checkpoint(folder, backbone.model) for folder in folders]
    counts = sorted({max(1, depth // part) for part in (2, 4, 8)} | {1}, reverse=True)
    for form in ("adam", "sgd"):
        for blocks in ("all", *(f"last:{count}" for count in counts if count < depth)):
            assert counted_blocks(blocks, depth)
            settings = FeatureSettings(form=form, blocks=blocks)
            yield Way(f"{form}, {blocks}", GradientFeatures(backbone, checkpoints, settings, run.settings.seed))
    for layer in candidate_layers(backbone):
        yield Way(f"states behind block {layer}", prefill_extractor(backbone, layer, "last"))


def share(features: Tensor, losses: CrossFitLosses, seed: int) -> float:
    """Return which share of the oracle's gain over the base a router that reads these features has, cross-validated."""
    weights = losses.tokens / losses.tokens.sum()
    base = float(losses.nll[:, losses.experts.index("base")] @ weights)
    oracle = float(losses.nll.amin(dim=1) @ weights)
    found = fit_loss_router([features - features.mean(dim=0)], losses, seed=seed).expected_nll
    return (base - found) / (base - oracle)


def main() -> None:
    """Make all features, fit a router to each, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=16, help="rows that are timed")
    parser.add_argument("--output", type=Path, help="also write the result to this JSON file")
    flags = parser.parse_args()
    run = ElreaRun.open(Mixture.from_pretrained(flags.run), ExtrasSettings())
    losses, prompts = read_losses(load_extra(run.mixture, "judged")), [row.prompt() for row in run.kept.rows]
    found, timed = list(ways(run)), prompts[: flags.rows]
    seconds: dict[str, list[float]] = {way.name: [] for way in found}
    for _ in range(PAIRS):
        for way in found:
            seconds[way.name].append(seconds_of(lambda way=way: way.make(timed)))
    medians = {name: statistics.median(own) for name, own in seconds.items()}
    first, results = next(iter(medians.values())), {}
    for way in found:
        features = way.make(prompts).cpu()
        shares = {}
        for count in DIRECTIONS if "states" not in way.name else (None,):
            unit = torch.nn.functional.normalize(features - features.mean(dim=0), dim=-1)
            seen = features if count is None else features @ strongest_directions(unit, count).T
            shares["all" if count is None else str(count)] = round(share(seen, losses, run.settings.seed), 3)
        results[way.name] = {"seconds_to_adam_all": round(medians[way.name] / first, 3), "share": shares}
    settings = {"run": flags.run.name, "rows": len(prompts), "timed": len(timed)}
    tell(
        {"name": "feature_share", "hardware": hardware_record(), "settings": settings, "results": results}, flags.output
    )


if __name__ == "__main__":
    main()

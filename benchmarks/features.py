"""Tokens per second of gradient features (Adam form and projection included), against two obvious ways.

`training`: a plain LoRA forward and backward through PEFT on the same batches, without optimiser step or projection.
`loop`: one example at a time: PEFT's own gradients flattened, Adam form, and the fast projection used here.
`less_loop`: the same loop with the dense +-1 projection that LESS has, generated in blocks. Its cost is linear in the
number of elements, so it is timed on a slice of them and scaled up; the whole would take many minutes on a CPU.
"""

import copy
import random
import statistics
from pathlib import Path

import torch
from _harness import arguments, interleaved, load, median_ratio, publish, random_adapter
from peft import PeftModel

from coterie.backbone.loading import Backbone
from coterie.data.batching import TokenRow, pad
from coterie.experts.bank import load_adapter
from coterie.features.gradient import AdamState, Checkpoint, GradientFeatures, Moments, adam_step, loss_weights
from coterie.features.projection import RademacherProjection, SketchProjection
from coterie.settings.groups import FeatureSettings

DENSE_SLICE = 256  # the dense projection is timed on one element in this many
LENGTH = 96
BATCH = 8


def rows_of(count: int, backbone: Backbone) -> list[TokenRow]:
    """Make prompts of ordinary text, all of one length, whose every token carries loss."""
    words = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8").split()
    generator = random.Random(0)
    rows = []
    for _ in range(count):
        text = " ".join(generator.choices(words, k=LENGTH))
        ids = tuple(backbone.tokenizer(text)["input_ids"][:LENGTH])
        rows.append(TokenRow(ids, LENGTH, (False,) * LENGTH, (True,) * LENGTH))
    return rows


def training_pass(model: PeftModel, rows: list[TokenRow]) -> None:
    """One forward and backward per batch, as training does it."""
    for start in range(0, len(rows), BATCH):
        batch = pad([row.ids for row in rows[start : start + BATCH]], 0, device=model.device)
        model(input_ids=batch.input_ids, labels=batch.input_ids).loss.backward()
        model.zero_grad()


def loop(model: PeftModel, rows: list[TokenRow], state: AdamState, projection: SketchProjection) -> None:
    """One example at a time: all gradients flattened and concatenated, Adam form, projection."""
    for row in rows:
        ids = torch.tensor([row.ids], device=model.device)
        model(input_ids=ids, labels=ids).loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        projection("all", adam_step(gradient, "all", state)[None])
        model.zero_grad()


def main() -> None:
    """Run the three ways in turn and print the result."""
    flags = arguments("features")
    rounds, count = (2, BATCH) if flags.quick else (5, 2 * BATCH)
    backbone = load(flags.model)
    folder = random_adapter(backbone)
    loaded = load_adapter(folder, backbone.model)
    model = PeftModel.from_pretrained(copy.deepcopy(backbone.model), folder, is_trainable=True).eval()
    checkpoint = Checkpoint(loaded, _state(model))
    features = GradientFeatures(backbone, [checkpoint], FeatureSettings(feature_batch_size=BATCH))
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    device = backbone.device
    flat = Moments(torch.randn(size, device=device) * 1e-4, torch.rand(size, device=device) * 1e-6)
    adam = AdamState({"all": flat}, 10, 1e-4, (0.9, 0.999), 1e-8)
    projection = SketchProjection(FeatureSettings().d_proj)
    rows = rows_of(count, backbone)
    _same_loss_positions(backbone, rows)
    dense = RademacherProjection(projection.d_proj)
    slice_of_rows = torch.randn(count, size // DENSE_SLICE, device=device)
    seconds = interleaved(
        {
            "training": lambda: training_pass(model, rows),
            "features": lambda: features(rows),
            "loop": lambda: loop(model, rows, adam, projection),
            "dense_slice": lambda: dense("slice", slice_of_rows),
        },
        rounds,
    )
    tokens = count * LENGTH
    pairs = zip(seconds["loop"], seconds.pop("dense_slice"), strict=True)
    seconds["less_loop"] = [one + DENSE_SLICE * other for one, other in pairs]
    publish(
        "features",
        {
            "model": flags.model,
            "rank": 8,
            "tokens": tokens,
            "length": LENGTH,
            "batch": BATCH,
            "d_proj": projection.d_proj,
        },
        {f"{name}_tokens_per_second": tokens / statistics.median(values) for name, values in seconds.items()},
        {
            "features_over_training_speed": median_ratio(seconds["training"], seconds["features"]),
            "features_over_loop": median_ratio(seconds["loop"], seconds["features"]),
            "features_over_less_loop": median_ratio(seconds["less_loop"], seconds["features"]),
        },
    )


def _state(model: PeftModel) -> AdamState:
    """Make a state of Adam with random moments, under the names that features use."""
    moments = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            moments[plain] = Moments(torch.randn_like(parameter) * 1e-4, torch.rand_like(parameter) * 1e-6)
    return AdamState(moments, 10, 1e-4, (0.9, 0.999), 1e-8)


def _same_loss_positions(backbone: Backbone, rows: list[TokenRow]) -> None:
    """Make sure that all ways backpropagate from every position but the last."""
    batch = pad([rows[0].ids], 0)
    if int((loss_weights(rows[:1], batch, "user-text") > 0).sum()) != LENGTH - 1:
        raise SystemExit("features leave out positions that training counts")


if __name__ == "__main__":
    main()

"""Prompts described by the gradient of their own loss with respect to a LoRA adapter (ELREA, arXiv 2502.00089, 3.2).

For a linear layer with input x (T, I) and output gradient g (T, O), one example's gradients of the LoRA factors are
sums of outer products: dL/dA = (g B s).T x and dL/dB = s g.T (x A.T). They are formed for a whole batch at once from
what one backward pass brings by, turned into the step that Adam would take, projected, added up and dropped: no more
than one layer's gradients of one batch exist at any time.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coterie import ranks
from coterie.artifacts import fill_matrix, new_matrix, read_floats, read_tensors, write_tensors
from coterie.backbone.adding import swapped
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import Backbone
from coterie.data.batching import Batch, TokenRow, by_length, pad
from coterie.data.devices import on_device
from coterie.errors import CoterieError
from coterie.features.projection import Projection, make_projection
from coterie.lora import Adapter
from coterie.progress import part, steps, whole
from coterie.settings.groups import FeatureSettings

FEATURES_FILE = "features.safetensors"
SHARD_ROWS = 64  # rows between two writes: what an interruption costs at most
SHARDS_MOVED = 64  # into the one file between two waits for the disk
NOBODY = TokenRow((0,), 1, (False,), (False,))  # read by a process that has no row, for its part in others' passes
LOGIT_ELEMENTS = 1 << 26  # logits that exist at once (256 MiB in float32)


class Moments(NamedTuple):
    """Adam's running means of one parameter's gradient and squared gradient."""

    mean: Tensor
    square: Tensor


@dataclass(frozen=True)
class AdamState:
    """What Adam knew at the end of an epoch.

    Attributes:
        moments: by `<module path>.lora_A` and `.lora_B`, in PEFT's layouts (R, I) and (O, R).
        steps: optimiser steps taken.
        learning_rate: mean over the epoch (the rate at its end is 0 after the last one).
        betas: decay rates.
        eps: added to the root.
    """

    moments: Mapping[str, Moments]
    steps: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class Checkpoint:
    """The base adapter at the end of an epoch, and Adam's state there."""

    adapter: Adapter
    adam: AdamState


def adam_step(gradient: Float[Tensor, "*shape"], name: str, state: AdamState) -> Float[Tensor, "*shape"]:
    """Return the step (to be subtracted) that Adam would take next for this gradient alone (ELREA eq. 5).

    Ordinary bias correction: m' = (b1 m + (1 - b1) g) / (1 - b1^t), v' likewise, step = lr m' / (sqrt(v') + eps), with
    t one more than the steps taken. The leading axes of `gradient` may run over examples.
    """
    mean, square = state.moments[name]
    beta1, beta2 = state.betas
    t = state.steps + 1
    scale1, scale2 = 1 / (1 - beta1**t), 1 / (1 - beta2**t)
    root = torch.addcmul(square * (beta2 * scale2), gradient, gradient, value=(1 - beta2) * scale2)
    root = root.sqrt_().add_(state.eps)
    step = torch.add(mean * (beta1 * scale1), gradient, alpha=(1 - beta1) * scale1)
    return step.div_(root).mul_(state.learning_rate)


def counted_blocks(blocks: str, depth: int) -> range:
    """Return the numbers of the blocks whose gradients count, for `all` or `last:K`.

    Raises:
        CoterieError: for anything else, or more blocks than there are.
    """
    if blocks == "all":
        return range(depth)
    kind, _, count = blocks.partition(":")
    if kind != "last" or not count.isdigit() or not 1 <= int(count) <= depth:
        raise CoterieError(
            f"blocks must be all or last:K with K from 1 to {depth}, got {blocks!r}; type: --blocks last:1"
        )
    return range(depth - int(count), depth)


class GradientFeatures:
    """Turns prompts into projected gradient features, averaged over checkpoints (ELREA eq. 5-7)."""

    def __init__(
        self, backbone: Backbone, checkpoints: Sequence[Checkpoint], settings: FeatureSettings, seed: int = 0
    ) -> None:
        """Prepare one attachable adapter per checkpoint, of which there is one an epoch; the seed is the projection's.

        Raises:
            CoterieError: for blocks that the model does not have, or in which no adapted layer lies.
        """
        self.backbone = backbone
        self.settings = settings
        self.projection: Projection = make_projection(settings.projection, settings.d_proj, seed)
        self._blocks = counted_blocks(settings.blocks, len(backbone.blocks))
        inside = {id(module) for number in self._blocks for module in backbone.blocks[number].modules()}
        named = dict(backbone.model.named_modules())
        self._counted = frozenset(path for path in checkpoints[0].adapter if id(named[path]) in inside)
        if not self._counted:
            raise CoterieError(f"the adapter changes no layer of the blocks {settings.blocks!r}; use --blocks all")
        self._checkpoints = [(point, ExpertLayers(backbone.model, [point.adapter])) for point in checkpoints]

    def __call__(self, rows: Sequence[TokenRow]) -> Float[Tensor, "row d_proj"]:
        """Return un-normalised features, one row each, in float32 on the base model's device.

        Shapes: N prompts -> (N, d_proj). A row's feature does not depend on the other rows or on padding. Several
        processes share the batches.
        """
        result = torch.zeros(len(rows), self.settings.d_proj, device=self.backbone.device)
        batches = ranks.share(by_length(rows, self.settings.feature_batch_size))
        with steps("gradients of prompts" if len(rows) > SHARD_ROWS else "", len(rows), "prompt") as done:
            for numbers in batches:
                batch = [rows[i] for i in numbers] or [NOBODY]
                for checkpoint, layers in self._checkpoints:
                    found = self._batch(batch, checkpoint, layers) / len(self._checkpoints)
                    if numbers:
                        result.index_add_(0, on_device(numbers, result.device), found)
                done(len(numbers))
        return ranks.summed(result)

    def _batch(self, rows: Sequence[TokenRow], checkpoint: Checkpoint, layers: ExpertLayers) -> Tensor:
        batch = pad([row.ids for row in rows], self.backbone.pad_id, device=self.backbone.device)
        weights = loss_weights(rows, batch, self.settings.loss_on)
        total = torch.zeros(len(rows), self.settings.d_proj, device=self.backbone.device)
        collector = _Collector(checkpoint, layers, self._counted, self.projection, self.settings.form, total)
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(layers.running(layers.weighted(torch.ones(len(rows), 1)), watch=collector.keep_input))
            first = self.backbone.blocks[self._blocks.start]
            stack.enter_context(swapped({first: partial(_start_graph, first.forward)}))
            _backward(self.backbone, batch, weights)
        collector.finish()
        return total


def _start_graph(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:  # noqa: ANN401 - a block's own
    """Start the autograd graph at a block's input: nothing before it needs a gradient."""
    if inputs:
        return forward(inputs[0].detach().requires_grad_(), *inputs[1:], **options)
    return forward(**{**options, "hidden_states": options["hidden_states"].detach().requires_grad_()})


def loss_weights(rows: Sequence[TokenRow], batch: Batch, loss_on: str) -> Float[Tensor, "row position"]:
    """Weigh the prediction made at every position so that each row's loss is the mean over its counted tokens.

    Position t predicts token t + 1; a row's first token is predicted by nothing. The weights are on the CPU.
    """
    weights = torch.zeros(batch.input_ids.shape)
    for number, row in enumerate(rows):
        prompt = [not answer for answer in row.is_response]
        counted = {"user-text": row.is_user_text, "prompt": prompt, "response": row.is_response}[loss_on]
        flags = torch.tensor(counted[1:], dtype=torch.float)
        weights[number, : len(flags)] = flags / flags.sum().clamp(min=1)
    return weights


def _backward(backbone: Backbone, batch: Batch, weights: Float[Tensor, "row position"]) -> None:
    """Backpropagate the weighted loss; the output layer sees only positions with loss, a bounded number at a time."""
    hidden = backbone.hidden(*batch)
    places = weights.flatten().nonzero().squeeze(1)  # found on the host, so that nobody waits for the device
    counted, weighed = on_device(places, hidden.device), on_device(weights.flatten()[places], hidden.device)
    targets = batch.input_ids.roll(-1, dims=1).flatten()[counted]
    states = hidden.flatten(0, 1).index_select(0, counted)
    leaf = states.detach().requires_grad_()
    size = max(1, LOGIT_ELEMENTS // backbone.output_layer.out_features)
    pieces = zip(leaf.split(size), targets.split(size), weighed.split(size), strict=True)
    for piece, target, weight in pieces:
        loss = nn.functional.cross_entropy(backbone.head(piece), target, reduction="none")
        (loss * weight).sum().backward()
    if leaf.grad is not None or ranks.is_sharded():  # None when no row has a token that something predicts
        states.backward(torch.zeros_like(states) if leaf.grad is None else leaf.grad)


@dataclass(frozen=True)
class _Collector:
    """Listens to a backward pass and adds up the projected directions of every row."""

    checkpoint: Checkpoint
    layers: ExpertLayers
    counted: frozenset[str]
    projection: Projection
    form: str
    total: Float[Tensor, "row d_proj"]
    calls: Counter[str] = field(default_factory=Counter)
    """How often each layer ran in the forward pass."""
    held: dict[str, Tensor] = field(default_factory=dict)
    """Gradients so far of layers that ran more than once: the directions of the parts are not those of the sum."""

    def keep_input(
        self, path: str, x: Float[Tensor, "row position in"], output: Float[Tensor, "row position out"]
    ) -> None:
        """Keep the input of a layer in the forward pass, until the gradient of its output comes by."""
        if path not in self.counted or not output.requires_grad:  # it may run in a block before those that count
            return
        x = x.detach()
        self.calls[path] += 1
        output.register_hook(lambda gradient: self.collect(path, x, gradient))

    @torch.no_grad()
    def collect(self, path: str, x: Float[Tensor, "row position in"], g: Float[Tensor, "row position out"]) -> None:
        """Form the gradients of a layer's two factors, and add up what they become."""
        x, g = x.float(), g.float()
        down, up = (half[0].float() for half in self.layers.stack(path))
        gradients = {
            f"{path}.lora_A": (g @ up.T).mT @ x,  # [row, R, I]
            f"{path}.lora_B": g.mT @ (x @ down.T) * self.checkpoint.adapter[path].scaling,  # [row, O, R]
        }
        for name, gradient in gradients.items():
            if self.calls[path] == 1:
                self.add(name, gradient)
            else:
                self.held[name] = self.held.get(name, 0) + gradient

    def add(self, name: str, gradient: Float[Tensor, "row first second"]) -> None:
        """Add one parameter's part to every row's feature."""
        direction = gradient if self.form == "sgd" else adam_step(gradient, name, self.checkpoint.adam)
        self.total.add_(self.projection(name, direction.flatten(1)).to(self.total.device))

    def finish(self) -> None:
        """Add what was held until the backward pass is over."""
        for name, gradient in self.held.items():
            self.add(name, gradient)


def write_features(features: GradientFeatures, rows: Sequence[TokenRow], folder: Path) -> None:
    """Compute features of many rows into `folder/features.safetensors`, in the order of the rows.

    Finished shards stay in the folder until all are there, so an interrupted run goes on where it stopped; since the
    rows of every batch are fixed, it ends with the same numbers. Then they move into the one file, some at a time.
    Several processes share the shards.
    """
    shards = {f"{number:05d}": shard for number, shard in enumerate(by_length(rows, SHARD_ROWS))}
    tokens = {number: float(sum(len(rows[i].ids) for i in shard)) for number, shard in shards.items()}
    names = {number: f"gradient features, part {int(number) + 1} of {len(shards)}" for number in shards}
    files = {folder / f"{number}.safetensors": shard for number, shard in shards.items()}
    joined = folder / "joined.safetensors"

    def compute(number: str) -> None:
        file = folder / f"{number}.safetensors"
        with part(names[number]):
            if not ranks.by_first(lambda: file.exists() or joined.exists()):
                write_tensors(file, {"features": features([rows[i] for i in shards[number]])})

    def join() -> None:
        if not joined.exists():
            new_matrix(joined, "features", (len(rows), features.settings.d_proj))
        left = [file for file in files if file.exists()]
        for start in range(0, len(left), SHARDS_MOVED):
            moved = left[start : start + SHARDS_MOVED]
            fill_matrix(joined, ((files[file], read_tensors(file)["features"]) for file in moved))
            for file in moved:
                file.unlink()
        joined.rename(folder / FEATURES_FILE)

    with whole("gradient features", {names[number]: weight for number, weight in tokens.items()}):
        ranks.spread({number: partial(compute, number) for number in shards}, tokens, "parts of gradient features")
    ranks.by_first(join)


def read_features(folder: Path, rows: int | None, advice: str) -> Float[Tensor, "row d_proj"]:
    """Return the features that a folder holds, mapped into memory: a page of them is read when it is needed.

    Args:
        folder: that `write_features` wrote to.
        rows: how many there have to be; None for any number.
        advice: what to do where they are not as they should be.

    Raises:
        CoterieError: when the file is missing, broken, or not of as many rows.
    """
    return read_floats(folder / FEATURES_FILE, {"features": (rows, None)}, advice, max_bytes=sys.maxsize)["features"]


@dataclass(frozen=True)
class CentredRows:
    """Features less a centre, which is subtracted from the rows that are read."""

    rows: Float[Tensor, "row dimension"]
    centre: Float[Tensor, " dimension"]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    def __getitem__(self, rows: slice | Int[np.ndarray, " row"]) -> Float[Tensor, "row dimension"]:
        """Read some rows."""
        return self.rows[rows] - self.centre

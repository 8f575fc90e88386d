"""Gradient features equal what autograd and Adam give example by example."""

from contextlib import nullcontext

import pytest
import torch

from coterie.backbone.loading import Backbone
from coterie.data.batching import PromptFormat, TokenRow
from coterie.data.examples import Example, Message
from coterie.errors import CoterieError
from coterie.experts.checkpoint import load_checkpoint
from coterie.features import gradient
from coterie.features.gradient import GradientFeatures, adam_step
from coterie.routers import centroid
from coterie.settings.groups import FeatureSettings
from helpers import KeepsEverything, adams_step, autograd_gradients, normal, peft_factors

TEXTS = [
    "add 1 2",
    "SPELL WORD NOW, and then some more of it",
    "x",
    "?? (A) one (B) two ??",
    "tell me a long story about it",
]


def rows_for(backbone: Backbone) -> list[TokenRow]:
    prompts = PromptFormat(backbone.tokenizer)
    return [prompts.row(Example(str(i), (Message("user", text),))) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def checkpoint_folder(run_folder):
    return run_folder / "checkpoints" / "epoch-0"


@pytest.fixture(scope="module")
def checkpoint(checkpoint_folder, backbone):
    return load_checkpoint(checkpoint_folder, backbone.model)


def unprojected(backbone, checkpoint, **settings) -> tuple[GradientFeatures, KeepsEverything]:
    features = GradientFeatures(backbone, [checkpoint], FeatureSettings(**settings))
    sizes = {name: moments.mean.numel() for name, moments in checkpoint.adam.moments.items()}
    features.projection = KeepsEverything(sizes)
    features.settings = features.settings.model_copy(update={"d_proj": features.projection.d_proj})
    return features, features.projection


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_gradients_equal_a_loop_of_autograd(
    backbone, checkpoint, checkpoint_folder, batch_size, side, monkeypatch
):
    padder = gradient.pad
    monkeypatch.setattr(gradient, "pad", lambda rows, pad_id, **kw: padder(rows, pad_id, side=side, length=90, **kw))
    monkeypatch.setattr(gradient, "loss_weights", shifted_weights(side, gradient.loss_weights))
    features, layout = unprojected(backbone, checkpoint, form="sgd", feature_batch_size=batch_size)
    rows = rows_for(backbone)
    found = features(rows)
    model, parameters = peft_factors(backbone.model, checkpoint_folder)
    for number, row in enumerate(rows):
        expected = autograd_gradients(model, parameters, row)
        for name, values in expected.items():
            start = layout.offsets[name]
            got = found[number, start : start + values.numel()].view(values.shape)
            torch.testing.assert_close(got, values, rtol=1e-4, atol=1e-6)


def shifted_weights(side, original):
    """Loss weights are made for padding on the right; move them with the tokens for padding on the left."""

    def weights(rows, batch, loss_on):
        found = original(rows, batch, loss_on)
        if side == "right":
            return found
        width = batch.input_ids.shape[1]
        return torch.stack([found[i].roll(width - len(row.ids)) for i, row in enumerate(rows)])

    return weights


def test_the_adam_form_is_the_step_that_torch_takes_from_the_saved_state(backbone, checkpoint, checkpoint_folder):
    features, layout = unprojected(backbone, checkpoint, form="adam")
    rows = rows_for(backbone)
    found = features(rows)
    model, parameters = peft_factors(backbone.model, checkpoint_folder)
    for number, row in enumerate(rows):
        gradients = autograd_gradients(model, parameters, row)
        for name, parameter in parameters.items():
            start = layout.offsets[name]
            got = found[number, start : start + parameter.numel()].view(parameter.shape)
            wanted = adams_step(parameter, gradients[name], name, checkpoint.adam)
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-6)


def test_a_row_alone_equals_the_row_in_a_batch(backbone, checkpoint):
    features = GradientFeatures(backbone, [checkpoint], FeatureSettings(d_proj=512))
    rows = rows_for(backbone)
    together = features(rows)
    alone = torch.cat([features([row]) for row in rows])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-7)


def test_features_are_the_mean_over_checkpoints(backbone, run_folder):
    points = [load_checkpoint(run_folder / "checkpoints" / f"epoch-{e}", backbone.model) for e in (0, 1)]
    rows = rows_for(backbone)
    both = GradientFeatures(backbone, points, FeatureSettings(d_proj=128))(rows)
    each = [GradientFeatures(backbone, [point], FeatureSettings(d_proj=128))(rows) for point in points]
    torch.testing.assert_close(both, (each[0] + each[1]) / 2, rtol=1e-4, atol=1e-7)


def test_last_blocks_are_the_part_of_the_full_gradient_that_lies_in_them(backbone, checkpoint):
    rows = rows_for(backbone)
    full, layout = unprojected(backbone, checkpoint, form="sgd")
    last, _ = unprojected(backbone, checkpoint, form="sgd", blocks="last:1")
    expected, found = full(rows), last(rows)
    for name, start in layout.offsets.items():
        size = checkpoint.adam.moments[name].mean.numel()
        part = expected[:, start : start + size] if ".layers.1." in name else torch.zeros(len(rows), size)
        torch.testing.assert_close(found[:, start : start + size], part, rtol=1e-4, atol=1e-7)


def test_text_of_the_template_and_the_system_prompt_carries_no_loss(backbone):
    row = rows_for(backbone)[0]
    batch = gradient.pad([row.ids], 0)
    weights = gradient.loss_weights([row], batch, "user-text")[0]
    predicted = [row.ids[t + 1] for t in range(len(row.ids) - 1) if weights[t] > 0]
    assert backbone.tokenizer.decode(predicted) == TEXTS[0]
    assert weights.sum().item() == pytest.approx(1)
    everything = gradient.loss_weights([row], batch, "prompt")[0]
    assert int((everything > 0).sum()) == len(row.ids) - 1


def test_base_weights_and_hooks_are_as_before_after_features(backbone, checkpoint):
    before = {name: parameter.clone() for name, parameter in backbone.model.named_parameters()}
    GradientFeatures(backbone, [checkpoint], FeatureSettings(d_proj=64))(rows_for(backbone))
    assert all(torch.equal(before[name], parameter) for name, parameter in backbone.model.named_parameters())
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in backbone.model.modules())


def test_interrupted_features_end_with_the_same_numbers(backbone, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(gradient, "SHARD_ROWS", 2)
    features = GradientFeatures(backbone, [checkpoint], FeatureSettings(d_proj=64))
    rows = rows_for(backbone)
    whole, broken, told = tmp_path / "whole", tmp_path / "broken", []
    whole.mkdir(), broken.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(gradient, "part", lambda name: told.append(name) or nullcontext())
        gradient.write_features(features, rows, whole)
    assert told[:2] == [f"gradient features, part {number} of {len(told)}" for number in (1, 2)]
    computed = []

    def stops_at_the_second(shard):
        computed.append(shard)
        if len(computed) == 2:
            raise KeyboardInterrupt
        return features(shard)

    class Interrupted(GradientFeatures):
        def __init__(self):
            self.settings = features.settings

        def __call__(self, shard):
            return stops_at_the_second(shard)

    with pytest.raises(KeyboardInterrupt):
        gradient.write_features(Interrupted(), rows, broken)
    assert len(list(broken.glob("0*.safetensors"))) == 1
    gradient.write_features(features, rows, broken)
    assert (whole / "features.safetensors").read_bytes() == (broken / "features.safetensors").read_bytes()
    found = gradient.read_features(whole, len(rows), "fit again")
    torch.testing.assert_close(found, features(rows))
    with pytest.raises(CoterieError, match="not floats of"):
        gradient.read_features(whole, len(rows) + 1, "fit again")


@pytest.fixture
def features_of_shards(backbone, checkpoint):
    """Features, five rows, and their features two by two, the longest first."""
    features, rows = GradientFeatures(backbone, [checkpoint], FeatureSettings(d_proj=16)), rows_for(backbone)
    wanted = torch.empty(len(rows), 16)
    for shard in gradient.by_length(rows, 2):
        wanted[shard] = features([rows[i] for i in shard])
    return features, rows, wanted


@pytest.mark.parametrize("stop", [0, 1, 2, 3])
def test_shards_that_stopped_moving_into_the_one_file_move_on(features_of_shards, tmp_path, monkeypatch, stop):
    """Killed before, between and behind the moves of three shards, one at a time."""
    features, rows, wanted = features_of_shards
    calls = []
    fill = gradient.fill_matrix

    def until_stopped(path, parts):
        if len(calls) == stop:
            raise KeyboardInterrupt
        calls.append(path)
        fill(path, parts)

    monkeypatch.setattr(gradient, "SHARD_ROWS", 2)
    monkeypatch.setattr(gradient, "SHARDS_MOVED", 1)
    with monkeypatch.context() as patch:
        patch.setattr(gradient, "fill_matrix", until_stopped)
        if stop == 3:  # all have moved, and the file has not its name yet
            patch.setattr(gradient.Path, "rename", until_stopped)
        with pytest.raises(KeyboardInterrupt):
            gradient.write_features(features, rows, tmp_path)
    counted = []
    monkeypatch.setattr(type(features), "__call__", lambda *given: counted.append(given))
    gradient.write_features(features, rows, tmp_path)
    assert torch.equal(gradient.read_features(tmp_path, len(rows), "fit again"), wanted)
    assert not counted and [path.name for path in tmp_path.iterdir()] == ["features.safetensors"]


def test_centroids_of_centred_features_are_read_in_blocks(monkeypatch):
    """Against the plain mean; in blocks of three."""
    monkeypatch.setattr(centroid, "BLOCK_ROWS", 3)
    rows, labels = normal(10, 4), [0, 1, 1, 0, 2, 2, 2, 0, 1, 0]
    shifted = rows - rows.mean(dim=0)
    wanted = torch.stack([shifted[torch.tensor(labels) == number].mean(dim=0) for number in range(3)])
    found = centroid.centroids_of(gradient.CentredRows(rows, rows.mean(dim=0)), labels, 3)
    torch.testing.assert_close(found, torch.nn.functional.normalize(wanted, dim=1))


@pytest.mark.parametrize("blocks", ["first:1", "last:0", "last:9", "last:", "2"])
def test_blocks_that_do_not_exist_are_refused(backbone, checkpoint, blocks):
    with pytest.raises(CoterieError, match="blocks must be all or last:K with K from 1 to 2"):
        GradientFeatures(backbone, [checkpoint], FeatureSettings(blocks=blocks))


def test_one_adam_step_on_worked_numbers():
    """m 0.1, v 0.04, g 0.5 after one step: m' = .14/.19, v' = .03996+.00025 over .001999, lr 0.1."""
    moments = {"w": gradient.Moments(torch.tensor([0.1]), torch.tensor([0.04]))}
    state = gradient.AdamState(moments, steps=1, learning_rate=0.1, betas=(0.9, 0.999), eps=0.0)
    expected = 0.1 * (0.14 / 0.19) / (0.04021 / 0.001999) ** 0.5
    assert adam_step(torch.tensor([0.5]), "w", state).item() == pytest.approx(expected, rel=1e-5)

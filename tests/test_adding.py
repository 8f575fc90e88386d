"""Experts run on a base model for the length of a `with`: one use at a time, and nothing is left of it."""

import threading

import pytest
import torch
from torch import nn

import tiny
from coterie.backbone.adding import Adding, swapped
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.linear_layers import linear_shapes
from coterie.backbone.loading import load_backbone
from coterie.errors import CoterieError
from coterie.lora import LoraPair
from coterie.settings.groups import ModelSettings

IDS = torch.arange(14).view(2, 7)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    settings = ModelSettings(model=str(tiny.save_model(tmp_path_factory.mktemp("base"))), device="cpu")
    return load_backbone(settings)


def random_layers(backbone, seed: int) -> ExpertLayers:
    generator = torch.Generator().manual_seed(seed)
    shapes = {path: shape for path, shape in linear_shapes(backbone.model).items() if path != "lm_head"}
    return ExpertLayers(
        backbone.model,
        [
            {
                path: LoraPair(*(torch.randn(2, width, generator=generator) for width in shape))
                for path, shape in shapes.items()
            }
        ],
    )


@torch.inference_mode()
def read(backbone, layers: ExpertLayers) -> torch.Tensor:
    with layers.running(layers.weighted(torch.ones(2, 1))):
        return backbone.hidden(IDS)


def changed(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if "forward" in vars(module)]


def test_a_second_use_inside_the_first_is_refused_and_the_first_goes_on(backbone):
    one, other = random_layers(backbone, 0), random_layers(backbone, 1)
    alone = read(backbone, one)
    with torch.inference_mode(), one.running(one.weighted(torch.ones(2, 1))):
        for second in (one, other):
            with (
                pytest.raises(CoterieError, match="in use by other experts, in this thread or in another one"),
                second.running(second.weighted(torch.ones(2, 1))),
            ):
                pass
        assert torch.equal(backbone.hidden(IDS), alone)
    assert torch.equal(read(backbone, one), alone)


def test_another_thread_can_neither_run_experts_nor_read_with_those_of_this_one(backbone):
    one, other = random_layers(backbone, 0), random_layers(backbone, 1)
    alone, told = read(backbone, one), []

    def try_both() -> None:
        for use in (lambda: read(backbone, other), lambda: backbone.hidden(IDS)):
            try:
                use()
            except CoterieError as error:
                told.append(str(error))

    with torch.inference_mode(), one.running(one.weighted(torch.ones(2, 1))):
        thread = threading.Thread(target=try_both)
        thread.start()
        thread.join()
        found = backbone.hidden(IDS)
    assert len(told) == 2 and all("in use by other experts" in text for text in told)
    assert torch.equal(found, alone)
    thread = threading.Thread(target=lambda: told.append(read(backbone, one)))
    thread.start()
    thread.join()
    assert torch.equal(told[2], alone)


def test_a_reading_that_breaks_leaves_every_layer_as_it_was(backbone):
    layers = random_layers(backbone, 0)
    before = read(backbone, layers)

    def broken(out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Adding(backbone.model, {"model.layers.1.mlp.down_proj": broken})():
        backbone.hidden(IDS)
    assert not changed(backbone.model)
    assert torch.equal(read(backbone, layers), before)


def test_a_forward_that_others_gave_a_layer_is_called_and_comes_back(backbone):
    """As libraries that move weights between devices do."""
    layer, calls = backbone.model.model.layers[0].mlp.up_proj, []
    plain = read(backbone, random_layers(backbone, 0))
    own = type(layer).forward.__get__(layer)
    layer.forward = lambda x: (calls.append(x.shape), own(x))[1]
    try:
        layers, theirs = random_layers(backbone, 0), layer.forward
        assert torch.equal(read(backbone, layers), plain)
        assert layer.forward is theirs and calls
    finally:
        del layer.forward


def test_layers_made_inside_a_with_do_not_add_to_what_runs_there(backbone):
    one, other = random_layers(backbone, 0), random_layers(backbone, 1)
    with one.running(one.weighted(torch.ones(2, 1))):
        late = random_layers(backbone, 1)
        late.weighted(torch.ones(2, 1))
    assert torch.equal(read(backbone, late), read(backbone, other))


def test_swapped_forwards_nest():
    layer = nn.Linear(2, 2)
    x = torch.ones(1, 2)
    plain = layer(x)
    with swapped({layer: lambda x: x + 1}):
        with swapped({layer: lambda x: x + 2}):
            assert layer(x).tolist() == [[3, 3]]
        assert layer(x).tolist() == [[2, 2]]
    assert torch.equal(layer(x), plain) and "forward" not in vars(layer)

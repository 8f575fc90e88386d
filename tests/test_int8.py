"""A base model whose linear layers are held in 8 bits computes with the dequantised weights, and carries experts."""

import copy

import pytest
import torch
from torch import nn

import architectures
from coterie.backbone.int8 import Int8Linear, hold_in_int8
from coterie.backbone.layers import ExpertLayers
from coterie.backbone.loading import load_backbone
from coterie.backbone.memory import held_bytes
from coterie.errors import CoterieError
from coterie.mixture import Mixture
from coterie.mixture.local_answers import LocalExpert
from coterie.mixture.memory import needed_bytes
from coterie.settings.groups import ModelSettings, PlacementSettings

IDS = torch.arange(24).view(2, 12) + 60


@pytest.fixture(scope="module")
def backbone(model_folder):
    return load_backbone(ModelSettings(model=str(model_folder), device="cpu", quantize="int8"))


def int8_layers(model: nn.Module) -> dict[str, Int8Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, Int8Linear)}


def dequantised(model: nn.Module) -> nn.Module:
    """The same model with plain layers of the dequantised weights."""
    plain = copy.deepcopy(model)
    for path, layer in int8_layers(plain).items():
        other = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        other.weight.data, other.bias = layer.dequantised(), layer.bias
        parent, _, name = path.rpartition(".")
        setattr(plain.get_submodule(parent), name, other)
    return plain


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (2, 40)], ids=str)
def test_a_product_is_that_of_the_dequantised_weight_on_numbers_in_bfloat16(bias, shape):
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=bias)
    layer, x = Int8Linear(plain), torch.randn(*shape, 64)
    with torch.inference_mode():
        found = layer(x)
    wanted = x.bfloat16().double() @ layer.dequantised().double().T + (plain.bias.double() if bias else 0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=2**-7, atol=2**-7)
    exact = layer(x)  # gradients are on
    torch.testing.assert_close(exact, nn.functional.linear(x, layer.dequantised(), plain.bias))


def test_weights_are_off_by_half_a_step_of_their_output_at_most():
    torch.manual_seed(0)
    plain = nn.Linear(64, 32, bias=False)
    plain.weight.data[3] = 0
    plain.weight.data[5] *= 1e4
    layer = Int8Linear(plain)
    steps = plain.weight.abs().amax(dim=1) / 127
    off = (layer.dequantised() - plain.weight).abs().amax(dim=1)
    assert bool((off <= steps * (0.5 + 127 * 2**-8)).all())  # scales are rounded to bfloat16
    assert not layer.dequantised()[3].any()


def test_gradients_are_those_of_the_dequantised_weight():
    torch.manual_seed(0)
    layer, x = Int8Linear(nn.Linear(32, 16)), torch.randn(2, 3, 32, requires_grad=True)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    wanted = nn.functional.linear(x, layer.dequantised(), layer.bias)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), x)[0])


def test_between_forward_and_backward_no_copy_of_a_weight_is_held():
    layer, x = Int8Linear(nn.Linear(64, 64)), torch.randn(2, 64, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x).sum()
        assert not saved
        nn.functional.linear(x, layer.dequantised())
    assert [tensor.shape for tensor in saved] == [(64, 64)]


def test_the_loaded_model_is_close_to_its_dequantised_copy_and_says_that_it_is_in_int8(backbone):
    assert len(int8_layers(backbone.model)) == 14 and type(backbone.output_layer) is nn.Linear
    assert "int8" in repr(backbone)
    with torch.inference_mode():
        found = backbone.model(IDS).logits.log_softmax(-1)
        wanted = dequantised(backbone.model)(IDS).logits.log_softmax(-1)
    assert float((found - wanted).abs().max()) < 0.3
    assert float((found - wanted).abs().mean()) < 0.03


@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "opt", "deepseek_v3", "jamba"])
def test_architectures_in_int8_read_as_their_dequantised_copies(name):
    """Layers whose weight a model reads itself, or which get only some tokens, stay as they are."""
    model = architectures.make_model(name)
    hold_in_int8(model)
    assert int8_layers(model)
    with torch.inference_mode():
        found, wanted = (own(IDS).logits.log_softmax(-1) for own in (model, dequantised(model)))
    assert float((found - wanted).abs().mean()) < 0.05


def test_experts_run_on_top_of_it(backbone, run_folder):
    """What they add to a layer in 8 bits is what they add to the dequantised one."""
    mixture = Mixture.from_pretrained(run_folder, device="cpu", quantize="int8")
    plain, adapters = dequantised(backbone.model), mixture.bank.adapters
    eye = torch.eye(len(adapters))[:2]
    found, wanted = [], []
    for model, states in ((mixture.backbone.model, found), (plain, wanted)):
        layers = ExpertLayers(model, adapters)
        with torch.inference_mode(), layers.running(layers.weighted(eye)):
            states.append(model(IDS).logits.log_softmax(-1))
    assert float((found[0] - wanted[0]).abs().mean()) < 0.03
    answer = mixture.generate(["add 3 4"], max_new_tokens=4)[0]
    assert answer.token_ids and all(logprob <= 0 for logprob in answer.logprobs)
    assert bool((mixture.route(["add 3 4"]).weights > 0).all())  # gradients go through


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"load_in_4bit": True}, r"--quantize int8 is for a CPU and without --load-in-4bit, got --device cpu --load"),
        ({"device": "meta"}, r"--quantize int8 is for a CPU and without --load-in-4bit, got --device meta"),
    ],
)
def test_what_int8_does_not_go_with_is_refused(model_folder, settings, told):
    with pytest.raises(CoterieError, match=told):
        load_backbone(ModelSettings(**{"model": str(model_folder), "device": "cpu", "quantize": "int8", **settings}))


def test_a_model_without_such_layers_is_refused(tmp_path):
    """Falcon's linear layers are of a class of its own."""
    settings = ModelSettings(model=str(architectures.save_model(tmp_path, "falcon")), device="cpu", quantize="int8")
    with pytest.raises(CoterieError, match="no plain linear layers whose widths are multiples of 16"):
        load_backbone(settings)


def test_its_memory_is_told_from_files_as_it_is_taken(model_folder):
    here = PlacementSettings(device="cpu", quantize="int8")
    counted = needed_bytes(str(model_folder), {"a": LocalExpert()}, here, 1, 0)
    assert counted == held_bytes(load_backbone(ModelSettings(model=str(model_folder), **here.model_dump())))

"""Products of few rows: the other form gives what `F.linear` gives, and is taken only where it is faster."""

import pytest
import torch
from torch import nn

from coterie.backbone import products
from coterie.backbone.products import MOST_ROWS, MOST_ROWS_ALONE, few_row_forwards, linear, transposed_product

WIDE, NARROW = 320, 256  # large enough for the form to matter


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """The rows of every product in the transposed form."""
    rows: list[int] = []

    def product(x, weight, bias=None):
        rows.append(len(x))
        return transposed_product(x, weight, bias)

    monkeypatch.setattr(products, "transposed_product", product)
    return rows


@pytest.mark.parametrize("rows", [1, 2, 3, 12])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_transposed_product_is_the_plain_one_up_to_rounding(rows, has_bias):
    x, weight, bias = normal(rows, 31), normal(17, 31, seed=1), normal(17, seed=2) if has_bias else None
    found = transposed_product(x, weight, bias)
    wanted = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.is_contiguous() and found.shape == (rows, 17)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 2), (4,), (1, 3, 4), (0, 1), (13, 1), (64, 1)], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_inputs_of_any_shape_with_few_vectors_take_the_other_form(shape, threads, counted, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    x, weight = normal(*shape, NARROW), normal(WIDE, NARROW, seed=1)
    found, wanted = linear(x, weight), nn.functional.linear(x, weight)
    rows = wanted[..., 0].numel()
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert counted == ([rows] if 0 < rows <= {1: MOST_ROWS_ALONE, 2: MOST_ROWS}[threads] else [])


def test_training_never_takes_the_other_form(counted):
    layer, x = nn.Linear(NARROW, WIDE), normal(2, NARROW).requires_grad_()
    forward = few_row_forwards([layer])[layer]
    with torch.enable_grad():
        wanted = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
        found = torch.autograd.grad(forward(x).square().sum(), [x, layer.weight])
    assert not counted and all(map(torch.equal, found, wanted))


def test_a_layer_takes_the_weights_that_it_has_by_now(counted):
    layer, x = nn.Linear(NARROW, WIDE), normal(2, NARROW)
    forward = few_row_forwards([layer])[layer]
    layer.weight = nn.Parameter(normal(WIDE, NARROW, seed=3))
    torch.testing.assert_close(forward(x), layer(x), rtol=1e-4, atol=1e-4)
    assert counted == [2]


class Doubled(nn.Linear):
    """A layer with a product of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_only_plain_layers_in_float32_of_some_size_are_taken():
    plain, own = nn.Linear(NARROW, WIDE), nn.Linear(NARROW, WIDE)
    own.forward = lambda x: x  # as libraries do that move weights
    others = [Doubled(NARROW, WIDE), nn.Linear(NARROW, WIDE).bfloat16(), nn.Linear(8, 8), own, nn.Embedding(9, 9)]
    assert set(few_row_forwards([plain, *others, nn.Linear(NARROW, WIDE, device="meta")])) == {plain}

"""Products of few rows: the faster form gives what `F.linear` gives, and only where it is faster and allowed."""

import pytest
import torch
from torch import nn

from coterie.backbone import products
from coterie.backbone.products import MOST_ROWS, Products, few_row_forwards, transposed_product

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


def decided(weight: torch.Tensor, *, transposed: bool) -> Products:
    """Products whose form is settled, as if it had been measured."""
    own = Products([weight])
    own._transposed = dict.fromkeys(range(1, MOST_ROWS + 1), transposed)
    return own


@pytest.mark.parametrize("rows", [1, 2, 3, 12])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_transposed_product_is_the_plain_one_up_to_rounding(rows, has_bias):
    x, weight, bias = normal(rows, 31), normal(17, 31, seed=1), normal(17, seed=2) if has_bias else None
    found = transposed_product(x, weight, bias)
    wanted = nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    assert found.is_contiguous() and found.shape == (rows, 17)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 5), (12,), (1, 3, 4)], ids=str)
def test_inputs_of_any_shape_with_few_vectors_take_the_form_that_won(shape, counted):
    x, weight = normal(*shape, NARROW), normal(WIDE, NARROW, seed=1)
    wanted = nn.functional.linear(x, weight)
    torch.testing.assert_close(decided(weight, transposed=True).linear(x, weight), wanted, rtol=1e-4, atol=1e-4)
    assert len(counted) == 1
    assert torch.equal(decided(weight, transposed=False).linear(x, weight), wanted)
    assert len(counted) == 1


@pytest.mark.parametrize("rows", [0, MOST_ROWS + 1, 64])
def test_no_rows_and_many_rows_are_left_to_the_library(rows, counted):
    x, weight = normal(rows, NARROW), normal(WIDE, NARROW, seed=1)
    assert torch.equal(decided(weight, transposed=True).linear(x, weight), nn.functional.linear(x, weight))
    assert not counted


def test_training_never_takes_the_other_form(counted):
    layer, x = nn.Linear(NARROW, WIDE), normal(2, NARROW).requires_grad_()
    forward = few_row_forwards([layer])[layer]
    with torch.enable_grad():
        wanted = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
        found = torch.autograd.grad(forward(x).square().sum(), [x, layer.weight])
    assert not counted and all(map(torch.equal, found, wanted))


def test_each_shape_and_number_of_rows_is_measured_once_and_kept(monkeypatch):
    measured = []
    monkeypatch.setattr(Products, "_is_faster", lambda self, rows: measured.append((self, rows)) or rows == 3)
    layers = [nn.Linear(NARROW, WIDE), nn.Linear(NARROW, WIDE), nn.Linear(WIDE, NARROW)]
    forwards = few_row_forwards(layers)
    for _ in range(2):
        for layer in layers:
            for rows in (3, 1, 2, 3):
                x = normal(rows, layer.in_features)
                torch.testing.assert_close(forwards[layer](x), layer(x), rtol=1e-4, atol=1e-4)
    assert [rows for _, rows in measured] == [3, 1, 2, 3, 1, 2]
    assert len({own for own, _ in measured}) == 2


def test_the_measured_form_is_the_one_with_the_smaller_median(monkeypatch):
    """A clock that goes on by what each product is said to take, with one slow round among three."""
    seconds = {"plain": iter([5.0, 5.0, 5.0]), "other": iter([4.0, 4.0, 90.0])}
    now = [0.0]

    def product(name):
        def take(x, weight, bias=None):
            now[0] += next(seconds[name])
            return x

        return take

    monkeypatch.setattr(products.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(products.nn.functional, "linear", product("plain"))
    monkeypatch.setattr(products, "transposed_product", product("other"))
    assert Products([torch.ones(2, 2)])._is_faster(2)
    seconds |= {"plain": iter([4.3] * 3), "other": iter([4.0] * 3)}  # too small a gain
    assert not Products([torch.ones(2, 2)])._is_faster(2)


class Doubled(nn.Linear):
    """A layer with a product of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_only_plain_layers_in_float32_of_some_size_are_taken():
    plain, own = nn.Linear(NARROW, WIDE), nn.Linear(NARROW, WIDE)
    own.forward = lambda x: x  # as libraries do that move weights
    others = [Doubled(NARROW, WIDE), nn.Linear(NARROW, WIDE).bfloat16(), nn.Linear(8, 8), own, nn.Embedding(9, 9)]
    assert set(few_row_forwards([plain, *others, nn.Linear(NARROW, WIDE, device="meta")])) == {plain}

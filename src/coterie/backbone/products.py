"""Products of few rows with large weights on a CPU, in the faster of two forms.

For 2 to 12 rows `F.linear` uses one core, and takes longer for one row than `(W @ x.T).T` takes for two. Which form
wins hangs on the processor, its threads and the shapes, so it is measured, once in a process for each shape of weights
and number of rows, when it is needed first. Both forms add up the same numbers, in another order.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOST_ROWS = 12  # beyond, `F.linear` is the faster one
SMALLEST = 1 << 16  # numbers of a weight below which both forms are as good
COLD = 48 << 20  # bytes of weights of one shape to go through, so that few come from a cache
PAIRS = 3
GAIN = 1.1  # how much faster the other form must be to be chosen


def transposed_product(
    x: Float[Tensor, "row in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "row out"]:
    """Return what `F.linear` does as (W @ x.T).T, one row as two."""
    vectors = (x if len(x) > 1 else x.repeat(2, 1)).T
    product = torch.mm(weight, vectors) if bias is None else torch.addmm(bias[:, None], weight, vectors)
    return product.T[: len(x)].contiguous()


class Products:
    """Products with weights of one shape."""

    def __init__(self, weights: Sequence[Float[Tensor, "out in"]]) -> None:
        """Take in weights of this shape, by which the two forms are compared."""
        self._weights = weights
        self._transposed: dict[int, bool] = {}

    def linear(
        self, x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
    ) -> Float[Tensor, "*rows out"]:
        """Return `F.linear(x, weight, bias)`."""
        rows = x.numel() // x.shape[-1]
        if not 0 < rows <= MOST_ROWS or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nn.functional.linear(x, weight, bias)
        if rows not in self._transposed:
            self._transposed[rows] = self._is_faster(rows)
        if not self._transposed[rows]:
            return nn.functional.linear(x, weight, bias)
        return transposed_product(x.reshape(rows, -1), weight, bias).reshape(*x.shape[:-1], -1)

    def _is_faster(self, rows: int) -> bool:
        """Tell whether the transposed form gains enough, by medians of alternating passes over weights."""
        x = self._weights[0].new_ones(rows, self._weights[0].shape[1])
        seconds: dict[Callable, list[float]] = {nn.functional.linear: [], transposed_product: []}
        for _ in range(PAIRS):
            for product, taken in seconds.items():
                started = time.perf_counter()
                for weight in self._weights:
                    product(x, weight)
                taken.append(time.perf_counter() - started)
        plain, other = map(statistics.median, seconds.values())
        return plain > GAIN * other


def few_row_forwards(layers: Sequence[nn.Module]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a `forward` for every layer whose products can take the faster form: plain ones in float32 on a CPU."""
    by_shape: dict[torch.Size, list[nn.Linear]] = {}
    for layer in layers:
        if type(layer) is nn.Linear and "forward" not in vars(layer) and suits(layer.weight):
            by_shape.setdefault(layer.weight.shape, []).append(layer)
    forwards = {}
    for same in by_shape.values():
        products = products_with([layer.weight for layer in same])
        forwards |= {layer: partial(_forward, products, layer) for layer in same}
    return forwards


def products_with(weights: Sequence[Float[Tensor, "out in"]]) -> Products:
    """Return the products with weights of one shape, compared by as many of them as are not all in a cache."""
    return Products(weights[: -(-COLD // (weights[0].numel() * 4))])


def suits(weight: Tensor) -> bool:
    """Tell whether the form of a product with this weight matters."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST


def _forward(products: Products, layer: nn.Linear, x: Tensor) -> Tensor:
    return products.linear(x, layer.weight, layer.bias)

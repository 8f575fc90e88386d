"""Products of few rows with large weights on a CPU, in the faster of two forms.

`F.linear` parts its work by rows, so with a few of them it keeps one core busy; `(W @ x.T).T` parts it by outputs, of
which there are always many, and takes less for two rows than the other for one (`benchmarks/products.py`).
Which form is taken hangs on the number of rows and threads alone, so that the same command gives the same numbers
again. Both forms add up the same numbers, in another order.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

MOST_ROWS = 8  # beyond, `F.linear` is as fast or faster
MOST_ROWS_ALONE = 4  # the same on one thread
SMALLEST = 1 << 16  # numbers of a weight below which both forms are as good


def transposed_product(
    x: Float[Tensor, "row in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "row out"]:
    """Return what `F.linear` does as (W @ x.T).T, one row as two."""
    vectors = (x if len(x) > 1 else x.repeat(2, 1)).T
    product = torch.mm(weight, vectors) if bias is None else torch.addmm(bias[:, None], weight, vectors)
    return product.T[: len(x)].contiguous()


def linear(
    x: Float[Tensor, "*rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "*rows out"]:
    """Return `F.linear(x, weight, bias)`, in its own form where gradients may be wanted."""
    rows = x.numel() // x.shape[-1]
    most = MOST_ROWS if torch.get_num_threads() > 1 else MOST_ROWS_ALONE
    if not 0 < rows <= most or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return nn.functional.linear(x, weight, bias)
    return transposed_product(x.reshape(rows, -1), weight, bias).reshape(*x.shape[:-1], -1)


def few_row_forwards(layers: Sequence[nn.Module]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a `forward` for every layer whose products can take the faster form: plain ones in float32 on a CPU."""
    return {
        layer: partial(_forward, layer)
        for layer in layers
        if type(layer) is nn.Linear and "forward" not in vars(layer) and suits(layer.weight)
    }


def suits(weight: Tensor) -> bool:
    """Tell whether the form of a product with this weight matters."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)  # whatever weights it has by now

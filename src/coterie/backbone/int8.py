"""A base model's linear layers held in 8 bits: a fourth of the bytes that every token reads, at a cost in precision.

Weights only, with one scale an output: the largest number of each row of the weight becomes 127. What the layers read
and give is rounded to bfloat16, the one form in which torch has a fast product with such weights on a CPU.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from coterie.backbone.linear_layers import linear_layers, unchangeable_layers

MULTIPLE = 16  # of inputs and outputs: torch's product reads beyond the end of others


class Int8Linear(nn.Linear):
    """A linear layer with its weight in 8 bits and a scale for every output, in bfloat16."""

    scales: Tensor

    def __init__(self, layer: nn.Linear) -> None:
        """Round a layer's weight to the nearest numbers in 8 bits."""
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        weight = layer.weight.detach().float()
        scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
        rounded = (weight / scales.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.register_buffer("scales", scales)

    def dequantised(self) -> Float[Tensor, "out in"]:
        """Return the weight that this layer computes with, in float32."""
        return self.weight.float() * self.scales.float()[:, None]

    def forward(self, input: Float[Tensor, "... in"]) -> Float[Tensor, "... out"]:
        """Return the product in the input's type; where gradients are wanted, with the dequantised weight."""
        if torch.is_grad_enabled():
            return _DequantisedProduct.apply(input, self)
        flat = input.reshape(-1, self.in_features).bfloat16()
        product = torch._weight_int8pack_mm(flat, self.weight, self.scales).to(input.dtype)
        product = product if self.bias is None else product + self.bias
        return product.reshape(*input.shape[:-1], self.out_features)


class _DequantisedProduct(torch.autograd.Function):
    """The product with a dequantised weight, which is made anew for the way back: none is held in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:  # noqa: ANN401 - autograd's own
        ctx.layer = layer
        return nn.functional.linear(x, layer.dequantised().to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401 - autograd's own
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantised().to(gradient.dtype), None


def hold_in_int8(model: PreTrainedModel) -> None:
    """Replace linear layers by ones in 8 bits: all but the output layer and those whose weight the model reads itself.

    Layers of other widths than multiples of 16 and of other classes than torch's own stay as they are, too.

    Raises:
        ValueError: when there is none to replace.
    """
    stay = {model.get_submodule(path) for path in unchangeable_layers(model)} | {model.get_output_embeddings()}
    chosen = {
        layer: Int8Linear(layer)
        for layer in linear_layers(model).values()
        if type(layer) is nn.Linear
        and layer not in stay
        and not (layer.in_features % MULTIPLE or layer.out_features % MULTIPLE)
    }
    if not chosen:
        raise ValueError(f"it has no plain linear layers whose widths are multiples of {MULTIPLE}, which 8 bits need")
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in chosen:
                parent._modules[name] = chosen[child]

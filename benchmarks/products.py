"""Products of few rows with all linear layers of a model: `F.linear` against the form that works by outputs."""

import statistics
from functools import partial

import torch
from _harness import arguments, interleaved, load, median_ratio, publish
from torch import nn

from coterie.backbone.products import transposed_product

ROWS = (1, 2, 3, 4, 5, 9, 12, 16)


@torch.inference_mode()
def main() -> None:
    """Compare the two forms for some numbers of rows and print the result."""
    flags = arguments("products")
    backbone = load(flags.model)
    layers = [m for m in backbone.model.modules() if isinstance(m, nn.Linear) and m is not backbone.output_layer]
    weights = [layer.weight for layer in layers]

    def go_through(product, inputs: dict[int, torch.Tensor]) -> None:  # noqa: ANN001 - either form
        for weight in weights:
            product(inputs[weight.shape[1]], weight)

    medians, ratios = {}, {}
    for rows in ROWS:
        inputs = {width: torch.ones(rows, width) for width in {weight.shape[1] for weight in weights}}
        forms = {"linear": nn.functional.linear, "transposed": transposed_product}
        ways = {name: partial(go_through, product, inputs) for name, product in forms.items()}
        seconds = interleaved(ways, 2 if flags.quick else 7)
        medians |= {f"{name}_{rows}": statistics.median(own) for name, own in seconds.items()}
        ratios[f"linear_over_transposed_{rows}"] = median_ratio(seconds["linear"], seconds["transposed"])
    publish("products", {"model": flags.model, "rows": list(ROWS), "layers": len(weights)}, medians, ratios)


if __name__ == "__main__":
    main()

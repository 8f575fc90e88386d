"""Experts' first factors of layers that read the same, q with k and v and gate with up: each alone, or as one product.

The widths are those of SmolLM2-135M; a step takes this once a block.
"""

import statistics
from functools import partial

import torch
from _harness import arguments, interleaved, median_ratio, publish

WIDTH, BLOCKS, EXPERTS, RANK = 576, 30, 9, 8
GROUPS = (3, 2)  # layers that read the same
ROWS = (1, 4, 9, 16)


@torch.inference_mode()
def main() -> None:
    """Compare both for some numbers of rows and print the result."""
    flags = arguments("shared_inputs")
    alone = [torch.randn(EXPERTS * RANK, WIDTH) for _ in range(sum(GROUPS))]
    shared = [torch.cat(own) for own in (alone[: GROUPS[0]], alone[GROUPS[0] :])]

    def weigh(factors: list[torch.Tensor], x: torch.Tensor, weights: torch.Tensor) -> None:
        for _ in range(BLOCKS):
            for factor in factors:
                (x @ factor.T).view(len(x), -1, EXPERTS, RANK).mul_(weights)

    medians, ratios = {}, {}
    for rows in ROWS:
        x, weights = torch.randn(rows, WIDTH), torch.rand(rows, 1, EXPERTS, 1)
        ways = {"alone": partial(weigh, alone, x, weights), "shared": partial(weigh, shared, x, weights)}
        seconds = interleaved(ways, 5 if flags.quick else 50)
        medians |= {f"{name}_{rows}": statistics.median(own) for name, own in seconds.items()}
        ratios[f"alone_over_shared_{rows}"] = median_ratio(seconds["alone"], seconds["shared"])
    publish("shared_inputs", {"experts": EXPERTS, "rank": RANK, "blocks": BLOCKS, "rows": list(ROWS)}, medians, ratios)


if __name__ == "__main__":
    main()

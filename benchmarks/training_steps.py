"""Training time per token by how many tokens go through the model at once: what mixing experts' batches could gain.

Experts that train together on one frozen base would put their batches side by side. That gains as far as a token costs
less in a larger batch.
"""

import statistics
from functools import partial

import torch
from _harness import arguments, interleaved, load, median_ratio, publish
from peft import LoraConfig, get_peft_model

LENGTH = 64
ROWS = (1, 2, 4, 8, 16, 32)


def main() -> None:
    """Take a step over each number of rows in turn and print the result."""
    flags = arguments("training_steps")
    backbone = load(flags.model)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(backbone.model, config).train()

    def step(rows: int) -> None:
        ids = torch.randint(0, backbone.embeddings, (rows, LENGTH))
        model(input_ids=ids, labels=ids).loss.backward()

    seconds = interleaved({str(rows): partial(step, rows) for rows in ROWS}, 1 if flags.quick else 7)
    per_token = {rows: [second / (rows * LENGTH) for second in seconds[str(rows)]] for rows in ROWS}
    publish(
        "training_steps",
        {"model": flags.model, "rank": 8, "length": LENGTH, "rows": list(ROWS)},
        {f"seconds_per_token_{rows * LENGTH}": statistics.median(own) for rows, own in per_token.items()},
        {
            f"{rows * LENGTH}_over_{ROWS[-1] * LENGTH}": median_ratio(own, per_token[ROWS[-1]])
            for rows, own in per_token.items()
        },
    )


if __name__ == "__main__":
    main()

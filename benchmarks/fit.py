"""Time of a whole ELREA fit against training the base adapter alone.

The setting of the paper's Table 5, scaled down: equal prompt and answer lengths, rank 8, 4 clusters, as many epochs for
experts as for the base adapter. The paper reports 2.33.
"""

import json
import random
import statistics
import tempfile
from pathlib import Path

from _harness import arguments, interleaved, median_ratio, publish

from coterie import methods
from coterie.backbone.loading import load_backbone
from coterie.data.batching import PromptFormat, tokenise
from coterie.data.examples import load_examples
from coterie.experts.training import train_adapter
from coterie.experts.training_plan import TrainingPlan
from coterie.settings.groups import LoraSettings, ModelSettings

WORDS = {
    "sea": "wave boat fish tide sand shore sail port crew deep",
    "kitchen": "salt pan bread oven soup knife plate sugar flour boil",
    "sky": "cloud star moon rain wind storm sun night light cold",
    "office": "desk paper phone chair meeting letter report clock pen file",
}


def write_rows(file: Path, count: int, words: int) -> None:
    """Write prompts and answers of equal length, in four kinds."""
    generator = random.Random(0)
    rows = []
    for number in range(count):
        kind = list(WORDS)[number % len(WORDS)]
        text = [" ".join(generator.choices(WORDS[kind].split(), k=words)) for _ in range(2)]
        rows.append({"id": str(number), "source": kind, "instruction": text[0], "response": text[1]})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def base_alone(flags_model: str, data: Path, epochs: int) -> None:
    """Load the model and train the base adapter, nothing else."""
    backbone = load_backbone(ModelSettings(model=flags_model))
    kept = tokenise(PromptFormat(backbone.tokenizer), load_examples(data), 2048)
    plan = TrainingPlan(epochs, 5e-4, 4, 4, 0, "none", "base", keep_epochs=True)
    train_adapter(backbone, kept.rows, plan, Path(tempfile.mkdtemp()), LoraSettings())


def whole_fit(flags_model: str, data: Path, epochs: int) -> None:
    """Run the whole loop."""
    output = Path(tempfile.mkdtemp()) / "run"
    methods.elrea(
        flags_model,
        str(data),
        output=output,
        epochs=epochs,
        expert_epochs=epochs,
        clusters=4,
        cluster_rounds=1,
        batch_size=4,
        micro_batch_size=4,
        learning_rate=5e-4,
        expert_learning_rate=2e-4,
    )


def main() -> None:
    """Run both in turn and print the result."""
    flags = arguments("fit")
    rounds, count, words, epochs = (1, 8, 16, 1) if flags.quick else (1, 16, 40, 3)
    data = Path(tempfile.mkdtemp()) / "train.jsonl"
    write_rows(data, count, words)
    seconds = interleaved(
        {
            "base": lambda: base_alone(flags.model, data, epochs),
            "elrea": lambda: whole_fit(flags.model, data, epochs),
        },
        rounds,
        warm_up=False,  # minutes each: nothing of a warm-up would be left
    )
    publish(
        "fit",
        {"model": flags.model, "rows": count, "words_each_side": words, "epochs": epochs, "clusters": 4, "batch": 4},
        {f"{name}_seconds": statistics.median(values) for name, values in seconds.items()},
        {"elrea_over_base": median_ratio(seconds["elrea"], seconds["base"])},
    )


if __name__ == "__main__":
    main()

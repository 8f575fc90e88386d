"""What scoring adapters on a task's shots costs beyond the forward passes that it takes.

`select` scores all adapters of a bank as `coterie select` does: groups of four are loaded, answer the shots and are
scored on the rationales in stacked batches. The seconds within the base model (adapters included) and its output layer
are taken apart from all others: reading adapters, tokenising, choosing tokens, grading. `one_by_one` is the usual way:
PEFT loads one adapter after the other and generates, and then scores, the same batches. Both must give the same
answers.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _harness import arguments, interleaved, load, median_ratio, publish, random_adapter
from peft import PeftModel
from torch import Tensor, nn

from coterie.backbone.loading import Backbone
from coterie.data.batching import IGNORED, PromptFormat, TokenRow, pad
from coterie.data.examples import Example, load_examples
from coterie.experts.bank_folder import open_bank
from coterie.methods.add_adapters import bank_add
from coterie.methods.kshot.choose_adapters import ShotScoring
from coterie.methods.kshot.task import KshotTask
from coterie.settings.groups import SelectAdaptersSettings

QUESTION = "Question {number}: is the sky blue because of the sea, or is the sea blue because of the sky?"
ANSWER = "The answer is neither. Both scatter and absorb light in ways of their own, and blue light most of all."
GROUP = 4


def shots_of(count: int) -> list[Example]:
    """Make shots of equal form."""
    return load_examples(
        [{"instruction": QUESTION.format(number=n), "response": ANSWER, "answer": "neither"} for n in range(count)]
    )


class Clock:
    """Counts the seconds that a model's forward passes take."""

    def __init__(self) -> None:
        """Start at zero."""
        self.seconds = 0.0

    @contextmanager
    def watching(self, *modules: nn.Module) -> Iterator[None]:
        """Count what these modules take within the `with`; none of them may hold another."""
        started: list[float] = []
        handles = []
        for module in modules:
            handles.append(module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter())))
            handles.append(module.register_forward_hook(lambda *_: self._stop(started.pop())))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _stop(self, started: float) -> None:
        self.seconds += time.perf_counter() - started


def one_by_one(backbone: Backbone, folders: Sequence[Path], shots: Sequence[Example], steps: int) -> list[list[str]]:
    """Answer and score all shots with one adapter after the other, through PEFT."""
    prompts = PromptFormat(backbone.tokenizer)
    rows = [prompts.row(shot) for shot in shots]
    texts = []
    for folder in folders:
        model = PeftModel.from_pretrained(backbone.model, folder).eval()
        texts.append(_answers(model, backbone, rows, steps))
        _losses(model, backbone, rows)
        model.unload()
    return texts


@torch.inference_mode()
def _answers(model: PeftModel, backbone: Backbone, rows: Sequence[TokenRow], steps: int) -> list[str]:
    batch = pad([row.prompt().ids for row in rows], backbone.pad_id, side="left")
    written = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, max_new_tokens=steps, do_sample=False
    )
    new = written[:, batch.input_ids.shape[1] :]
    return backbone.tokenizer.batch_decode(new, skip_special_tokens=True)


@torch.inference_mode()
def _losses(model: PeftModel, backbone: Backbone, rows: Sequence[TokenRow]) -> Tensor:
    batch = pad([row.ids for row in rows], backbone.pad_id, side="right")
    labels = pad([row.labels() for row in rows], IGNORED, side="right").input_ids
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss


def main() -> None:
    """Run both ways in turn and print the result."""
    flags = arguments("select_experts")
    rounds, adapters, count, steps = (1, 4, 4, 4) if flags.quick else (2, 4, 10, 12)
    backbone = load(flags.model)
    folders = [random_adapter(backbone, seed=number) for number in range(adapters)]
    shots = shots_of(count)
    clock, inside, texts = Clock(), [], {}
    with TemporaryDirectory() as place:
        named = [f"adapter-{number}={folder}" for number, folder in enumerate(folders)]
        assert all(one.card for one in bank_add(Path(place) / "bank", named, model=flags.model))
        bank = open_bank(Path(place) / "bank")
        task = KshotTask(bank, backbone, PromptFormat(backbone.tokenizer), shots, [])
        settings = SelectAdaptersSettings(max_new_tokens=steps, group_size=GROUP, scoring_batch_size=GROUP * count)
        cached: Callable = lambda name, make: make()  # noqa: E731

        def select() -> None:
            clock.seconds = 0.0
            with clock.watching(backbone.model.get_decoder(), backbone.output_layer):
                scoring = ShotScoring(task, shots, settings, cached)
                scoring.score(bank.names, count)
            inside.append(clock.seconds)
            texts["select"] = [[cell["text"] for cell in scoring.cells[name]] for name in bank.names]

        def loop() -> None:
            texts["one_by_one"] = one_by_one(backbone, folders, shots, steps)

        seconds = interleaved({"select": select, "one_by_one": loop}, rounds, warm_up=False)
    if texts["select"] != texts["one_by_one"]:
        raise SystemExit(f"the ways wrote different answers: {texts}")
    measured = inside[-len(seconds["select"]) :]
    publish(
        "select_experts",
        {"model": flags.model, "adapters": adapters, "group": GROUP, "shots": count, "steps": steps, "rounds": rounds},
        {f"{name}_seconds_per_adapter": statistics.median(own) / adapters for name, own in seconds.items()},
        {
            "select_over_its_forward_passes": median_ratio(seconds["select"], measured),
            "one_by_one_over_select": median_ratio(seconds["one_by_one"], seconds["select"]),
        },
    )


if __name__ == "__main__":
    main()

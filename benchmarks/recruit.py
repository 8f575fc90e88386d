"""Time per question of recruited experts: all questions in one batch, against loading the base model for each question.

Every question goes to three of six adapters of one base model. `grouped` loads the base once and runs the rows of all
adapters in stacked batches; `per_question` loads it anew for each question. With the model loaded, `stacked` is the
batch of all adapters together, and `swapped` loads one adapter after the other and runs its questions alone. All ways
must write the same answers.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path

from _harness import arguments, interleaved, load, median_ratio, publish, random_adapter

from coterie.backbone.loading import Backbone
from coterie.data.batching import PromptFormat
from coterie.data.examples import from_prompt
from coterie.experts.answerers import Ask, Group, Reply
from coterie.experts.bank import ExpertBank, load_adapter
from coterie.experts.ledger import Ledger
from coterie.mixture.local import LocalAnswerer, LocalExpert, load_local
from coterie.mixture.recruiting import Workshop
from coterie.settings import PlacementSettings, SamplingSettings

EXPERTS = 6
RECRUITS = 3
BATCH = 12
QUESTION = "Question {number}: explain in simple words why the sky is blue during the day and red in the evening."


def recruited(questions: int, steps: int) -> list[list[Ask]]:
    """Send every question to three adapters in turn."""
    sampling = SamplingSettings(max_new_tokens=steps)
    return [
        [
            Ask(f"expert-{(number + place) % EXPERTS}", from_prompt(QUESTION.format(number=number)).messages, sampling)
            for place in range(RECRUITS)
        ]
        for number in range(questions)
    ]


def in_workshop(model: str, folders: dict[str, Path], asks: Sequence[Ask]) -> list[str]:
    """Load what the questions need, answer them, and free it."""
    experts = {name: LocalExpert(folder) for name, folder in folders.items()}
    group = Group(model, tuple(experts), lambda: load_local(model, experts, PlacementSettings(), BATCH))
    with Workshop([group], {name: name for name in experts}, Ledger(), quiet=True) as workshop:
        return [reply.text for reply in workshop.ask(asks)]


def in_answerer(backbone: Backbone, folders: dict[str, Path], asks: Sequence[Ask]) -> list[str]:
    """Answer on a loaded base model, with these adapters read from disk and stacked."""
    adapters = tuple(load_adapter(folder, backbone.model) for folder in folders.values())
    prompts = dict.fromkeys(folders, PromptFormat(backbone.tokenizer))
    answerer = LocalAnswerer(backbone, ExpertBank(tuple(folders), adapters), prompts, batch_size=BATCH)
    replies: dict[int, Reply] = {}
    answerer.answer(asks, replies.__setitem__)
    return [replies[number].text for number in range(len(asks))]


def main() -> None:
    """Run the four ways in turn and print the result."""
    flags = arguments("recruit")
    rounds, count, steps = (1, 4, 4) if flags.quick else (3, 12, 16)
    backbone = load(flags.model)
    folders = {f"expert-{number}": random_adapter(backbone, seed=number) for number in range(EXPERTS)}
    questions = recruited(count, steps)
    asks = [ask for own in questions for ask in own]
    written: dict[str, list[str]] = {}

    def grouped() -> None:
        written["grouped"] = in_workshop(flags.model, folders, asks)

    def per_question() -> None:
        written["per_question"] = [text for own in questions for text in in_workshop(flags.model, folders, own)]

    def stacked() -> None:
        written["stacked"] = in_answerer(backbone, folders, asks)

    def swapped() -> None:
        places = {name: [n for n, ask in enumerate(asks) if ask.expert == name] for name in folders}
        found = {}
        for name, own in places.items():
            found |= dict(zip(own, in_answerer(backbone, {name: folders[name]}, [asks[n] for n in own]), strict=True))
        written["swapped"] = [found[number] for number in range(len(asks))]

    ways = {"grouped": grouped, "per_question": per_question, "stacked": stacked, "swapped": swapped}
    seconds = interleaved(ways, rounds, warm_up=not flags.quick)
    if len({tuple(texts) for texts in written.values()}) != 1:
        raise SystemExit(f"the ways wrote different answers: {written}")
    settings = {"model": flags.model, "experts": EXPERTS, "recruits": RECRUITS, "questions": count, "steps": steps}
    publish(
        "recruit",
        {**settings, "rank": 8, "batch": BATCH, "rounds": rounds},
        {f"{name}_seconds_per_question": statistics.median(own) / count for name, own in seconds.items()},
        {
            "per_question_over_grouped": median_ratio(seconds["per_question"], seconds["grouped"]),
            "swapped_over_stacked": median_ratio(seconds["swapped"], seconds["stacked"]),
        },
    )


if __name__ == "__main__":
    main()

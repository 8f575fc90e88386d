"""Time per question of recruited experts: all questions in one batch, against loading models for each question.

The pool has two base models and four adapters of the first one; every question goes to three of the six. `grouped`
takes all questions together: each model is loaded once, and the rows of all adapters run in stacked batches.
`per_question` does the same for one question after the other, and `per_call` loads an expert for each of its answers,
as scripts do that start one engine per model. With the first model loaded, `stacked` is the batch of its adapters
together, and `swapped` loads one adapter after the other and runs its questions alone. All ways must write the same
answers.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from _harness import arguments, interleaved, load, median_ratio, publish, random_adapter

from coterie.backbone.loading import Backbone
from coterie.data.batching import PromptFormat
from coterie.data.examples import from_prompt
from coterie.experts.answering import ExpertGroup, Question, Reply
from coterie.experts.bank import ExpertBank, load_adapter
from coterie.experts.reply_cache import ReplyCache
from coterie.mixture.local_answers import LocalAnswerer, LocalExpert, load_local
from coterie.mixture.scheduler import ExpertScheduler
from coterie.settings.groups import PlacementSettings, SamplingSettings

ADAPTERS = 4
RECRUITS = 3
BATCH = 12
OTHER_MODEL = "gemma3-270m"
QUESTION = "Question {number}: explain in simple words why the sky is blue during the day and red in the evening."

Pool = Mapping[str, Mapping[str, LocalExpert]]
"""The experts of every base model, by name."""


def recruited(names: Sequence[str], questions: int, steps: int) -> list[list[Question]]:
    """Send every question to three experts in turn."""
    sampling = SamplingSettings(max_new_tokens=steps)
    return [
        [
            Question(
                names[(number + place) % len(names)], from_prompt(QUESTION.format(number=number)).messages, sampling
            )
            for place in range(RECRUITS)
        ]
        for number in range(questions)
    ]


def in_scheduler(pool: Pool, asks: Sequence[Question]) -> list[str]:
    """Load what the questions need, answer them, and free it."""
    wanted = {ask.expert for ask in asks}
    groups = []
    for model, experts in pool.items():
        own = {name: expert for name, expert in experts.items() if name in wanted}
        if own:
            groups.append(
                ExpertGroup(
                    model, tuple(own), lambda m=model, e=own: load_local(m, e, PlacementSettings(), BATCH), size=1
                )
            )
    with ExpertScheduler(groups, {name: name for name in wanted}, ReplyCache(), budget=len(groups)) as scheduler:
        return [reply.text for reply in scheduler.ask(asks)]


def in_answerer(backbone: Backbone, folders: Mapping[str, Path], asks: Sequence[Question]) -> list[str]:
    """Answer on a loaded base model, with these adapters read from disk and stacked."""
    adapters = tuple(load_adapter(folder, backbone.model) for folder in folders.values())
    prompts = dict.fromkeys(folders, PromptFormat(backbone.tokenizer))
    answerer = LocalAnswerer(backbone, ExpertBank(tuple(folders), adapters), prompts, batch_size=BATCH)
    replies: dict[int, Reply] = {}
    answerer.answer(asks, replies.__setitem__)
    return [replies[number].text for number in range(len(asks))]


def one_by_one(backbone: Backbone, folders: Mapping[str, Path], asks: Sequence[Question]) -> list[str]:
    """Load one adapter after the other, and answer its questions alone."""
    found: dict[int, str] = {}
    for name, folder in folders.items():
        places = [place for place, ask in enumerate(asks) if ask.expert == name]
        answers = in_answerer(backbone, {name: folder}, [asks[place] for place in places])
        found |= dict(zip(places, answers, strict=True))
    return [found[place] for place in range(len(asks))]


def main() -> None:
    """Run the ways in turn and print the result."""
    flags = arguments("recruit")
    rounds, count, steps = (1, 4, 4) if flags.quick else (2, 8, 32)
    backbone = load(flags.model)
    folders = {f"adapter-{number}": random_adapter(backbone, seed=number) for number in range(ADAPTERS)}
    adapters = {name: LocalExpert(folder) for name, folder in folders.items()}
    pool = {flags.model: {"base": LocalExpert(), **adapters}, OTHER_MODEL: {"other": LocalExpert()}}
    questions = recruited([name for experts in pool.values() for name in experts], count, steps)
    asks = [ask for own in questions for ask in own]
    of_adapters = [ask for ask in asks if ask.expert in folders]
    written: dict[str, list[str]] = {}

    def keep(name: str, texts: list[str]) -> None:
        written[name] = texts

    ways = {
        "grouped": lambda: keep("grouped", in_scheduler(pool, asks)),
        "per_question": lambda: keep("per_question", [t for own in questions for t in in_scheduler(pool, own)]),
        "per_call": lambda: keep("per_call", [t for ask in asks for t in in_scheduler(pool, [ask])]),
        "stacked": lambda: keep("stacked", in_answerer(backbone, folders, of_adapters)),
        "swapped": lambda: keep("swapped", one_by_one(backbone, folders, of_adapters)),
    }
    seconds = interleaved(ways, rounds, warm_up=False)
    for one, other in (("grouped", "per_question"), ("grouped", "per_call"), ("stacked", "swapped")):
        if written[one] != written[other]:
            raise SystemExit(f"{one} and {other} wrote different answers: {written[one]}, {written[other]}")
    settings = {"model": flags.model, "other_model": OTHER_MODEL, "adapters": ADAPTERS, "recruits": RECRUITS}
    publish(
        "recruit",
        {**settings, "questions": count, "steps": steps, "rank": 8, "batch": BATCH, "rounds": rounds},
        {f"{name}_seconds_per_question": statistics.median(own) / count for name, own in seconds.items()},
        {
            "per_question_over_grouped": median_ratio(seconds["per_question"], seconds["grouped"]),
            "per_call_over_grouped": median_ratio(seconds["per_call"], seconds["grouped"]),
            "swapped_over_stacked": median_ratio(seconds["swapped"], seconds["stacked"]),
        },
    )


if __name__ == "__main__":
    main()

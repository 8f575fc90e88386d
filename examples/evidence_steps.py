"""The steps of every part of the evidence: commands of `coterie`, each with the path that is there when it is done."""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from evidence_rows import MIXES, UNLIKE, named, write_influence, write_kshot, write_mix, write_skills, write_unlike
from task_bank import SETS

from coterie.evaluation.kshot_auto import LEAST_SHOTS

EXTRAS = {
    "one-lora": "one-lora-same-budget",
    "random-weights": "random-weights",
    "random-clusters": "random-cluster",
    "gradient-space": "gradientspace",
    "distilled": "avengers,lorauter,ariadne,distilled",
}
"""What is trained for the controls and routers that `fit auto` does not try, by the folder that comes last."""
METHODS = (
    *("backbone", "base", "one-lora-same-budget", "random-weights", "random-cluster", "uniform-weights"),
    *("elrea", "elrea-refusing", "membership-routing", "loss-routing", "loss-routing:caution=off", "prefill"),
    *("prefill:caution=off", "avengers", "lorauter", "ariadne", "distilled", "logo", "gradientspace"),
    *("auto", "random-oracle", "oracle"),
)
REFUSING = ("base", "uniform-weights", "elrea-refusing", "loss-routing", "prefill", "auto", "oracle")
TOKENS = ("backbone", "per-dataset", "uniform-weights", "token-level", "arrow", "spectr", "logo", "oracle")
KSHOT = ("backbone", "best-by-shots", "uniform-weights", "best-tuned", "kshot-only", "random-experts")
ON_SHOTS_ALONE = ("best-by-shots", "uniform-weights", "random-experts")
BY_LOSS = ("--rank-by", "perplexity", "--diversity", "none")
NO_SYSTEM = ("--system-prompt", "")
FIT = ("--clusters", "4", "--cluster-rounds", "1", *NO_SYSTEM)
DOMAIN = ("--epochs", "2", "--learning-rate", "3e-4", "--batch-size", "8", *NO_SYSTEM)
BANK = ("--epochs", "1", "--learning-rate", "5e-4", "--batch-size", "8", *NO_SYSTEM)


class Step(NamedTuple):
    """The words of a command after `coterie`, and the path that is there when it is done."""

    words: tuple[str, ...]
    output: Path


class Plan(NamedTuple):
    """What was asked for: the data, the output folder, the flags and the seeds."""

    data: Path
    output: Path
    flags: argparse.Namespace
    seeds: list[int]

    @property
    def answers(self) -> tuple[str, ...]:
        """Whether answers are written beside the likelihoods."""
        return ("--max-new-tokens", str(self.flags.answers)) if self.flags.answers else ("--no-generate",)


def evaluated(plan: Plan, run: Path, rows: Path, output: Path, *told: str) -> Step:
    """Return the evaluation of a run on rows."""
    return Step(("eval", str(run), "--data", str(rows), "--output", str(output), *told, *plan.answers), output)


def sides(part: str, draw: int = 0) -> list[str]:
    """Return the names of the test rows that a mix has."""
    crossing = ["crossing"] if MIXES[part].crosses else []
    return [named(side, draw) for side in ("inside", *crossing, "outside")]


def fitted(plan: Plan, part: str, seed: int, to: str = "", *told: str) -> Step:
    """Return the fit of a mix by `fit auto`, in the folder of its own part unless another is told."""
    run, rows = plan.output / (to or part) / f"run-{seed}", plan.output / part / f"train-{seed}.jsonl"
    what = ("--model", plan.flags.model, "--data", str(rows), "--seed", str(seed))
    return Step(("fit", "auto", *what, "--output", str(run), *FIT, *told), run)


def mix_steps(plan: Plan, part: str) -> Iterator[Step]:
    """Yield for each seed a fit by evidence, each control by itself, and an evaluation on every side."""
    place, draw, compared = plan.output / part, plan.flags.draw, plan.flags.methods.split(",")
    every_seed = plan.flags.seeds  # no other draw has a row that any of them knows
    write_mix(plan.data, place, MIXES[part], every_seed, plan.flags.train, plan.flags.test, draw)
    for seed in plan.seeds:
        yield fitted(plan, part, seed)
        run = place / f"run-{seed}"
        for folder, methods in EXTRAS.items():
            if wanted := [name for name in methods.split(",") if name in compared]:
                yield Step(("train-extras", str(run), "--methods", ",".join(wanted)), run / "methods" / folder)
        for side in sides(part, draw):
            told = ("--methods", plan.flags.methods, "--control", "base")
            yield evaluated(plan, run, place / f"{side}.jsonl", place / f"{side}-{seed}", *told)


def told_unlike(plan: Plan) -> Iterator[tuple[int, Step]]:
    """Yield for each seed the fit of a mix that is told some rows of the kinds that come from outside."""
    mix, place = plan.output / UNLIKE, plan.output / "unlike"
    write_mix(plan.data, mix, MIXES[UNLIKE], plan.seeds, plan.flags.train, plan.flags.test)
    write_unlike(plan.data, place, mix, plan.seeds)
    for seed in plan.seeds:
        yield seed, fitted(plan, UNLIKE, seed, "unlike", "--unlike", str(place / f"unlike-{seed}.jsonl"))


def unlike_steps(plan: Plan) -> Iterator[Step]:
    """Yield these fits, and evaluations of what refuses by them."""
    mix, place = plan.output / UNLIKE, plan.output / "unlike"
    for seed, step in told_unlike(plan):
        yield step
        for side in sides(UNLIKE):
            told = ("--methods", ",".join(REFUSING), "--control", "base")
            yield evaluated(plan, step.output, mix / f"{side}.jsonl", place / f"{side}-{seed}", *told)


def domain_adapters(plan: Plan, seed: int) -> Step:
    """Return the training of an adapter for each domain, routed by similarity."""
    place = plan.output / "domains"
    run, names = place / f"tokens-{seed}", MIXES["domains"].train
    rows = [word for name in names for word in ("--data", f"{name}={place / f'train-{seed}' / name}.jsonl")]
    words = ("fit", "token-level", "--model", plan.flags.model, *rows, "--seed", str(seed), *DOMAIN)
    return Step((*words, "--output", str(run)), run)


def domain_steps(plan: Plan) -> Iterator[Step]:
    """Yield those of the mix, then adapters of each domain, whose weights follow the text or do not."""
    yield from mix_steps(plan, "domains")
    place = plan.output / "domains"
    for seed in plan.seeds:
        step = domain_adapters(plan, seed)
        yield step
        for side in ("inside", "crossing"):
            known = [name for name in TOKENS if side == "inside" or name != "per-dataset"]
            told = ("--methods", ",".join(known), "--every", "1,2,inf", "--control", "uniform-weights")
            yield evaluated(plan, step.output, place / f"{side}.jsonl", place / f"tokens-{side}-{seed}", *told)


def kshot_steps(plan: Plan) -> Iterator[Step]:
    """Yield the training of a bank, then for every target, number of shots and seed a choice, a fit and its rivals."""
    place, counts = plan.output / "kshot", [int(count) for count in plan.flags.shots.split(",")]
    write_kshot(plan.data, place, counts, plan.seeds, plan.flags.test, plan.flags.pool)
    files = {name: place / "bank-rows" / f"{name}.jsonl" for name in SETS}
    run, bank = place / "bank-run", place / "bank"
    rows = [word for name, file in files.items() for word in ("--data", f"{name}={file}")]
    yield Step(("fit", "token-level", "--model", plan.flags.model, *rows, *BANK, "--output", str(run)), run)
    adapters = [f"{name}={run / 'experts' / name}" for name in SETS]
    known = [word for name, file in files.items() for word in ("--trained-on", f"{name}={file}")]
    last = bank / "experts" / adapters[-1].partition("=")[0]
    yield Step(("bank", "add", str(bank), *adapters, *known, "--model", plan.flags.model, "--overwrite"), last)
    for target in plan.flags.targets.split(","):
        for count in counts:
            for seed in plan.seeds:
                yield from _target_steps(plan, bank, place / target, count, seed)


def fits(count: int, *, alone: bool = False) -> tuple[str, ...]:
    """Return what is fitted to so many shots, and the published way to train on them, with gathered rows or alone.

    A few shots can tell nothing by themselves, so the published method is all that is fitted to them.
    """
    return ("kshot-moe",) if count < LEAST_SHOTS else ("kshot-auto", "kshot-only" if alone else "kshot-gathered")


def _target_steps(plan: Plan, bank: Path, place: Path, count: int, seed: int) -> Iterator[Step]:
    """Yield the choice as published, with gathered rows, and the one by the loss on the shots, with these alone."""
    name, (fit, *others) = f"{count}-{seed}", fits(count)
    shots, gathered = ("--shots", str(place / f"shots-{name}.jsonl")), place / f"gather-{name}"
    pool = ("--pool", str(place.parent / "pool.jsonl"), "--exclude", str(place / "test.jsonl"))
    yield Step(("gather", *shots, *pool, "--budget", str(plan.flags.budget), "--output", str(gathered)), gathered)
    extras = ("best-tuned", "kshot-only", *others, "random-experts")
    published = ("", (), ("--gathered", str(gathered)), fit, extras, (*KSHOT, fit, *others))
    _, *alone = fits(count, alone=True)
    by_loss = ("loss-", BY_LOSS, (), fit, (*alone, "random-experts"), (*ON_SHOTS_ALONE, fit, *alone))
    for kind, ranks, rows, fitting, trained, methods in (published, by_loss):
        chosen, run = place / f"{kind}select-{name}", place / f"{kind}run-{name}"
        words = ("select", str(bank), *shots, *ranks, "--exclude-leaks", *NO_SYSTEM, "--output", str(chosen))
        yield Step(words, chosen)
        made = ("--selected", str(chosen), *rows, "--seed", str(seed))
        yield Step(("fit", fitting, "--bank", str(bank), *shots, *made, *DOMAIN, "--output", str(run)), run)
        for extra in trained:
            yield Step(("train-extras", str(run), "--methods", extra), run / "methods" / extra)
        told = ("--methods", ",".join(methods), "--control", "random-experts")
        yield evaluated(plan, run, place / "test.jsonl", place / f"{kind}test-{name}", *told)


def recruit_steps(plan: Plan) -> Iterator[Step]:
    """Yield the profiling of the base model and the domains' adapters, and the recruiting of them for questions."""
    place = plan.output / "recruit"
    write_mix(plan.data, plan.output / "domains", MIXES["domains"], plan.seeds, plan.flags.train, plan.flags.test)
    write_skills(plan.data, place, plan.flags.test)
    for seed in plan.seeds:
        adapters = domain_adapters(plan, seed)
        yield adapters
        names = {"base": plan.flags.model, **{n: str(adapters.output / "experts" / n) for n in MIXES["domains"].train}}
        experts, run = place / f"experts-{seed}", place / f"run-{seed}"
        given = [word for name, source in names.items() for word in ("--expert", f"{name}={source}")]
        yield Step(("experts", "init", str(experts), *given, "--overwrite"), experts / "pool.json")
        told = ("--skills", "source", "--max-new-tokens", "32")
        rows = ("--data", str(place / "profile.jsonl"))
        yield Step(("profile", str(experts), *rows, *told), experts / "profile.json")
        words = ("fit", "symbolic-moe", "--experts", str(experts), "--max-new-tokens", "32", "--output", str(run))
        yield Step(words, run)
        output = place / f"test-{seed}"
        rows = ("--data", str(place / "test.jsonl"), "--control", "best-single", "--max-new-tokens", "32")
        yield Step(("eval", str(run), *rows, "--output", str(output)), output)


def influence_steps(plan: Plan) -> Iterator[Step]:
    """Yield the choice of rows by influence and by meaning, and adapters trained on these and on random rows."""
    place, count = plan.output / "influence", plan.flags.budget
    fits = dict(told_unlike(plan))  # the mix's rows are written then
    write_influence(plan.data, place, plan.output / UNLIKE, plan.seeds, plan.flags.test, plan.flags.train, count)
    for seed, fit in fits.items():
        yield fit
        aimed, many = (str(place / f"{name}-{seed}.jsonl") for name in ("aimed", "many"))
        near, chosen = place / f"near-{seed}", {}
        told = ("--target", aimed, "--data", many, "--share", str(count / plan.flags.train))
        for geometry in ("adam", "subspace"):
            helpful = place / f"{geometry}-{seed}"
            words = ("influence", str(fit.output), *told, "--geometry", geometry)
            yield Step((*words, "--output", str(helpful)), helpful)
            chosen[geometry] = helpful / "chosen.jsonl"
        words = ("gather", "--shots", aimed, "--pool", many, "--budget", str(count))
        yield Step((*words, "--output", str(near)), near)
        run, output = place / f"run-{seed}", place / f"test-{seed}"
        chosen |= {"nearest": near / "gathered.jsonl", "random": place / f"random-{seed}.jsonl", "aimed": Path(aimed)}
        data = [word for name, file in chosen.items() for word in ("--data", f"{name}={file}")]
        words = ("fit", "token-level", "--model", plan.flags.model, *data, "--seed", str(seed), *DOMAIN)
        yield Step((*words, "--output", str(run)), run)
        told = ("--methods", ",".join(["backbone", *(f"expert:{name}" for name in chosen)]))
        yield evaluated(plan, run, place / "test.jsonl", output, *told, "--control", "expert:random")


PARTS: dict[str, Callable[[Plan], Iterator[Step]]] = {
    "maths": lambda plan: mix_steps(plan, "maths"),
    "general": lambda plan: mix_steps(plan, "general"),
    "unlike": unlike_steps,
    "domains": domain_steps,
    "kshot": kshot_steps,
    "recruit": recruit_steps,
    "influence": influence_steps,
}
"""By name: what writes a part's rows and yields its steps."""

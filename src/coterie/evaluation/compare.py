"""Methods side by side on held-out rows: exact match of their answers and likelihood of the references.

All methods of a bank that meet in the logits share one forward pass over the references: only their votes differ.
"""

import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from coterie.artifacts import (
    FORMAT,
    check_output,
    environment_record,
    read_json,
    read_jsonl,
    run_folder,
    write_json,
    write_jsonl,
)
from coterie.combiners.logits import LogitCombiner
from coterie.data.batching import TokenRow, by_length
from coterie.data.examples import Example, load_all
from coterie.engine.decoding import response_logprobs
from coterie.errors import unknown_name
from coterie.evaluation.grading import Grade, checkable, grade
from coterie.evaluation.table import format_table, summarise
from coterie.methods import BACKBONE, METHODS, NormalisedRouter, method_named
from coterie.mixture import Completion, Mixture, with_backbone_expert
from coterie.routers.base import Routing
from coterie.settings import EvaluationSettings, SamplingSettings

logger = logging.getLogger(__name__)

ROUTED = "elrea"


class Likelihood(NamedTuple):
    """Mean negative log-likelihood of a reference per token, in nats, and its number of tokens."""

    nll: float
    tokens: int


class Routed(NamedTuple):
    """Weights for all rows, and the seconds they took."""

    routing: Routing
    seconds: float


class Answers(NamedTuple):
    """One method's answers to all rows, and the seconds they took (routing not included)."""

    completions: list[Completion]
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """What was measured: `summary` is evaluation.json, `rows` is rows.jsonl."""

    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    def __str__(self) -> str:
        """Return the table."""
        return format_table(self.summary["table"])


def evaluate(
    mixture: Mixture,
    examples: Sequence[Example],
    *,
    methods: Sequence[str] = ("backbone", "base", "elrea", "uniform-weights"),
    control: str = "base",
    generate: bool = True,
    batch_size: int = 8,
    resamples: int = 2000,
    **sampling: Any,
) -> Evaluation:
    """Compare methods on examples that no part of the mixture was trained on.

    Args:
        mixture: a fitted mixture.
        examples: rows with a response, and an answer where exact match can be graded.
        methods: names of the table of methods.
        control: the method that differences are taken to.
        generate: whether methods answer, or only likelihoods are measured.
        batch_size: prompts decoded together.
        resamples: bootstrap resamples behind every interval.
        **sampling: fields of `SamplingSettings`.

    Raises:
        CoterieError: for an unknown method, or a control that is not among the methods.
    """
    names = check_methods(methods, control)
    bench = _bench(mixture)
    seconds: dict[str, dict[str, float]] = {name: {} for name in names}
    routed = _routed(bench, examples, [*names, ROUTED])
    routings = {name: routed[name].routing for name in names}
    likelihoods = _likelihoods(bench, examples, routings, seconds)
    settings = SamplingSettings(**sampling)
    answers = {
        name: _answers(bench, examples, name, routings[name], batch_size, settings) for name in names if generate
    }
    for name, timed in answers.items():
        seconds[name]["generate"] = timed.seconds + routed[name].seconds
    shares = routed[ROUTED].routing.normalized()
    rows = [_row(number, example, names, likelihoods, answers, shares) for number, example in enumerate(examples)]
    sources = sorted({example.source or "" for example in examples})
    summary = {
        "format": FORMAT,
        "mixture": str(mixture.folder),
        "base_model": mixture.backbone.identity.__dict__,
        "control": control,
        "routed": ROUTED,
        "methods": names,
        "experts": list(mixture.bank.names),
        "rows": len(rows),
        "sources": sources,
        "settings": {"generate": generate, "batch_size": batch_size, **settings.model_dump()},
        "hardware": _hardware(),
        "routing": _mean_weights(rows, sources),
        "seconds": seconds,
        "table": summarise(rows, names, control, sources, resamples=resamples),
        **_cluster_record(mixture.folder),
    }
    return Evaluation(summary, rows)


def run_evaluation(settings: EvaluationSettings) -> Evaluation:
    """Evaluate a mixture folder and write the records into the output folder.

    Raises:
        CoterieError: for bad data, an unknown method, or an output folder that exists.
    """
    output = Path(settings.output)
    check_output(output, overwrite=settings.overwrite)
    names = list(METHODS) if settings.methods == "all" else [name.strip() for name in settings.methods.split(",")]
    check_methods(names, settings.control)
    examples = load_all(settings.data, settings.limit)
    mixture = Mixture.from_pretrained(settings.mixture, **settings.placement.model_dump())
    with run_folder(output, "eval", settings.model_dump(), {"mixture": mixture.backbone.identity.sha256}) as run:
        result = evaluate(
            mixture,
            examples,
            methods=names,
            control=settings.control,
            generate=settings.generate,
            batch_size=settings.batch_size,
            resamples=settings.resamples,
            **settings.sampling.model_dump(),
        )
        result.summary["data"] = ", ".join(settings.data)
        write_jsonl(run.path / "rows.jsonl", result.rows)
        write_json(run.path / "evaluation.json", result.summary)
    return result


def check_methods(methods: Sequence[str], control: str) -> list[str]:
    """Return the methods, each once, in the order given.

    Raises:
        CoterieError: for an unknown method, or a control that is not among them.
    """
    names = list(dict.fromkeys(methods))
    for name in names:
        method_named(name)
    if control not in names:
        raise unknown_name("method to compare with among those evaluated", control, names)
    return names


def _bench(mixture: Mixture) -> Mixture:
    """Add the base model itself to the bank, as one more expert."""
    return replace(mixture, bank=with_backbone_expert(mixture.bank, BACKBONE))


def _cell(bench: Mixture, name: str) -> Mixture:
    router, combiner = METHODS[name].cell(bench)
    return bench.replace(router=router, combiner=combiner)


def _routed(bench: Mixture, examples: Sequence[Example], names: Sequence[str]) -> dict[str, Routed]:
    """Route all rows for every method; methods that share a router share its work."""
    rows = bench.tokens(examples)
    routers = {name: METHODS[name].cell(bench)[0] for name in names}
    known: dict[int, Routed] = {}
    result = {}
    for name, router in routers.items():
        inner = router.router if isinstance(router, NormalisedRouter) else router
        if id(inner) not in known:
            started = time.perf_counter()
            known[id(inner)] = Routed(inner.route(rows), time.perf_counter() - started)
        found = known[id(inner)]
        result[name] = found if inner is router else Routed(found.routing.normalized(), found.seconds)
    return result


def _likelihoods(
    bench: Mixture, examples: Sequence[Example], routings: Mapping[str, Routing], seconds: dict[str, dict[str, float]]
) -> dict[str, list[Likelihood]]:
    rows = [bench.prompts.row(example) for example in examples]
    in_logits = [name for name in routings if isinstance(_cell(bench, name).combiner, LogitCombiner)]
    groups = [in_logits, *([name] for name in routings if name not in in_logits)]
    found: dict[str, list[Likelihood]] = {}
    for group in filter(None, groups):
        started = time.perf_counter()
        found |= _group_likelihoods(bench, rows, {name: routings[name] for name in group})
        for name in group:  # one pass serves the group, so its time is the group's
            seconds[name]["score"] = time.perf_counter() - started
    return found


def _group_likelihoods(
    bench: Mixture, rows: Sequence[TokenRow], routings: Mapping[str, Routing]
) -> dict[str, list[Likelihood]]:
    names = list(routings)
    combiner = _cell(bench, names[0]).combiner
    weights = [routings[name].for_experts(bench.bank.names) for name in names]
    result: dict[str, list[Likelihood]] = {name: [Likelihood(0.0, 0)] * len(rows) for name in names}
    with tqdm(total=len(rows), desc=f"likelihood of {', '.join(names)}", unit="row") as bar:
        for numbers in by_length(rows, 8):
            own = [weight[numbers] for weight in weights]
            plan = combiner.plan(torch.stack(own).sum(dim=0) if len(own) > 1 else own[0])
            votes = [combiner.votes(plan, w) for w in own] if isinstance(combiner, LogitCombiner) else [plan.votes]
            texts = [(rows[i].ids, _answer_positions(rows[i])) for i in numbers]
            logprobs = response_logprobs(bench.backbone, bench.layers, plan, votes, texts)
            for name, values in zip(names, logprobs, strict=True):
                for i, value in zip(numbers, values, strict=True):
                    result[name][i] = Likelihood(-float(value.mean()), len(value))
            bar.update(len(numbers))
    return result


def _answer_positions(row: TokenRow) -> list[int]:
    """Return the positions of the final answer's tokens."""
    return [place for place in range(row.prompt_length, len(row.ids)) if row.is_response[place]]


def _answers(
    bench: Mixture,
    examples: Sequence[Example],
    name: str,
    routing: Routing,
    batch_size: int,
    sampling: SamplingSettings,
) -> Answers:
    started = time.perf_counter()
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].instruction))  # little padding in a batch
    cell = _cell(bench, name)
    found: dict[int, Completion] = {}
    with tqdm(total=len(order), desc=f"answers of {name}", unit="prompt") as bar:
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            answers = cell.generate(
                [examples[i] for i in numbers],
                batch_size=batch_size,
                routing=routing.take(numbers),
                **sampling.model_dump(),
            )
            found |= dict(zip(numbers, answers, strict=True))
            bar.update(len(numbers))
    return Answers([found[i] for i in range(len(examples))], time.perf_counter() - started)


def _row(
    number: int,
    example: Example,
    names: Sequence[str],
    likelihoods: Mapping[str, list[Likelihood]],
    answers: Mapping[str, Answers],
    routed: Routing,
) -> dict[str, Any]:
    methods = {}
    for name in names:
        likelihood = likelihoods[name][number]
        answer = answers[name].completions[number] if name in answers else None
        verdict = _graded(answer, example)
        methods[name] = {
            "text": answer.text if answer else None,
            "correct": verdict.correct if verdict else None,
            "extracted": verdict.extracted if verdict else None,
            "nll": likelihood.nll,
            "tokens": likelihood.tokens,
            "finish_reason": answer.finish_reason if answer else None,
        }
    return {
        "id": example.id,
        "source": example.source or "",
        "category": example.category,
        "prompt": example.instruction,
        "reference": example.response,
        "answer": example.answer,
        "weights": routed.row(number),
        "methods": methods,
    }


def _graded(answer: Completion | None, example: Example) -> Grade | None:
    if answer is None or example.answer is None or not checkable(example.answer):
        return None
    return grade(answer.text, example.answer, prompt=example.instruction)


def _mean_weights(rows: Sequence[Mapping[str, Any]], sources: Sequence[str]) -> dict[str, dict[str, float]]:
    """Average the routed method's weights over the rows of every source."""
    result = {}
    for source in sources:
        chosen = [row["weights"] for row in rows if row["source"] == source]
        names = list(chosen[0])
        means: Tensor = torch.tensor([[weights[name] for name in names] for weights in chosen]).mean(dim=0)
        result[source] = dict(zip(names, means.tolist(), strict=True))
    return result


def _cluster_record(folder: Path | None) -> dict[str, Any]:
    """Read how the training rows were clustered, where the mixture's folder tells."""
    if folder is None or not (folder / "clusters.jsonl").exists():
        return {"clusters": {}, "clustering": {}}
    counts: dict[str, Counter[str]] = {}
    for row in read_jsonl(folder / "clusters.jsonl"):
        counts.setdefault(str(row["cluster"]), Counter())[str(row["source"] or "")] += 1
    ordered = sorted(counts, key=lambda name: (len(name), name))  # cluster-2 before cluster-10
    record = read_json(folder / "mixture.json").get("clustering", {})
    return {"clusters": {name: dict(counts[name]) for name in ordered}, "clustering": record}


def _hardware() -> dict[str, Any]:
    record = environment_record()
    return {
        "name": record["machine"],
        "python": record["python"],
        "threads": torch.get_num_threads(),
        **record["versions"],
    }

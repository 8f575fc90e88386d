"""The records that an evaluation leaves behind: one object a row, and the summary's plain facts."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from coterie.artifacts import environment_record
from coterie.backbone.loading import cache_numbers
from coterie.data.examples import Example
from coterie.evaluation.answers import Answers, Task
from coterie.evaluation.shared_scores import Scored
from coterie.grading.grade import graded
from coterie.methods.family import MethodGrid
from coterie.mixture import Mixture
from coterie.routers.base import Routing

MERGES_MEASURED = 16  # rows of weights that a merge's error is averaged over


def question_record(example: Example) -> dict[str, Any]:
    """Return what the record of a row keeps of the row itself."""
    return {
        "id": example.id,
        "source": example.source or "",
        "category": example.category,
        "prompt": example.instruction,
        "reference": example.response,
        "answer": example.answer,
    }


def row_record(
    number: int, task: Task, scored: Scored, answers: Mapping[str, Answers], grid: MethodGrid, *, run_code: bool
) -> dict[str, Any]:
    """Return the record of one row: every method's answer, grade and likelihood, and the experts' own likelihoods."""
    example = task.row
    return {
        **question_record(example),
        "expert_nll": dict(zip(grid.fitted, scored.expert_nll[number].tolist(), strict=True)),
        "methods": {
            name: _method_record(name, number, task, scored, answers, run_code=run_code) for name in scored.cells
        },
    }


def _method_record(
    name: str, number: int, task: Task, scored: Scored, answers: Mapping[str, Answers], *, run_code: bool
) -> dict[str, Any]:
    given = answers[name].completions[number] if name in answers else None
    verdict = graded(given.text, task.row, run_code=run_code) if given else None
    nll = float(scored.nll[name][number]) if name in scored.nll else None
    return {
        "text": given.text if given else None,
        "correct": verdict.correct if verdict else None,
        "extracted": verdict.extracted if verdict else None,
        "f1": verdict.f1 if verdict else None,
        "nll": nll,
        "tokens": 0 if nll is None else int(scored.tokens[number]),
        "finish_reason": given.finish_reason if given else None,
        **({"trace": given.trace.record()} if given and given.trace else {}),
    }


def mean_weights(rows: Sequence[Mapping[str, Any]], routing: Routing, key: Any) -> dict[str, dict[str, float]]:
    """Average a method's normalised weights over the rows of every value of `key`, in sorted order."""
    shares = routing.normalized().weights
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(key(row), []).append(number)
    return {
        name: dict(zip(routing.experts, shares[groups[name]].mean(dim=0).tolist(), strict=True))
        for name in sorted(groups)
    }


def merge_errors(scored: Scored) -> dict[str, float]:
    """Return how far each approximate merge is from the exact mixture, on average over some rows' weights."""
    errors = {}
    for name, cell in scored.cells.items():
        if cell.combiner.approximates:
            weights = scored.routed[name].routing.for_experts(cell.bank.names)[:MERGES_MEASURED]
            found = [cell.layers.merge_error(tuple(row), cell.combiner.approximates) for row in weights.tolist()]
            errors[name] = sum(found) / len(found)
    return errors


def memory_bytes(scored: Scored, lengths: Sequence[int]) -> dict[str, int]:
    """Compute what each method holds to answer one prompt: the base, the experts it runs, and the cache of its rows.

    Args:
        scored: the methods.
        lengths: tokens of every prompt and its answer; the cache is counted at their mean.
    """
    mean = sum(lengths) / len(lengths)
    return {name: _held_bytes(cell, scored.routed[name].routing, mean) for name, cell in scored.cells.items()}


def _held_bytes(cell: Mixture, routing: Routing, tokens: float) -> int:
    model: Any = cell.backbone.model
    base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    used = (routing.for_experts(cell.bank.names) > 0).any(dim=0)
    adapters = [adapter for adapter, is_used in zip(cell.bank.adapters, used.tolist(), strict=True) if is_used]
    experts = sum(pair.down.numel() + pair.up.numel() for adapter in adapters for pair in adapter.values())
    plan = cell.combiner.plan(routing.aligned(cell.bank.names))
    rows = len(plan.prompts) / plan.votes.shape[0]
    cache = cache_numbers(model.config) * tokens * rows
    size = next(model.parameters()).element_size()
    return round(base + size * (experts + cache))


def hardware_record() -> dict[str, Any]:
    """Name what an evaluation ran on."""
    record = environment_record()
    return {
        "name": record["machine"],
        "python": record["python"],
        "threads": torch.get_num_threads(),
        **record["versions"],
    }

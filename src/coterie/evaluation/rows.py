"""The records that an evaluation leaves behind: one object a row, and the summary's plain facts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from coterie.artifacts import environment_record
from coterie.backbone.loading import cache_numbers
from coterie.data.examples import Example
from coterie.evaluation.answers import Answers, TestRow
from coterie.evaluation.shared_scores import Scored
from coterie.grading.grade import graded
from coterie.methods.family import MethodGrid
from coterie.records.evaluation import MethodResult, RowRecord
from coterie.routers.base import Routing

MERGES_MEASURED = 16  # rows of weights that a merge's error is averaged over


def question_fields(example: Example) -> dict[str, Any]:
    """Return what the record of a row keeps of the row itself."""
    return {
        "id": example.id,
        "source": example.source or "",
        "category": example.category,
        "prompt": example.instruction,
        "reference": example.response,
        "answer": example.answer,
    }


def method_result(text: str | None, row: Example, *, run_code: bool, **others: Any) -> MethodResult:
    """Grade a text that answers a row, as far as it can be; `others` are the other fields of the result."""
    verdict = None if text is None else graded(text, row, run_code=run_code)
    correct, extracted, f1 = (verdict.correct, verdict.extracted, verdict.f1) if verdict else (None, None, None)
    return MethodResult(text=text, correct=correct, extracted=extracted, f1=f1, **others)


def row_records(
    tests: Sequence[TestRow],
    scored: Scored,
    answers: Mapping[str, Answers],
    grid: MethodGrid,
    routing: Routing,
    *,
    run_code: bool,
) -> list[RowRecord]:
    """Return every row with each method's answer, grade and likelihood, and the experts' own likelihoods.

    Args:
        tests: the rows.
        scored: likelihoods of the references.
        answers: by method; empty where nothing was generated.
        grid: the methods.
        routing: of the mixture's own method, whose weights are recorded.
        run_code: whether tests of code are run.
    """
    shares = routing.normalized()
    records = []
    for number, test in enumerate(tests):
        methods = {}
        for name in scored.cells:
            given = answers[name].completions[number] if name in answers else None
            nll = float(scored.nll[name][number]) if name in scored.nll else None
            methods[name] = method_result(
                given.text if given else None,
                test.row,
                run_code=run_code,
                nll=nll,
                tokens=0 if nll is None else int(scored.tokens[number]),
                finish_reason=given.finish_reason if given else None,
                **({"trace": given.trace} if given and given.trace else {}),
            )
        alone = dict(zip(grid.fitted, scored.expert_nll[number].tolist(), strict=True))
        question = question_fields(test.row)
        records.append(RowRecord(**question, expert_nll=alone, methods=methods, weights=shares.row(number)))
    return records


def mean_weights(
    rows: Sequence[RowRecord], routing: Routing, key: Callable[[RowRecord], str]
) -> dict[str, dict[str, float]]:
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
            weights = scored.routed[name].routing.aligned(cell.bank.names).weights[:MERGES_MEASURED]
            found = [cell.layers.merge_error(tuple(row), cell.combiner.approximates) for row in weights.tolist()]
            errors[name] = sum(found) / len(found)
    return errors


def memory_bytes(scored: Scored, lengths: Sequence[int]) -> dict[str, int]:
    """Compute what each method holds to answer one prompt: the base, the experts it runs, and the cache of its rows.

    Args:
        scored: the methods.
        lengths: tokens of every prompt and its answer; the cache is counted at their mean.
    """
    tokens = sum(lengths) / len(lengths)
    held = {}
    for name, cell in scored.cells.items():
        model: Any = cell.backbone.model
        routing = scored.routed[name].routing
        base = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        used = (routing.aligned(cell.bank.names).weights > 0).any(dim=0)
        adapters = [adapter for adapter, is_used in zip(cell.bank.adapters, used.tolist(), strict=True) if is_used]
        experts = sum(pair.down.numel() + pair.up.numel() for adapter in adapters for pair in adapter.values())
        plan = cell.combiner.plan(routing.aligned(cell.bank.names))
        cache = cache_numbers(model.config) * tokens * len(plan.prompts) / plan.votes.shape[0]
        held[name] = round(base + next(model.parameters()).element_size() * (experts + cache))
    return held


def hardware_record() -> dict[str, Any]:
    """Name what an evaluation ran on."""
    record = environment_record()
    return {
        "name": record["machine"],
        "python": record["python"],
        "threads": torch.get_num_threads(),
        **record["versions"],
    }

"""The records that an evaluation leaves behind: one object a row, and the summary's plain facts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from coterie.artifacts import FORMAT, environment_record
from coterie.backbone.memory import held_bytes
from coterie.backbone.row_cache import make_row_cache
from coterie.data.examples import Example
from coterie.evaluation.answers import Answers, TestRow
from coterie.evaluation.shared_scores import Scored
from coterie.evaluation.table import strongest, summarise
from coterie.grading.grade import graded
from coterie.grading.lengths import lengths_in_words
from coterie.methods.family import MethodGrid
from coterie.records.evaluation import EvaluationRecord, MethodResult, RowRecord
from coterie.routers.base import Routing
from coterie.settings.commands import EvaluationSettings

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


def summary_record(
    settings: EvaluationSettings,
    examples: Sequence[Example],
    rows: Sequence[RowRecord],
    routing: Routing,
    methods: Sequence[str],
    rivals: Sequence[str],
    category_of: Callable[[RowRecord], str],
    **others: Any,  # noqa: ANN401 - the fields as they are
) -> EvaluationRecord:
    """Sum up what every evaluation has; `others` are the other fields.

    The mean weights of `routing` are recorded by the rows' sources, and by category where any row has one.
    The control is the one that was asked for, else the strongest of the simple `rivals` on these rows.
    """
    among = () if settings.control else tuple(rivals)
    control = settings.control or strongest(rows, rivals or methods[:1])
    sources = sorted({row.source for row in rows})
    categories = [category_of(row) for row in rows] if any(row.category for row in rows) else []
    environment = environment_record()
    return EvaluationRecord(
        format=FORMAT,
        data=", ".join(settings.data),
        control=control,
        control_among=among,
        methods=tuple(methods),
        rows=len(rows),
        sources=tuple(sources),
        settings={
            **settings.sampling.model_dump(),
            "max_new_tokens": lengths_in_words(settings.sampling, examples),
            "generate": settings.generate,
            "batch_size": settings.batch_size,
        },
        hardware={
            "name": environment["machine"],
            "python": environment["python"],
            "threads": torch.get_num_threads(),
            **environment["versions"],
        },
        table=tuple(summarise(rows, methods, control, sources, choices=len(among) or 1, resamples=settings.resamples)),
        routing=_mean_weights([row.source for row in rows], routing),
        routing_by_category=_mean_weights(categories, routing),
        **others,
    )


def _mean_weights(names: Sequence[str], routing: Routing) -> dict[str, dict[str, float]]:
    """Average normalised weights over the rows of one name, in sorted order."""
    shares = routing.normalized().weights
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(name, []).append(number)
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
    tokens = round(sum(lengths) / len(lengths))
    held = {}
    for name, cell in scored.cells.items():
        routing = scored.routed[name].routing.aligned(cell.bank.names)
        used = (routing.weights > 0).any(dim=0).tolist()
        adapters = [adapter for adapter, is_used in zip(cell.bank.adapters, used, strict=True) if is_used]
        experts = sum(pair.down.numel() + pair.up.numel() for adapter in adapters for pair in adapter.values())
        plan = cell.combiner.plan(routing)
        rows = sum(len(own.votes) for own in plan) / len(plan)
        cache = make_row_cache(cell.backbone).bytes_for(1, tokens) * rows
        held[name] = round(held_bytes(cell.backbone.model) + experts * cell.backbone.model.dtype.itemsize + cache)
    return held

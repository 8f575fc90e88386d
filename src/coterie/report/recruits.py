"""Who was recruited, who was right when, and what a question cost."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from coterie.records.evaluation import EvaluationRecord, RowRecord
from coterie.report.heatmaps import profile_map

MOST_QUESTIONS = 200  # on the page; all of them are in rows.jsonl


def recruiting_view(evaluation: EvaluationRecord, rows: Sequence[RowRecord]) -> dict[str, Any]:
    """Compute what the page shows of recruited experts; nothing where there are none.

    For every expert its answers, how many were graded and right, and how often it failed; for every method what a
    question cost: calls, tokens read and written, seconds.
    """
    questions = [row for row in rows if row.recruited]
    answers = [own for row in rows if row.recruited for own in row.recruited.answers]
    counts = Counter(own.expert for own in answers)
    graded = Counter(own.expert for own in answers if own.correct is not None)
    right = Counter(own.expert for own in answers if own.correct)
    failed = Counter(own.expert for own in answers if own.error is not None)
    recruits = [
        {
            "expert": name,
            "answers": counts[name],
            "graded": graded[name],
            "right": right[name] / graded[name] if graded[name] else None,
            "failed": failed[name],
        }
        for name in evaluation.experts
    ]
    costs = evaluation.costs
    return {
        "profile_map": profile_map(evaluation.profile),
        "recruits": recruits if answers else [],
        "question_costs": [{"method": name, **costs[name]} for name in evaluation.methods if name in costs],
        "questions": questions[:MOST_QUESTIONS],
        "questions_left_out": max(0, len(questions) - MOST_QUESTIONS),
    }

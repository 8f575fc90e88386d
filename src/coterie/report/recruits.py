"""Who was recruited, who was right when, and what a question cost."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from coterie.records.evaluation import EvaluationRecord, RowRecord
from coterie.report.heatmaps import profile_map

MOST_QUESTIONS = 200  # on the page; all of them are in rows.jsonl


def recruit_table(evaluation: EvaluationRecord, rows: Sequence[RowRecord]) -> list[dict[str, Any]]:
    """List every expert: its answers, how many were graded and right, and how often it failed."""
    answers = [own for row in rows if row.recruited for own in row.recruited.answers]
    counts = Counter(own.expert for own in answers)
    graded = Counter(own.expert for own in answers if own.correct is not None)
    right = Counter(own.expert for own in answers if own.correct)
    failed = Counter(own.expert for own in answers if own.error is not None)
    return [
        {
            "expert": name,
            "answers": counts[name],
            "graded": graded[name],
            "right": right[name] / graded[name] if graded[name] else None,
            "failed": failed[name],
        }
        for name in evaluation.experts
        if answers
    ]


def question_costs(evaluation: EvaluationRecord) -> list[dict[str, Any]]:
    """List what a question cost each method: calls, tokens read and written, seconds."""
    return [{"method": name, **evaluation.costs[name]} for name in evaluation.methods if name in evaluation.costs]


def recruiting_view(evaluation: EvaluationRecord, rows: Sequence[RowRecord]) -> dict[str, Any]:
    """Compute what the page shows of recruited experts; nothing where there are none."""
    questions = [row for row in rows if row.recruited]
    return {
        "profile_map": profile_map(evaluation.profile),
        "recruits": recruit_table(evaluation, rows),
        "question_costs": question_costs(evaluation),
        "questions": questions[:MOST_QUESTIONS],
        "questions_left_out": max(0, len(questions) - MOST_QUESTIONS),
    }

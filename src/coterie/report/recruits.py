"""Who was recruited, who was right when, and what a question cost."""

from collections import Counter
from typing import Any

from coterie.report.heatmaps import profile_map
from coterie.report.records import Evaluation

MOST_QUESTIONS = 200  # on the page; all of them are in rows.jsonl


def recruit_table(evaluation: Evaluation) -> list[dict[str, Any]]:
    """List every expert: its answers, how many were graded and right, and how often it failed."""
    said = [own for row in evaluation.rows if row.recruiting for own in row.recruiting.said]
    counts = Counter(own.expert for own in said)
    graded = Counter(own.expert for own in said if own.correct is not None)
    right = Counter(own.expert for own in said if own.correct)
    failed = Counter(own.expert for own in said if own.error is not None)
    return [
        {
            "expert": name,
            "answers": counts[name],
            "graded": graded[name],
            "right": right[name] / graded[name] if graded[name] else None,
            "failed": failed[name],
        }
        for name in evaluation.experts
        if said
    ]


def question_costs(evaluation: Evaluation) -> list[dict[str, Any]]:
    """List what a question cost each method: calls, tokens read and written, seconds."""
    return [{"method": name, **evaluation.costs[name]} for name in evaluation.methods if name in evaluation.costs]


def recruiting_view(evaluation: Evaluation) -> dict[str, Any]:
    """Compute what the page shows of recruited experts; nothing where there are none."""
    rows = [row for row in evaluation.rows if row.recruiting]
    return {
        "profile_map": profile_map(evaluation.profile),
        "recruits": recruit_table(evaluation),
        "question_costs": question_costs(evaluation),
        "questions": rows[:MOST_QUESTIONS],
        "questions_left_out": max(0, len(rows) - MOST_QUESTIONS),
    }

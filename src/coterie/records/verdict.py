"""What all rows say of a mixture's own method against the control, and what to use instead where it is no better."""

from collections.abc import Callable
from typing import Literal

from coterie.records.evaluation import EvaluationRecord

Verdict = Literal["better", "worse", "no better", "unclear"]
_GOOD = {"accuracy": 1, "nll": -1}  # the side of zero on which a difference is to the good


def verdict(record: EvaluationRecord) -> Verdict | None:
    """Judge the mixture's method by accuracy, and by NLL where accuracy is silent; None where nothing was compared.

    A measure speaks where chance hardly explains its difference. Where none does, `unclear` means that the rows lean
    towards the method and `no better` that they do not.
    """
    score = record.score(record.subject) if record.subject else None
    gaps = [(side, score.difference(measure)) for measure, side in _GOOD.items()] if score else []
    found = [(side * gap.value, gap.sure) for side, gap in gaps if gap]
    if not found:
        return None
    sure = next((gain for gain, is_sure in found if is_sure), None)
    if sure is not None:
        return "better" if sure > 0 else "worse"
    return "unclear" if next((gain for gain, _ in found if gain), 0.0) > 0 else "no better"


def advice(record: EvaluationRecord, name: Callable[[str], str] = str) -> str:
    """Say what to use instead of the mixture's method, named by `name`; nothing where the rows may speak for it."""
    control, method = name(record.control), name(record.subject or "")
    return {
        "worse": f"Use {control} instead of {method}.",
        "no better": f"Nothing here speaks for {method}: use {control} instead, unless more rows say otherwise.",
    }.get(verdict(record) or "", "")

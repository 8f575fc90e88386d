"""What an evaluation says of its own method: better than the control, or that the control should be used instead."""

import pytest

from coterie.records.evaluation import EvaluationRecord
from coterie.records.verdict import advice, verdict
from helpers import table


def record(*, accuracy=None, nll=None, methods=("base", "elrea"), control="base"):
    """An evaluation of `elrea`; a measure is (difference, adjusted p)."""
    gap = {"accuracy_difference": accuracy and accuracy[0], "accuracy_p": accuracy and accuracy[1]}
    gap |= {"nll_difference": nll and nll[0], "nll_p": nll and nll[1]}
    lines = [{"method": name, "source": "all", "rows": 9, "graded": 9} for name in methods]
    lines = [{**line, **gap} if line["method"] == "elrea" else line for line in lines]
    return EvaluationRecord(
        format=1,
        mixture="runs/elrea",
        control=control,
        methods=methods,
        experts=("base",),
        rows=9,
        sources=("",),
        table=lines,
    )


@pytest.mark.parametrize(
    ("accuracy", "nll", "found"),
    table(
        ("more right", (0.2, 0.01), (-0.1, 0.01), "better"),
        ("more right, likelier or not", (0.2, 0.01), (0.1, 0.01), "better"),
        ("fewer right", (-0.2, 0.01), (-0.1, 0.01), "worse"),
        ("unclear accuracy, clearly likelier", (-0.2, 0.4), (-0.1, 0.01), "better"),
        ("unclear accuracy, clearly less likely", (0.2, 0.4), (0.1, 0.01), "worse"),
        ("leaning towards it", (0.2, 0.4), (0.1, 0.4), "unclear"),
        ("leaning away", (-0.2, 0.4), (-0.1, 0.4), "no better"),
        ("as many right, leaning towards it", (0.0, 1.0), (-0.1, 0.4), "unclear"),
        ("equal in both", (0.0, 1.0), (0.0, 1.0), "no better"),
        ("likelier, nothing graded", None, (-0.1, 0.01), "better"),
        ("less likely, nothing graded", None, (0.1, 0.01), "worse"),
        ("answers alone", (-0.1, 1.0), None, "no better"),
        ("nothing measured", None, None, None),
    ),
)
def test_accuracy_speaks_first_and_likelihood_where_it_is_silent(accuracy, nll, found):
    assert verdict(record(accuracy=accuracy, nll=nll)) == found


def test_what_to_use_instead_is_said_where_the_rows_say_it_and_nowhere_else():
    assert advice(record(accuracy=(-0.2, 0.01))) == "Use base instead of elrea."
    assert advice(record(accuracy=(0.0, 1.0)), str.upper) == (
        "Nothing here speaks for ELREA: use BASE instead, unless more rows say otherwise."
    )
    assert advice(record(accuracy=(0.2, 0.01))) == advice(record(accuracy=(0.2, 0.4))) == advice(record()) == ""


def test_the_control_alone_and_methods_beside_the_mixtures_own_are_not_judged():
    assert verdict(record(methods=("base",))) is None
    assert verdict(record(methods=("base", "x", "y"))) is None

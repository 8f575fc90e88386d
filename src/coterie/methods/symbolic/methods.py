"""What a fitted run of symbolic-moe can answer as: who answers, and how one answer is made of several."""

from coterie.combiners.aggregate import MAJORITY, WEIGHTED
from coterie.methods.extras import FittedRun
from coterie.methods.family import Family, Method

METHOD = "symbolic-moe"
BEST_SINGLE = "best-single"
RANDOM = "random-experts"
SELF_CONSISTENCY = "self-consistency"


def _recruited(router: str, combiner: str) -> Method:
    return Method("any experts + skill profiles", router, combiner, "arXiv 2503.05641")


METHODS = {
    METHOD: _recruited("skills, k recruited per question", "texts: the chosen aggregator"),
    MAJORITY: _recruited("the same", "texts: majority"),
    WEIGHTED: _recruited("the same", "texts: vote weighted by profile"),
    BEST_SINGLE: _recruited("the best on the validation questions", "-"),
    RANDOM: _recruited("random, k per question", "texts: the chosen aggregator"),
    SELF_CONSISTENCY: _recruited("the best on the validation questions", "texts: majority of its samples"),
}
"""By name; an expert's name stands for it alone."""

FAMILY: Family[FittedRun] = Family(METHOD, METHODS, {}, None, usual=lambda mixture: list(METHODS))

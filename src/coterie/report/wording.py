"""Numbers and findings in words: one way to write each kind of number, and the sentence the page opens with."""

import json
import re
from collections.abc import Iterable

from coterie.records.evaluation import Difference, EvaluationRecord
from coterie.records.verdict import advice
from coterie.records.wording import listed, p_value

ABSENT = "–"
AXES = {"accuracy": "Accuracy in %", "nll": "NLL in nats a token"}
UNITS = {"accuracy": 100.0, "nll": 1.0}  # accuracy is drawn in per cent and points
DECIMALS = {"accuracy": 1, "nll": 3}
_MINUS = "\N{MINUS SIGN}"
_REROUTED = re.compile(r"(.+):every=([1-9][0-9]{0,5}|inf)", re.DOTALL)
_SINGLE_EXPERT = "expert:"
_METHOD_WORDS = {"token-level-published": "token-level, published"}
_HOW_OFTEN = {"1": "every token", "inf": "prompt only"}
_ENDINGS = {"1": "st", "2": "nd", "3": "rd"}


def fixed(value: float | None, decimals: int) -> str:
    """Write a number with so many decimals and a true minus sign; a missing number is a dash."""
    if value is None:
        return ABSENT
    text = f"{value:.{decimals}f}"
    is_zero = float(text) == 0
    return text.lstrip("-") if is_zero else text.replace("-", _MINUS)


def signed(value: float | None, decimals: int) -> str:
    """Write a difference, with its sign unless it rounds to zero."""
    text = fixed(value, decimals)
    return text if value is None or value < 0 or float(text) == 0 else f"+{text}"


def plain(value: float, decimals: int) -> str:
    """Write an axis' number with its sign; zero is bare."""
    return signed(value, decimals) if round(value, decimals) else "0"


def percent(share: float | None, decimals: int = 1) -> str:
    """Write a share of 1 in per cent; it may be negative or above 1."""
    return ABSENT if share is None else f"{fixed(100 * share, decimals)}%"


def above(value: float, measure: str) -> str:
    """Write a difference to the control: of `accuracy` in points, of `nll` in nats."""
    return signed(UNITS[measure] * value, 1 if measure == "accuracy" else 4)


def amount(value: float | None, decimals: int = 0) -> str:
    """Write a count or a measured quantity, its thousands set apart."""
    return ABSENT if value is None else f"{value:,.{decimals}f}"


def percents(shares: Iterable[tuple[str, float]]) -> str:
    """Write names, each with its share of 1."""
    return ", ".join(f"{name} {percent(share)}" for name, share in shares)


def perplexity(value: float | None) -> str:
    """Write a perplexity: two decimals, none where it is large, a power of ten where it is beyond all reading."""
    if value is None or value < 1000:
        return fixed(value, 2)
    return f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"


def fact(value: object) -> str:
    """Write a value of any kind as one text."""
    return value if isinstance(value, str) else json.dumps(value)


def source_name(source: str) -> str:
    """Name a source; the empty one is none."""
    return source or "no source"


def method_name(method: str) -> str:
    """Say a method's name in words where the one that commands take is terse."""
    base, every = found.groups() if (found := _REROUTED.fullmatch(method)) else (method, "")
    alone = base.startswith(_SINGLE_EXPERT)
    words = f"{base.removeprefix(_SINGLE_EXPERT)} alone" if alone else _METHOD_WORDS.get(base, base)
    if not every:
        return words
    ending = "th" if every[-2:] in ("11", "12", "13") else _ENDINGS.get(every[-1], "th")
    return f"{words}, {_HOW_OFTEN.get(every, f'every {every}{ending} token')}"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural where it needs one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(name: str, most: int = 26) -> str:
    """Shorten a long name in its middle: names that belong together often differ at their ends only."""
    if len(name) <= most:
        return name
    half = most // 2
    end = name[1 - half :]
    return f"{name[:half]}…{end[end.find(' ', 0, half // 2) + 1 :]}"  # from a whole word on, if one begins soon


def span(difference: Difference | None, measure: str) -> str:
    """Write the interval of a difference of `accuracy` (in points) or `nll`."""
    if difference is None or difference.interval is None:
        return ABSENT
    return " to ".join(above(end, measure) for end in difference.interval)


def headline(evaluation: EvaluationRecord) -> str:
    """Say the main result in one sentence: how far the mixture's method is from the control, and whether that is clear.

    Accuracy speaks where rows were graded, NLL otherwise.
    """
    score = evaluation.score(evaluation.subject) if evaluation.subject else None
    if score and (gap := score.difference("accuracy")):
        found = f"answers {percent(score.accuracy)} of {counted(score.graded, 'graded row')} right"
        more = f"{fixed(abs(100 * gap.value), 1)} points {'more' if gap.value > 0 else 'fewer'} than"
        same, interval = "as many as", f"{span(gap, 'accuracy')} points"
    elif score and (gap := score.difference("nll")):
        found = f"has a mean NLL of {fixed(score.nll, 3)} nats a token on {counted(score.rows, 'row')}"
        more = f"{fixed(abs(gap.value), 4)} {'higher (worse)' if gap.value > 0 else 'lower (better)'} than"
        same, interval = "the same as", f"{span(gap, 'nll')} nats"
    else:
        return _neutral_sentence(evaluation)
    among = len(evaluation.control_among)
    rival = f"{method_name(evaluation.control)}{f', the strongest of {among} simple rivals' if among > 1 else ''}"
    than = f"{more if gap.value else same} {rival}"
    were = "was" if score.cut == 1 else "were"
    cut = f" {counted(score.cut, 'answer')} reached the limit of new tokens and {were} cut." if score.cut else ""
    said = f"{method_name(score.method)} {found}, {than}; {_certainty(gap, interval)}.{cut}"
    return f"{said} {advice(evaluation, method_name)}".strip()


def _certainty(difference: Difference, interval: str) -> str:
    if difference.interval is None and difference.p is None:
        return "no interval was recorded, so chance cannot be ruled out"
    side = "excludes" if difference.clear else "includes"
    found = f"the 95% interval of the difference, {interval}, {side} zero" if difference.interval else ""
    p = p_value(difference.p).replace("<", "below ")
    tested = f"p, adjusted for all comparisons, is {p}" if difference.p is not None else ""
    joint = ", and " if difference.clear == difference.sure else ", but "
    verdict = "more than chance would explain" if difference.sure else "these rows cannot tell the two apart"
    return f"{joint.join(filter(None, (found, tested)))}: {verdict}"


def significant(evaluation: EvaluationRecord) -> str:
    """Name the methods whose difference is significant by adjusted p; empty where the records have no p."""
    sentences = []
    for measure, name in (("accuracy", "accuracy"), ("nll", "NLL")):
        gaps = {score.method: gap for score in evaluation.scores() if (gap := score.difference(measure))}
        tested = {method: gap for method, gap in gaps.items() if gap.p is not None}
        if tested:
            found = [method for method, gap in tested.items() if gap.significant]
            differ = "differs" if len(found) < 2 else "differ"
            which = f": {listed([*map(method_name, found)])}" if found else ""
            of_all = f"{len(found) or 'none'} of {counted(len(tested), 'method')}"
            sentences.append(f"In {name}, {of_all} {differ} significantly{which}.")
    return " ".join(sentences)


def _neutral_sentence(evaluation: EvaluationRecord) -> str:
    control, score = evaluation.control, evaluation.score(evaluation.control)
    others = len(evaluation.methods) - 1
    if others:
        stand = f"{counted(others, 'method')} {'stands' if others == 1 else 'stand'} beside {method_name(control)}"
        return f"{stand} on {counted(evaluation.rows, 'row')}; the table has the differences."
    graded = score.graded if score else 0
    right = f"answers {percent(score.accuracy)} of {counted(graded, 'graded row')} right" if score and graded else ""
    nll = f"has a mean NLL of {fixed(score.nll, 3)} nats a token" if score and score.nll is not None else ""
    found = " and ".join(filter(None, (right, nll))) or "was run"
    return f"Only {method_name(control)} was evaluated, so there is nothing to compare: it {found}."

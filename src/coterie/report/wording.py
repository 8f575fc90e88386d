"""Numbers and findings in words: one way to write each kind of number, and the sentence the page opens with."""

import math

from coterie.report.records import Difference, Evaluation, Score

ABSENT = "–"
_MINUS = "\N{MINUS SIGN}"


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


def plain(value: float, step: float) -> str:
    """Write an axis' number with the decimals its step needs; zero is bare."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return signed(value, decimals) if abs(value) > step / 2 else "0"


def percent(share: float | None) -> str:
    """Write a share of 1 in per cent."""
    return ABSENT if share is None else f"{fixed(100 * share, 1)}%"


def points(share: float) -> str:
    """Write a difference of two shares in points."""
    return signed(100 * share, 1)


def nats(value: float) -> str:
    """Write a difference of NLL."""
    return signed(value, 4)


def seconds(value: float | None) -> str:
    """Write seconds to the tenth."""
    return ABSENT if value is None else f"{value:,.1f}"


def amount(value: float) -> str:
    """Write a count."""
    return f"{value:,.0f}"


def counted(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural where it needs one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(name: str, most: int = 26) -> str:
    """Shorten a long name in its middle: names that belong together often differ at their ends only."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[1 - half :]}"


def span(difference: Difference | None, measure: str) -> str:
    """Write the interval of a difference of `accuracy` (in points) or `nll`."""
    if difference is None or difference.interval is None:
        return ABSENT
    write = points if measure == "accuracy" else nats
    return " to ".join(write(end) for end in difference.interval)


def headline(evaluation: Evaluation) -> str:
    """Say the main result in one sentence: how far the mixture's method is from the control, and whether that is clear.

    Accuracy speaks where rows were graded, NLL otherwise.
    """
    subject, control = evaluation.subject, evaluation.control
    score = evaluation.score(subject) if subject else None
    if score and score.accuracy_difference:
        return _accuracy_sentence(score, score.accuracy_difference, control)
    if score and score.nll_difference:
        return _nll_sentence(score, score.nll_difference, control)
    return _neutral_sentence(evaluation)


def _accuracy_sentence(score: Score, difference: Difference, control: str) -> str:
    more = f"{fixed(abs(100 * difference.value), 1)} points {'more' if difference.value > 0 else 'fewer'} than"
    than = more if difference.value else "as many as"
    finding = f"{score.method} answers {percent(score.accuracy)} of {counted(score.graded, 'graded row')} right"
    return f"{finding}, {than} {control}; {_certainty(difference, span(difference, 'accuracy') + ' points')}."


def _nll_sentence(score: Score, difference: Difference, control: str) -> str:
    more = f"{fixed(abs(difference.value), 4)} {'higher (worse)' if difference.value > 0 else 'lower (better)'} than"
    than = more if difference.value else "the same as"
    finding = f"{score.method} has a mean NLL of {fixed(score.nll, 3)} nats a token on {counted(score.rows, 'row')}"
    return f"{finding}, {than} {control}; {_certainty(difference, span(difference, 'nll') + ' nats')}."


def _certainty(difference: Difference, interval: str) -> str:
    if difference.interval is None:
        return "no interval was recorded, so chance cannot be ruled out"
    if difference.clear:
        return f"the 95% interval of the difference, {interval}, excludes zero: more than chance would explain"
    return f"the 95% interval of the difference, {interval}, includes zero: these rows cannot tell the two apart"


def _neutral_sentence(evaluation: Evaluation) -> str:
    control, score = evaluation.control, evaluation.score(evaluation.control)
    others = len(evaluation.methods) - 1
    if others:
        stand = f"{counted(others, 'method')} {'stands' if others == 1 else 'stand'} beside {control}"
        return f"{stand} on {counted(len(evaluation.rows), 'row')}; the table has the differences."
    graded = score.graded if score else 0
    right = f"answers {percent(score.accuracy)} of {counted(graded, 'graded row')} right" if score and graded else ""
    nll = f"has a mean NLL of {fixed(score.nll, 3)} nats a token" if score and score.nll is not None else ""
    found = " and ".join(filter(None, (right, nll))) or "was run"
    return f"Only {control} was evaluated, so there is nothing to compare: it {found}."

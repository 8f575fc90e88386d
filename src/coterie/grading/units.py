"""Units of answers: what stands beside a number, what it measures, and when two of them agree.

A unit that the table knows is a product of powers of basic measures and a factor, so that 90 minutes are 1.5 hours and
no 90 hours. Anything else is a label of words: 5 apples are no 5 pears, but 27 days are 27 working days. An answer
without a unit leaves it to the question.
"""

import re
from collections import Counter
from collections.abc import Iterable
from fractions import Fraction
from typing import NamedTuple

LONGEST_UNIT = 80  # characters

CURRENCIES = "$€£₹¥₩₽₺₫₱₦₪₴฿"
"""Signs that may stand before a number or behind it."""

Powers = frozenset[tuple[str, int]]


class Measure(NamedTuple):
    """What a unit measures: powers of basic measures, and how many of their products it is."""

    powers: Powers
    factor: Fraction = Fraction(1)


class Unit(NamedTuple):
    """A unit as it was written: its words in the singular, and what it may measure; nothing for a mere label."""

    words: frozenset[str]
    measures: tuple[Measure, ...] = ()


_BASIC: dict[str, tuple[tuple[str, str], ...]] = {  # measure: (names, how many), the factor as a fraction
    "metre": (
        ("m meter metre", "1"),
        ("km kilometer kilometre kms", "1000"),
        ("cm centimeter centimetre cms", "1/100"),
        ("mm millimeter millimetre", "1/1000"),
        ("mile mi", "1609.344"),
        ("yard yd", "0.9144"),
        ("foot feet ft", "0.3048"),
        ("inch", "0.0254"),
    ),
    "gram": (
        ("g gram gm gms", "1"),
        ("kg kilogram kgs kilo", "1000"),
        ("mg milligram", "1/1000"),
        ("pound lb", "453.59237"),
        ("ounce oz", "28.349523125"),
    ),
    "second": (
        ("s sec second", "1"),
        ("min minute", "60"),
        ("h hr hour", "3600"),
        ("day", "86400"),
        ("week", "604800"),
        ("ms millisecond", "1/1000"),
    ),
    "month": (("month", "1"), ("year yr", "12")),
    "gallon": (("gallon gal", "1"), ("quart", "1/4"), ("pint", "1/8"), ("cup", "1/16")),
    "dollar": (("dollar $ usd buck", "1"), ("cent ¢", "1/100")),
    "euro": (("euro € eur", "1"),),
    "sterling": (("pound £ gbp", "1"), ("pence penny", "1/100")),
    "rupee": (("rupee ₹ rs re inr", "1"), ("paise paisa", "1/100")),
    "yen": (("yen ¥ jpy", "1"),),
    "yuan": (("yuan ¥ rmb cny", "1"),),
    "won": (("won ₩ krw", "1"),),
    "rouble": (("rouble ruble ₽ rub", "1"),),
    "lira": (("lira ₺", "1"),),
    "dong": (("dong ₫ vnd", "1"),),
    "peso": (("peso ₱", "1"),),
    "naira": (("naira ₦ ngn", "1"),),
    "shekel": (("shekel ₪ ils", "1"),),
    "hryvnia": (("hryvnia ₴ uah", "1"),),
    "baht": (("baht ฿ thb", "1"),),
    "zloty": (("zloty zł pln", "1"),),
    "crown": (("crown krona krone kr", "1"),),
    "degree": (("degree ° deg", "1"),),
    "radian": (("radian rad", "1"),),
    "celsius": (("celsius", "1"),),
    "fahrenheit": (("fahrenheit", "1"),),
    "newton": (("newton n", "1"),),
    "joule": (("joule j", "1"), ("kj kilojoule", "1000")),
    "watt": (("watt w", "1"), ("kw kilowatt", "1000")),
}
_COMPOUND = {  # name: of what, to which powers
    "l liter litre": "1/1000 metre^3",
    "ml milliliter millilitre cc": "1/1000000 metre^3",
    "are": "100 metre^2",
    "hectare ha": "10000 metre^2",
    "kmph kmh kph kmhr": "5/18 metre^1 second^-1",
    "mph": "0.44704 metre^1 second^-1",
    "mps": "1 metre^1 second^-1",
}
_POWER_WORDS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_AFTER_POWER = {"squared": 2, "cubed": 3}
_PER = frozenset({"per", "/", "each", "every"})
_DEGREES = re.compile(r"(?:°|\bdegrees?)\s*(?:(c(?:elsius)?)|f(?:ahrenheit)?)\b", re.IGNORECASE)
_TOKEN = re.compile(rf"[{CURRENCIES}¢°/]|[^\W\d_]+|\^?\s*\{{?\s*(-?[123])\s*\}}?")


def _known() -> dict[str, tuple[Measure, ...]]:
    known: dict[str, tuple[Measure, ...]] = {}
    for measure, units in _BASIC.items():
        for names, factor in units:
            for name in names.split():
                known[name] = (*known.get(name, ()), Measure(frozenset({(measure, 1)}), Fraction(factor)))
    for names, text in _COMPOUND.items():
        factor, *powers = text.split()
        parsed = frozenset((base, int(power)) for base, _, power in (one.partition("^") for one in powers))
        known |= dict.fromkeys(names.split(), (Measure(parsed, Fraction(factor)),))
    return known


UNITS = _known()


def singular(word: str) -> str:
    """Return a noun's singular as far as units need it: `feet` and `inches` too, `gas` and `glass` as they are."""
    word = word.lower()
    if word in UNITS or len(word) < 4:
        return word.removesuffix("s") if word not in UNITS and word.removesuffix("s") in UNITS else word
    for ending, instead in (("ies", "y"), ("ches", "ch"), ("shes", "sh"), ("xes", "x"), ("ss", "ss"), ("s", "")):
        if word.endswith(ending):
            return word.removesuffix(ending) + instead
    return word


def parse_unit(text: str) -> Unit:
    """Read the words beside a number: `km/h`, `sq . m`, `cm^2`, `miles per hour`, `apples`; no words are no unit."""
    text = _DEGREES.sub(lambda match: "celsius" if match[1] else "fahrenheit", text[:LONGEST_UNIT])
    words: list[str] = []
    factors: list[tuple[str, int]] = []  # names and powers
    sign, power = 1, 1
    for match in _TOKEN.finditer(text):
        token = singular(match.group())
        if match[1] or token in _AFTER_POWER:
            raised = int(match[1]) if match[1] else _AFTER_POWER[token]
            if factors:
                factors[-1] = (factors[-1][0], factors[-1][1] * raised)
        elif token in _PER:
            sign = -1
        elif token in _POWER_WORDS:
            power = _POWER_WORDS[token]
        elif token not in ("unit", "a", "an", "the", "of"):
            words.append(token)
            factors.append((token, sign * power))
            power = 1
    return Unit(frozenset(words), _product(factors))


def _product(factors: Iterable[tuple[str, int]]) -> tuple[Measure, ...]:
    """Multiply known units; nothing where one is unknown. Only a unit that stands alone may mean several things."""
    factors = list(factors)
    if not all(name in UNITS for name, _ in factors):
        return ()
    if len(factors) == 1:
        name, power = factors[0]
        return tuple(_raised(measure, power) for measure in UNITS[name])
    powers: Counter[str] = Counter()
    factor = Fraction(1)
    for name, power in factors:
        raised = _raised(UNITS[name][0], power)
        factor *= raised.factor
        for base, own in raised.powers:
            powers[base] += own
    return (Measure(frozenset((base, own) for base, own in powers.items() if own), factor),) if factors else ()


def _raised(measure: Measure, power: int) -> Measure:
    return Measure(frozenset((base, own * power) for base, own in measure.powers), measure.factor**power)


def unit_ratio(wanted: Unit, got: Unit) -> Fraction | None:
    """Return how many of the wanted units one of the others is: 1 where one side has none; None where they differ."""
    if not wanted.words or not got.words:
        return Fraction(1)
    pairs = ((one, other) for one in wanted.measures for other in got.measures if one.powers == other.powers)
    for one, other in pairs:
        return other.factor / one.factor
    are_known = bool(wanted.measures and got.measures)
    agree = wanted.words <= got.words or got.words <= wanted.words
    return Fraction(1) if agree and not are_known else None

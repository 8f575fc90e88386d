r"""From an answer as it was written to its mathematics and the unit beside it.

Normalisation follows Hendrycks et al. (2021, arXiv:2103.03874) and Lewkowycz et al. (2022, arXiv:2206.14858). They drop
units and currency; here these are kept beside the mathematics, and magnitudes become factors: `$1.5 million` is
`1.5 \times 1000000` in dollars.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from coterie.grading.numbers import LETTERS, MAGNITUDES, NUMBER, PARTS, WORDS, from_words, plain, ungrouped
from coterie.grading.units import CURRENCIES, LONGEST_UNIT, UNITS, Unit, parse_unit, singular, unit_ratio

# Longer strings are compared as strings only: real answers are short, and parsers are slow on long nonsense.
LONGEST_EXPRESSION = 500

FUNCTIONS = "sin cos tan cot sec csc log ln exp max min mod gcd lcm sqrt det arcsin arccos arctan pi".split()
_FUNCTION = rf"(?:{'|'.join(FUNCTIONS)})(?![a-zA-Z])"
_PROSE = re.compile(rf"(?<![\\a-zA-Z])(?!{_FUNCTION})[a-zA-Z]{{3,}}")
_LEAD_IN = re.compile(rf"(?:^|\s)(?!{_FUNCTION})[a-zA-Z]{{2}}\s")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}")
_TEXT = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf)\s*\{([^{}]*)\}"
_MAGNITUDE = rf"(?:{'|'.join(MAGNITUDES)})s?"
_ABOUT = r"\\approx|\\sim|[~≈]|approximately|approx\b\.?|about|around|roughly|[cC]a\."


class Reading(NamedTuple):
    """An answer reduced to its mathematics, the unit beside it, and whether it is a percentage."""

    mathematics: str
    unit: Unit = Unit(frozenset())
    is_percent: bool = False


# --------------------------------------------------------------------------------------------------- one notation

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_QUOTED = re.compile(r"[\"'“‘*_`]+(.+?)[\"'”’*_`]+", re.DOTALL)
_DOLLARS = re.compile(r"\${1,2}([^$]*)\${1,2}[.,;]?")
_REWRITES = tuple(  # in this order; what stands there, and what takes its place
    (re.compile(pattern), new)
    for pattern, new in (
        (r"[−–—‐‑]", "-"),
        (r"π|(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"√\s*(\d+)|√\s*\(([^()]*)\)|(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1\2\3}"),
        (r"×|(?<=\d)\s*[x*·]\s*(?=10\s*\^)", r"\\times "),
        (r"\\cdot\s*(?=10\s*\^)", r"\\times "),
        ("≤", r"\\le "),
        ("≥", r"\\ge "),
        ("∞", r"\\infty "),
        (r"\\(?:left|right|[bB]ig[gG]?[lr]?|displaystyle)(?![a-zA-Z])", ""),
        (r",\s*\\!\s*(?=\d{3})", ","),
        (r"(?<!\\)\\[!()\[\]]|\\(?:boxed|fbox)(?![a-zA-Z])", ""),
        (r"\{,\}", ","),
        (rf"^\s*(?:{_ABOUT})\s*(?=[-+\d.\\{CURRENCIES}])", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r",?\s*\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}", ","),
        (rf"\\(?:text|mbox)\s*\{{\s*({_MAGNITUDE})\s*\}}", r" \1"),
        (r"(?<=[\w)}])\s+squared\b", "^2"),
        (r"(?<=[\w)}])\s+cubed\b", "^3"),
        (rf"(?<=[\d)}}])\s*,?\s+(?:and|or)\s+(?=[-+(\\\d{CURRENCIES}])", ", "),
        (r"\^?\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree(?![a-zA-Z])", "°"),
        (r"\\([$%])", r"\1"),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"([_^])\{(\w)\}", r"\1\2"),
        (r"[\s.,;:\\]+$", ""),
        (r"^\s*[a-zA-Z]\s*=(?=[^=]*$)", ""),
        (r"\b([ap])\.\s?m\b\.?", r"\1m"),
        *((rf"(?<=\d)[\s-]+{part}s$", f"/{count}") for part, count in PARTS.items() if part != "quarter"),
        (r"(?<![\d.])\.(?=\d)", "0."),
    )
)


def unwrapped(text: str) -> str:
    r"""Drop the delimiters of formulas, and replace `\text{...}`, `\mathbf{...}` and their like by what they hold."""
    return re.sub(_TEXT, r"\1", re.sub(r"\$|(?<!\\)\\[()\[\]]", "", text))


def _in_one_notation(text: str) -> str:
    """Spell out characters that stand for several, drop quotation marks, and write LaTeX in one way."""

    def raised(match: re.Match[str]) -> str:
        return f"^{{{match.group().translate(_SUPERSCRIPTS)}}}"

    def fraction(match: re.Match[str]) -> str:
        return f" {Fraction(unicodedata.numeric(match.group())).limit_denominator(10)}"

    text = re.sub(r"[¼-¾⅐-⅞]", fraction, re.sub(r"(?<=[\w)}])[⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺]+", raised, text))
    text = unicodedata.normalize("NFKC", text).replace("⁄", "/").strip()
    for wrapping in (_QUOTED, _DOLLARS):
        if match := wrapping.fullmatch(text):
            text = match[1].strip()
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return text.strip()


# ----------------------------------------------------------------------------------------------- magnitudes, units

_TRAILING_TEXT = re.compile(rf"(?<=\S)\s*{_TEXT}\s*(\^\s*\{{?[23]\}}?)?$")
_MAGNITUDES = re.compile(rf"(?<=\d)((?:\s*\b{_MAGNITUDE}|\s*(?<=\d){_MAGNITUDE})(?:\s+{_MAGNITUDE})*)\b")
_GLUED_LETTER = re.compile(rf"([-+]?\s*\d[\d,]*(?:\.\d+)?)({'|'.join(LETTERS)})")
_SIGN = re.compile(rf"[{CURRENCIES}]|°(?:\s*[CF](?![a-zA-Z]))?|%|\bper\s?cent(?:age\s+points?)?\b")
_CODE = re.compile(
    r"^\s*([-+]?)\s*(rs|re|inr|usd|us|eur|gbp|(?:[acrs]|au|ca|hk|nz|sg)(?=\s*\$))\s*\.?\s*(?=[$\d])", re.IGNORECASE
)
_BOUNDARY = re.compile(r"(?<=[\d})])\s*(?=[^\W\d_])|(?<=\\pi)\s+(?=[^\W\d_])|(?<=\d)\s*(?=/\s*[^\W\d_])")
_UNIT_WORD = r"[^\W\d_]+(?:\^?-?[123])?"
_UNIT_TEXT = re.compile(rf"/?{_UNIT_WORD}(?:[ /.*·-]{_UNIT_WORD})*\.?")
_NO_UNIT = frozenset(  # words that say something of the number
    "or and to but not plus minus than least most half between if squared cubed".split()
)
_LABELS = frozenset({"am", "pm", "bc", "ad"})
_PART = rf"(?:{NUMBER})\s*[a-zA-Z]+\.?"
_COMPOUND = re.compile(rf"{_PART}(?:\s*(?:,\s*|\band\s+)?{_PART}){{1,3}}")


def _with_factors(text: str) -> str:
    r"""Write magnitudes behind a number as factors: `2 dozen`, `3 hundred thousand`, `1.5M`."""
    if match := _GLUED_LETTER.fullmatch(text):
        return rf"{ungrouped(match[1])} \times {LETTERS[match[2]]}"

    def factors(match: re.Match[str]) -> str:
        return "".join(rf" \times {MAGNITUDES[word.removesuffix('s')]}" for word in match[1].split())

    return _MAGNITUDES.sub(factors, text)


def _with_digits(text: str) -> str:
    """Write a number in words that begins a text in digits: `forty-two apples`."""
    words = re.findall(r"[a-zA-Z]+-?|\S+", text)
    first = words[0].strip("-").lower() if words else ""
    if first not in WORDS and first not in ("a", "an", "half", "minus", "negative"):
        return text
    for end in range(min(len(words), 20), 0, -1):
        if digits := from_words(" ".join(word.strip("-") for word in words[:end])):
            return " ".join([digits, *words[end:]])
    return text


def _is_unit(text: str, *, is_glued: bool) -> bool:
    """Tell whether words behind a number are its unit: known ones, or nouns; no hedges, functions or variables."""
    words = [singular(word) for word in re.findall(r"[^\W\d_]+", text)]
    if not words or len(text) > LONGEST_UNIT or not _UNIT_TEXT.fullmatch(text):
        return False
    if _NO_UNIT & set(words) or any(word in WORDS or word in MAGNITUDES for word in words):
        return False
    if any(word in FUNCTIONS for word in words) and words[-1:] not in (["sec"], ["min"]):
        return False
    are_known = all(word in UNITS or word in ("per", "sq", "cu", "square", "cubic") for word in words)
    if is_glued:
        return are_known and len(text) > 1
    return are_known and (len(text) > 1 or text in "mgslh") or any(len(word) > 2 or word in _LABELS for word in words)


def _split_unit(text: str) -> tuple[str, str]:
    """Part the mathematics from the unit behind it."""
    match = _TRAILING_TEXT.search(text)
    if match and _is_unit(_tight(match[1]), is_glued=False):
        return text[: match.start()], f"{match[1]}{match[2] or ''}"
    text = re.sub(_TEXT, r"\1", text)
    for match in _BOUNDARY.finditer(text):
        unit = _tight(text[match.end() :])
        if _is_unit(unit, is_glued=not match.group() and unit[0] != "/") and not has_prose(text[: match.start()]):
            return text[: match.start()], unit
    return text, ""


def _tight(unit: str) -> str:
    """Write a unit with single spaces, and powers as `^2`."""
    unit = re.sub(r"[{}]", "", unit).strip()
    unit = re.sub(r"\s*([/^.*·-])\s*", r"\1", re.sub(r"\s+", " ", unit))
    return re.sub(r"(?<=[a-zA-Z]) (?=[23]$)", "^", unit).strip(".")


def _sum_of_parts(text: str) -> tuple[str, str] | None:
    """Add up parts in ever smaller units of one measure, `5 feet 3 inches` or `2 hours and 30 minutes`."""
    if not _COMPOUND.fullmatch(text):
        return None
    parts = [(Fraction(number), parse_unit(unit)) for number, unit in re.findall(rf"({NUMBER})\s*([a-zA-Z]+)", text)]
    first = parts[0][1]
    ratios = [unit_ratio(first, unit) if unit.measures else None for _, unit in parts]
    known = [ratio for ratio in ratios if ratio is not None]
    if len(known) < len(parts) or any(later >= former for former, later in zip(known, known[1:], strict=False)):
        return None
    total = sum((number * ratio for (number, _), ratio in zip(parts, known, strict=True)), Fraction(0))
    return plain(total), " ".join(first.words)


@lru_cache(maxsize=4096)
def read(expression: str) -> Reading:
    """Read an answer: its mathematics in one notation, without `x =` before it, and its unit.

    Anything longer than `LONGEST_EXPRESSION` characters comes back as it is.
    """
    text = expression if len(expression) > LONGEST_EXPRESSION else _in_one_notation(expression)
    if len(text) > LONGEST_EXPRESSION:
        return Reading(expression)
    text, codes = _CODE.sub(r"\1", text), _CODE.findall(text)
    signs = [code for _, code in codes if code.lower() != "us"] + _SIGN.findall(text)
    text = _SIGN.sub("", text).strip()
    is_percent = any(sign[0] in "%p" for sign in signs)
    parts = _sum_of_parts(text)
    mathematics, unit = parts or _split_unit(_with_factors(_with_digits(text)))
    behind = parse_unit(unit)
    before = " ".join(dict.fromkeys(sign for sign in signs if sign[0] not in "%p"))
    if before and not (unit and unit_ratio(parse_unit(before), behind)):  # `$5 dollars` names one unit twice
        behind = parse_unit(f"{before} {unit}")
    return Reading(ungrouped(mathematics.strip()), behind, is_percent)


def tidy(expression: str) -> str:
    """Reduce an answer to its mathematics: no currency, percent signs, units, sizes, spacing, or `x =` before."""
    return read(expression).mathematics


def has_prose(expression: str) -> bool:
    """Tell whether a word of three letters or more stands there that is no LaTeX command, environment or function.

    Read as a product of variables such a word would equal its anagrams, so nothing that holds one is compared by value.
    """
    return bool(_PROSE.search(_ENVIRONMENT.sub("", expression)))


def is_expression(text: str) -> bool:
    """Tell whether a line is mathematics and nothing else: no prose, and no `so` or `in` set off by spaces."""
    expression = tidy(text)
    return not has_prose(expression) and not _LEAD_IN.search(expression)

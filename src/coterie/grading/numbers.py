r"""Numbers as people write them, read as exact fractions: `1,234`, `3e5`, `3 \times 10^5`, `1 1/2`, `forty-two`.

A full stop is a decimal point and a comma parts thousands: `1.234` is no 1234, and `3,5` is two numbers. Where both
stand in one number the last one is the decimal point (`1.234,56`).
"""

import re
from fractions import Fraction

MAGNITUDES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "lakh": 10**5,
    "million": 10**6,
    "crore": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "mn": 10**6, "B": 10**9, "bn": 10**9}  # glued to a number
_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
WORDS = {word: value for value, word in enumerate(_SMALL)} | {word: 20 + 10 * n for n, word in enumerate(_TENS)}
PARTS = {"third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "eighth": 8, "tenth": 10, "hundredth": 100}

NUMBER = r"\d{1,60}(?:\.\d{1,60})?"
DECIMAL = re.compile(rf"[+-]?\s*{NUMBER}")
_FRACTION = re.compile(  # sign, whole part, numerator, denominator: 1/2, 1 1/2, \frac{1}{2}, 1\frac{1}{2}
    rf"([+-]?)\s*(?:(\d{{1,60}})(?:\s+|\s*(?=\\)))?(?:\\frac\{{)?([+-]?{NUMBER})(?:\}}\{{|\s*/\s*)({NUMBER})\}}?"
)
_POWER = r"(?:10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|([+-]?\d{1,3})))"
_SCIENTIFIC = re.compile(  # sign, number, and a power of ten in one of several forms
    rf"([+-]?)\s*(?:({NUMBER})(?:[eE]([+-]?\d{{1,3}})|\s*\\times\s*{_POWER})|{_POWER})"
)
_TIMES = re.compile(rf"(.+?)\s*\\times\s*({NUMBER})")
_GROUPED = re.compile(r"[+-]?\s*\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?")
_CONTINENTAL = re.compile(r"([+-]?\s*\d{1,3}(?:\.\d{3})+),(\d+)")


def ungrouped(number: str) -> str:
    """Drop what parts thousands, where it can be nothing else; anything that is no such number comes back as it is."""
    if match := _CONTINENTAL.fullmatch(number):
        return f"{match[1].replace('.', '')}.{match[2]}"
    return re.sub(r"(?<=\d)[, ]", "", number) if _GROUPED.fullmatch(number) else number


def rational(number: str) -> Fraction | None:
    r"""Return the value of a plain decimal, fraction, mixed number, power of ten or product; None for anything else."""
    if DECIMAL.fullmatch(number):
        return Fraction(re.sub(r"\s", "", number))
    if match := _SCIENTIFIC.fullmatch(number):
        sign, factor, *powers = match.groups()
        value = Fraction(factor or 1) * Fraction(10) ** int(next(power for power in powers if power))
        return -value if sign == "-" else value
    if match := _TIMES.fullmatch(number):
        rest = rational(match[1])
        return None if rest is None else rest * Fraction(match[2])
    match = _FRACTION.fullmatch(number)
    if not match or not Fraction(match[4]):
        return None
    value = Fraction(match[2] or 0) + Fraction(match[3]) / Fraction(match[4])
    return -value if match[1] == "-" else value


def is_decimal(number: str) -> bool:
    """Tell whether a number is written with decimals, powers of ten or magnitudes, and no fraction stroke."""
    return "/" not in number and "\\frac" not in number


def plain(value: Fraction) -> str:
    """Write a value as a decimal where it has a finite one, else as a fraction."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest > 1 or value.denominator == 1:
        return str(value)
    digits = max(value.denominator.bit_length(), 1)
    whole = value.numerator * 10**digits // value.denominator
    sign, text = "-" if whole < 0 else "", str(abs(whole)).rjust(digits + 1, "0")
    return f"{sign}{text[:-digits]}.{text[-digits:].rstrip('0')}"


def from_words(text: str) -> str | None:
    """Return the digits of a number in words: `forty-two`, `two thirds`, `half a dozen`; None for anything else."""
    words = re.findall(r"[a-z]+", text.lower())
    if not words or not re.fullmatch(r"\s*[a-zA-Z]+(?:[\s-]+[a-zA-Z]+)*\s*", text) or len(words) > 20:
        return None
    parts = _parts_from_words(words)
    if parts is not None:
        return plain(parts)
    sign = "-" if words[0] in ("minus", "negative") else ""
    words = words[bool(sign) :]
    total = part = 0
    last = ""  # what stood before: a unit of ones closes a part, tens leave room for ones
    for place, word in enumerate(words):
        if word in WORDS:
            value = WORDS[word]
            fits = not last or last == "magnitude" or (last == "tens" and 0 < value < 10)
            if not fits:
                return None
            part, last = part + value, "tens" if value >= 20 else "ones"
        elif word.removesuffix("s") in MAGNITUDES and last and (part or last != "magnitude"):
            magnitude = MAGNITUDES[word.removesuffix("s")]
            total, part = (total, part * 100) if magnitude == 100 else (total + part * magnitude, 0)
            last = "magnitude"
        elif word in ("a", "an") and not last and place + 1 < len(words):
            part, last = 1, "ones"
        elif word != "and" or last != "magnitude" or place + 1 == len(words):
            return None
    return f"{sign}{total + part}" if last else None


def _parts_from_words(words: list[str]) -> Fraction | None:
    """Read `half a dozen`, `one and a half` and `two thirds`; a `twenty third` is no number of parts."""
    *before, last = words
    if words[0] == "half" and (not before or words[2:]):
        whole = from_words(" ".join(words[1:])) if before else "1"
        return Fraction(whole) / 2 if whole else None
    count = "1" if before in (["a"], ["an"], ["one"]) else None
    if last == "half" and (count or (before[-2:-1] == ["and"] and before[-1] in ("a", "one"))):
        whole = "0" if count else from_words(" ".join(before[:-2]))
        return Fraction(whole) + Fraction(1, 2) if whole else None
    if count is None and last.endswith("s") and last.removesuffix("s") in PARTS:
        count, last = from_words(" ".join(before)), last.removesuffix("s")
    return Fraction(count) / PARTS[last] if count and last in PARTS else None

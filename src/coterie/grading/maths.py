r"""Whether two mathematical answers are the same: as strings, as fractions, and only then as expressions.

The string normaliser works in the manner of Hendrycks et al. (2021, arXiv:2103.03874) and Lewkowycz et al. (2022,
arXiv:2206.14858). What strings and fractions leave open goes to the library math-verify, in a worker process that is
killed when an item takes too long: a computer algebra system cannot be trusted with the text of a stranger.
"""

import atexit
import contextlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from fractions import Fraction

from coterie.errors import CoterieError

logger = logging.getLogger(__name__)

# Longer strings are compared as strings only: real answers are short, and parsers are slow on long nonsense.
LONGEST_EXPRESSION = 500
SECONDS_PER_ITEM = 5.0
SECONDS_TO_START = 120.0
WORKER_MEMORY = 4 * 2**30  # bytes of address space

# ------------------------------------------------------------------------------------------------------ as strings

_FUNCTIONS = r"(?:sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|mod|gcd|lcm|sqrt|det|arcsin|arccos|arctan|pi)(?![a-zA-Z])"
_PROSE = re.compile(rf"(?<![\\a-zA-Z])(?!{_FUNCTIONS})[a-zA-Z]{{3,}}")
_LEAD_IN = re.compile(rf"(?:^|\s)(?!{_FUNCTIONS})[a-zA-Z]{{2}}\s")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{[a-z*]+\}")
_WRAPPER = r"\\(?:text(?:bf|it|rm|normal)?|mbox|mathrm|mathbf)\s*\{([^{}]*)\}"
_UNIT_TEXT = r"(?:\\(?:text|textnormal|textrm|mbox)\s*\{[^{}]*\}|\\mathrm\s*\{[^{}]*[a-zA-Z]{2}[^{}]*\})"
_REWRITES = tuple(  # in this order; what stands there, and what takes its place
    (re.compile(pattern), new)
    for pattern, new in (
        (r"[−–]", "-"),
        (r"π", r"\\pi "),
        (r"√\s*(\d+)", r"\\sqrt{\1}"),
        (r"\\(?:left|right|[bB]ig[gG]?[lr]?|displaystyle)(?![a-zA-Z])", ""),
        (r"(?<!\\)\\[!()\[\]]", ""),
        (r"\{,\}", ","),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\(?:text|mbox)\s*\{\s*,?\s*(?:and|or)\s*\}", ","),
        (rf"(?<=\S)\s*{_UNIT_TEXT}\s*(?:\^\s*\{{?[23]\}}?)?[\s.]*$", ""),
        (_WRAPPER, r"\1"),
        (r"\\?[$€£]", ""),
        (r"\\?%|\bper\s?cent\b", ""),
        (r"\^?\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degree|°", ""),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
        (r"([_^])\{(\w)\}", r"\1\2"),
        (r"^\s*(?:\\approx|[Rr]?s\s*\.?)\s*(?=\d)", ""),
        (r"[\s.,;:\\]+$", ""),
        (r"^\s*[a-zA-Z]\s*=(?=[^=]*$)", ""),
        (r"(?<![\d.])\.(?=\d)", "0."),
    )
)
_NO_UNIT = r"(?:or|and|to|but|not|plus|minus|squared|cubed|dozen|hundred|[a-z]+llion|thousand)\b"
_UNIT = re.compile(  # words after a number, perhaps squared: `13 seconds`, `8 sq . m`, `5cm^2`
    rf"(?<=[\d}})])(?:\s+(?!{_FUNCTIONS}|.*\b{_NO_UNIT})(?:[a-zA-Z]{{2,}}[a-zA-Z ./]*|[mgslh])"
    r"|(?:[cmk]m|[mk]g|ml|kmph|mph|hrs?|mins?|secs?|ft|lbs?))\s*(?:\^?\s*\{?[23]\}?)?$"
)
_THOUSANDS = re.compile(r"[+-]?\s*\d{1,3}(,\d{3})+(\.\d+)?")


def _has_prose(expression: str) -> bool:
    """Tell whether a word of three letters or more stands there that is no LaTeX command, environment or function.

    Read as a product of variables such a word would equal its anagrams, so nothing that holds one is compared by value.
    """
    return bool(_PROSE.search(_ENVIRONMENT.sub("", expression)))


def unwrapped(text: str) -> str:
    r"""Drop the delimiters of formulas, and replace `\text{...}`, `\mathbf{...}` and their like by what they hold."""
    return re.sub(_WRAPPER, r"\1", re.sub(r"\$|(?<!\\)\\[()\[\]]", "", text))


def tidy(expression: str) -> str:
    """Reduce an answer to its mathematics: no dollar, percent or degree signs, units, sizes, spacing, or `x =` before.

    Anything longer than `LONGEST_EXPRESSION` characters comes back as it is.
    """
    if len(expression) > LONGEST_EXPRESSION:
        return expression
    for pattern, new in _REWRITES:
        expression = pattern.sub(new, expression)
    unit = _UNIT.search(expression)
    if unit and not _has_prose(expression[: unit.start()]):
        expression = expression[: unit.start()]
    expression = expression.strip()
    return expression.replace(",", "") if _THOUSANDS.fullmatch(expression) else expression


def is_expression(text: str) -> bool:
    """Tell whether a line is mathematics and nothing else: no prose, and no `so` or `in` set off by spaces."""
    expression = tidy(text)
    return not _has_prose(expression) and not _LEAD_IN.search(expression)


# ---------------------------------------------------------------------------------------------------- as fractions

_NUMBER = r"\d{1,60}(?:\.\d{1,60})?"
_DECIMAL = re.compile(rf"[+-]?\s*{_NUMBER}")
_FRACTION = re.compile(  # sign, whole part, numerator, denominator: 1/2, 1 1/2, \frac{1}{2}, 1\frac{1}{2}
    rf"([+-]?)\s*(?:(\d{{1,60}})(?:\s+|\s*(?=\\)))?(?:\\frac\{{)?([+-]?{_NUMBER})(?:\}}\{{|\s*/\s*)({_NUMBER})\}}?"
)
_BASED = re.compile(r"\d\s*_")  # a number with its base, 1011_2


def _rational(expression: str) -> Fraction | None:
    """Return the value of a tidy decimal, fraction or mixed number, None for anything else."""
    if _DECIMAL.fullmatch(expression):
        return Fraction(re.sub(r"\s", "", expression))
    match = _FRACTION.fullmatch(expression)
    if not match or not Fraction(match[4]):
        return None
    value = Fraction(match[2] or 0) + Fraction(match[3]) / Fraction(match[4])
    return -value if match[1] == "-" else value


def _same_number(answer: str, candidate: str, percent_signs: int) -> bool | None:
    """Compare tidy expressions as exact fractions; None where that cannot decide.

    It cannot where one is no plain number, or one a fraction and the other its rounded decimals. `percent_signs` is the
    candidate's number of percent signs less the answer's; 50 and 0.5 are both 50%, as reference answers have it.
    """
    left, right = _rational(answer), _rational(candidate)
    if left is None or right is None:
        return None
    if left == right or left * Fraction(100) ** percent_signs == right:
        return True
    one_is_decimal = bool(_DECIMAL.fullmatch(answer)) != bool(_DECIMAL.fullmatch(candidate))
    return None if one_is_decimal else False


def same_expression(answer: str, candidate: str) -> bool:
    """Tell whether a candidate equals the reference answer; not symmetric, as math-verify's comparison is not.

    Raises:
        CoterieError: The worker process does not start.
    """
    plain_answer = tidy(answer)
    is_chain = "=" not in plain_answer and "," not in candidate  # no equation is wanted, and this is no list of them
    plain_candidate = tidy(re.split(r"(?<![<>!:])=", candidate)[-1] if is_chain else candidate)  # of `5 * 3 = 15`, 15
    if not plain_candidate:
        return False
    # Numbers before strings: without its space, 1 1/2 would be 11/2.
    decided = _same_number(plain_answer, plain_candidate, ("%" in candidate) - ("%" in answer))
    if decided is not None:
        return decided
    if re.sub(r"\s", "", plain_answer) == re.sub(r"\s", "", plain_candidate):
        return True
    too_long = max(len(plain_answer), len(plain_candidate)) > LONGEST_EXPRESSION
    # The parser ignores bases: a candidate that gives one is equal as a string or not at all.
    if too_long or _BASED.search(plain_candidate) or _has_prose(plain_answer) or _has_prose(plain_candidate):
        return False
    return _comparer.same(plain_answer, plain_candidate)


# -------------------------------------------------------------------------------------------------- as expressions


@dataclass(eq=False)
class ValueComparer:
    """Compares expressions by value in one worker process, started at the first comparison.

    An item that overruns `seconds` gets the worker killed and counts as unequal; the next item starts a new worker.
    The timer is ours because math-verify's own uses SIGALRM, which fails outside the main thread.
    """

    seconds: float = SECONDS_PER_ITEM
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _worker: "subprocess.Popen[str] | None" = None

    def same(self, answer: str, candidate: str) -> bool:
        """Tell whether the candidate has the value of the answer; False if the worker overruns or dies.

        Raises:
            CoterieError: The worker process does not start.
        """
        with self._lock:
            worker = self._worker if self._worker and self._worker.poll() is None else self._start()
            return _exchange(worker, json.dumps([answer, candidate]), self.seconds) == "same"

    def close(self) -> None:
        """End the worker, if there is one; a later comparison starts another."""
        worker, self._worker = self._worker, None
        if worker:
            atexit.unregister(self.close)
            worker.kill()
            worker.communicate()

    def _start(self) -> subprocess.Popen[str]:
        """Start a worker by a plain command: multiprocessing's spawn would run the caller's main script again."""
        self.close()
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from coterie.grading.maths import serve; serve({self.seconds})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        atexit.register(self.close)
        if _exchange(self._worker, '["x", "x"]', SECONDS_TO_START) != "same":  # loads and warms the parser
            raise CoterieError(
                "the process that compares expressions does not start; try: python -c 'import math_verify'"
            )
        return self._worker


def _exchange(worker: "subprocess.Popen[str]", line: str, seconds: float) -> str:
    """Send one line and return the reply; "" if the worker is dead, or was killed for taking too long."""
    reply, overran = "", threading.Event()

    def stop() -> None:
        overran.set()
        worker.kill()

    timer = threading.Timer(seconds, stop)
    timer.start()
    try:
        assert worker.stdin and worker.stdout, "the worker is started with pipes"
        worker.stdin.write(line + "\n")
        worker.stdin.flush()
        reply = worker.stdout.readline().strip()
    except OSError:
        logger.debug("the worker died before it was asked")
    finally:
        timer.cancel()
        timer.join()
        if overran.is_set() or not reply:  # dead or dying: waited for, so that the next item sees it
            worker.kill()
            worker.wait()
    return reply


_comparer = ValueComparer()


def serve(seconds: float) -> None:
    """Answer comparisons from standard input until it closes: the whole life of a worker process."""
    logging.disable()
    replies, sys.stdout = sys.stdout, sys.stderr  # the parser may print; only replies belong on the pipe
    if sys.platform != "win32":
        import resource

        with contextlib.suppress(ValueError, OSError):  # a power tower is to end in a MemoryError here
            resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY, WORKER_MEMORY))
    for line in sys.stdin:
        same = _verified(*json.loads(line), give_up_after=math.ceil(seconds) + 20)
        replies.write("same\n" if same else "different\n")
        replies.flush()


def _verified(answer: str, candidate: str, give_up_after: int) -> bool:
    """Compare by math-verify, without its own timers; a worker whose parent is gone ends after so many seconds."""
    from math_verify import parse, verify

    if sys.platform != "win32":
        signal.alarm(give_up_after)
    try:
        gold, target = (parse(f"${side}$", parsing_timeout=0) for side in (answer, candidate))
        return verify(gold, target, timeout_seconds=0)
    except Exception:  # whatever a parser or computer algebra system raises about hostile text
        return False
    finally:
        if sys.platform != "win32":
            signal.alarm(0)

"""Whether two mathematical answers are the same: by unit, as fractions, as strings, and only then as expressions.

What strings and fractions leave open goes to the library math-verify, in a worker process that is
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
from coterie.grading.notation import LONGEST_EXPRESSION, Reading, has_prose, read
from coterie.grading.numbers import is_decimal, rational
from coterie.grading.units import unit_ratio

logger = logging.getLogger(__name__)

SECONDS_PER_ITEM = 5.0
SECONDS_TO_START = 120.0
WORKER_MEMORY = 4 * 2**30  # bytes of address space

_BASED = re.compile(r"\d\s*_")  # a number with its base, 1011_2
_RATIO = re.compile(r"(\d{1,20})\s*:\s*(\d{1,20})")
_LIST = re.compile(r"[^()\[\]<>]*,[^()\[\]<>]*")
_POINT = re.compile(r"[(\[][^()\[\]<>]*,[^()\[\]<>]*[)\]]")  # or an interval
_CLOCK = re.compile(r"\d{1,2}\s*:\s*[0-5]\d")


def same_expression(answer: str, candidate: str) -> bool:
    """Tell whether a candidate equals the reference answer; not symmetric, as math-verify's comparison is not.

    Raises:
        CoterieError: The worker process does not start.
    """
    wanted = read(answer)
    is_chain = "=" not in wanted.mathematics and "," not in candidate  # no equation is wanted, nor a list of them
    got = read(re.split(r"(?<![<>!:])=", candidate)[-1] if is_chain else candidate)  # of `5 * 3 = 15`, 15
    ratio = unit_ratio(wanted.unit, got.unit)
    counted = wanted.unit if got.is_percent else got.unit
    if not got.mathematics or ratio is None or (got.is_percent != wanted.is_percent and counted.words):
        return False  # 40% is 0.4 or 40, but no 0.4 miles
    # Numbers before strings: without its space, 1 1/2 would be 11/2.
    decided = _same_number(wanted, got, ratio)
    if decided is not None or ratio != 1:
        return bool(decided)
    if _unspaced(wanted.mathematics) == _unspaced(got.mathematics):
        return True
    too_long = max(len(wanted.mathematics), len(got.mathematics)) > LONGEST_EXPRESSION
    if _are_other_lists(wanted.mathematics, got.mathematics) or _are_other_lists(got.mathematics, wanted.mathematics):
        return False
    # The parser ignores bases: a candidate that gives one is equal as a string or not at all.
    if too_long or _BASED.search(got.mathematics) or has_prose(wanted.mathematics) or has_prose(got.mathematics):
        return False
    return _comparer.same(wanted.mathematics, got.mathematics)


def _same_number(wanted: Reading, got: Reading, ratio: Fraction) -> bool | None:
    """Compare as exact fractions, where `ratio` of the wanted units are one of the candidate's.

    None: that cannot decide, as one is no plain number, or one a fraction and the other its rounded decimals. 50 and
    0.5 are both 50%, as reference answers have it.
    """
    clock = _CLOCK.fullmatch(wanted.mathematics) or _CLOCK.fullmatch(got.mathematics)
    if (one := _RATIO.fullmatch(wanted.mathematics)) and (other := _RATIO.fullmatch(got.mathematics)):
        (a, b), (c, d) = map(int, one.groups()), map(int, other.groups())
        return (a, b) == (c, d) or (not clock and a * d == b * c)  # 2 : 3 is 4 : 6, but 2:30 is not 4:60
    left, right = rational(wanted.mathematics), rational(got.mathematics)
    if left is None or right is None:
        return None
    right *= ratio
    if left == right or left * Fraction(100) ** (got.is_percent - wanted.is_percent) == right:
        return True
    both = is_decimal(wanted.mathematics) == is_decimal(got.mathematics)
    return False if both else None


def _are_other_lists(listed: str, other: str) -> bool:
    """Tell a list from one of another length, and from a point or interval, which the parser takes for sets alike."""
    is_list = bool(_LIST.fullmatch(listed)) and "," in other
    return is_list and (listed.count(",") != other.count(",") or bool(_POINT.fullmatch(other)))


def _unspaced(mathematics: str) -> str:
    """Drop spaces, but for those between two numbers."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", mathematics)


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
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    whole = LatexExtractionConfig(  # units were read before; what the parser does not know is no answer
        normalization_config=NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    )
    if sys.platform != "win32":
        signal.alarm(give_up_after)
    try:
        gold, target = (parse(f"${side}$", [whole], "no_fallback", parsing_timeout=0) for side in (answer, candidate))
        return verify(gold, target, timeout_seconds=0)
    except Exception:  # whatever a parser or computer algebra system raises about hostile text
        return False
    finally:
        if sys.platform != "win32":
            signal.alarm(0)

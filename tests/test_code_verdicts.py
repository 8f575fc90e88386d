"""Verdicts on code that no answer can forge: what crosses between an answer and its tests, and each known attack."""

import io
import json
import math
import re
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coterie.grading.sandbox import Limits, Outcome, run_limited
from coterie.grading.wire import LONGEST_MESSAGE, Handle, Wire, WireError, restore
from helpers import table

PASSED = Outcome("passed", "")


def graded(program, tests, entry_point="f"):
    return run_limited(program, tests, entry_point, Limits(cpu_seconds=2))


# --------------------------------------------------------------------------------------------------- what tests can say


def cases(text):
    """Name, program and tests of each case."""
    parts = [re.split(r"\n|---\n", part, maxsplit=1) for part in text.strip().split("=== ")[1:]]
    return table(*((name, *both.split("---\n")) for name, both in parts))


RIGHT = r"""
=== value
def f(x): return x + 1
---
assert f(1) == 2
=== named argument
def f(*, x=1): return x
---
assert f(x=3) == 3
=== kinds
def f(x): return x, {1, (2,)}, {'a': b'b'}, 2j
---
assert f(None) == (None, {1, (2,)}, {'a': b'b'}, 2j)
=== large number
def f(n): return 3**n
---
assert f(20_000) == 3**20_000
=== not a number
def f(): return float('nan')
---
import math
assert math.isnan(f())
=== counted
from collections import Counter
def f(x): return Counter(x)
---
assert f('aab') == {'a': 2, 'b': 1}
=== in place
def f(x): x.sort()
---
x = [3, 1, 2]
assert f(x) is None
assert x == [1, 2, 3]
=== in place, deep
def f(x): x[0].append(9)
---
x = [[1], [2]]
y = x[0]
f(x)
assert x == [[1, 9], [2]] and y == [1, 9]
=== generator
def f(n): yield from range(n)
---
assert list(f(3)) == [0, 1, 2]
=== endless generator
def f():
    while True: yield 1
---
from itertools import islice
assert list(islice(f(), 2)) == [1, 1]
=== member of what it yields
def f(n): yield from range(n)
---
assert 2 in f(3) and 3 not in f(3)
=== function of the tests
def f(g, x): return [g(i) for i in x]
---
assert f(lambda i: 2 * i, (1, 2)) == [2, 4]
=== generator of the tests
def f(x): return sum(x)
---
assert f(i for i in range(4)) == 6
=== type
def f(x, kind): return isinstance(x, kind)
---
assert f(1, int) and not f(1, str)
=== function that comes back
def f(n): return lambda x: x + n
---
assert f(1)(2) == 3
=== error that is expected
def f(x): raise ValueError('no')
---
try:
    f(1)
except ValueError as e:
    assert str(e) == 'no'
else:
    assert False
=== object
class f:
    def __init__(self): self.n = 0
    def add(self, k): self.n += k
---
a = f()
a.add(2)
a.n += 1
assert a.n == 3
=== tree
class T:
    def __init__(self, v): self.v, self.l = v, None
def f(t): return 1 + f(t.l) if t else 0
---
t = T(1)
t.l = T(2)
assert f(t) == 2
=== object of the tests
def f(p):
    p.x += 1
    return p.y
---
class P: x, y = 1, 2
p = P()
assert f(p) == 2 and p.x == 2
=== name of Python's own
def sum(x): return 5
---
assert sum([1]) == 5
=== name of a module
def queue(x): return 5
---
assert queue([1]) == 5
=== second function
def f(x): return g(x)
def g(x): return x
---
assert f(1) == g(1)
=== standard library without import
def f(x): return x / 3
---
assert math.isclose(f(1), 1 / 3)
"""


@pytest.mark.parametrize(("program", "tests"), cases(RIGHT))
def test_a_right_answer_passes_whatever_its_tests_use(program, tests):
    entry_point = next(name for name in ("sum", "queue", "f") if f" {name}" in program)
    assert graded(program, tests, entry_point) == PASSED


# ------------------------------------------------------------------------------------------------------------- attacks

WRONG = r"""
=== equal to everything
class Yes:
    def __eq__(self, other): return True
    __ne__ = __bool__ = __contains__ = __eq__
def f(x): return Yes()
---
assert f(1) == 2
=== equal to everything, in a list
class Yes:
    def __eq__(self, other): return True
    __ne__ = __bool__ = __contains__ = __eq__
def f(x): return [Yes()]
---
assert f(1) == [2]
=== number equal to everything
class Yes(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Yes()
---
assert f(1) == 2
=== list that holds everything
class Yes(list):
    def __contains__(self, item): return True
def f(x): return Yes()
---
assert 2 in f(1)
=== comparing made its own
def f(x): return 0
def set(x): return 1
def sorted(x): return 1
---
assert set(f(1)) == {2}
=== module made its own
def f(x): return 0
class math:
    isclose = staticmethod(lambda *x: True)
---
assert math.isclose(f(1), 2)
=== builtins changed
class Yes:
    def __eq__(self, other): return True
    __ne__ = __bool__ = __contains__ = __eq__
import builtins
builtins.AssertionError = Yes
builtins.abs = lambda x: 0
def f(x): return 9
---
assert abs(f(1) - 2) < 1
=== tests in a caller's frame
import sys
def f(x):
    frame = sys._getframe()
    while frame.f_back: frame = frame.f_back
    return 2 if '== 2' in repr(frame.f_globals) + repr(frame.f_locals) else 0
---
assert f(1) == 2
=== tests among all objects
import gc
def f(x):
    name = "wanted" + str(x + 6)
    return 2 if any(name in repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))) else 0
---
wanted7 = 2
assert f(1) == wanted7
=== tests through a function of theirs
def f(g): return object.__getattribute__(g, '_wire').ask('get', g, '__globals__')['right']
---
right = 2
assert f(lambda: 0) == right
=== tests through a generator of theirs
def f(g): return g.gi_frame.f_globals['right']
---
right = 2
assert f(i for i in ()) == right
=== tests through a method of theirs
def f(p): return object.__getattribute__(p, '_wire').ask('get', p.m, '__func__').__globals__['right']
---
right = 2
class P:
    def m(self): pass
assert f(P()) == right
=== tests on the disk
import glob
def f(x):
    for name in glob.glob('/tmp/**', recursive=True) + glob.glob('/proc/*/*'):
        if 'right' in open(name).read(): return 2
---
right = 2
assert f(1) == right
=== ends where it must raise
import os
def f(x): os._exit(0)
---
try:
    f(1)
except Exception:
    pass
else:
    assert False
=== ends in another way
def f(x): raise SystemExit(0)
---
assert f(1) == 2
=== ends after the first test
import os
def f(x):
    if x: os._exit(0)
    return 0
---
assert f(0) == 0
try:
    f(1)
except BaseException:
    pass
"""


@pytest.mark.parametrize(("program", "tests"), cases(WRONG))
def test_a_wrong_answer_fails_whatever_it_tries(program, tests):
    assert graded(program, tests).status == "failed"


def test_an_answer_that_writes_into_the_conversation_says_only_what_it_returns():
    write = (
        "import os\nmessage = {!r}\ndef f(x):\n    for wire in range(3, 20):\n"
        "        try: os.write(wire, message)\n        except OSError: pass\n    return 0"
    )
    ahead = json.dumps({"value": 0}).encode() + b"\n"
    assert graded(write.format(ahead), "assert f(1) == 2").status == "failed"
    assert graded(write.format(b"passed\n"), "assert f(1) == 2").status == "failed"
    assert graded(write.format(b'["passed", ""]\n'), "assert f(1) == 2").status == "failed"


def test_an_answer_makes_no_object_among_the_tests():
    """A class whose `__eq__` is `type` is equal to everything, so none is made on the tests' side by calling `type`."""
    program = """
import gc, json
from coterie.grading.wire import Wire
wire = next(one for one in gc.get_objects() if isinstance(one, Wire))
def said(message):
    wire._writer.write(json.dumps(message).encode() + b"\\n"); wire._writer.flush()
    return json.loads(wire._reader.readline())
def made(target, *arguments):
    reply = said({"ask": "call", "of": [target, {"tuple": list(arguments)}, {"dict": []}]})
    return {"yours": reply["value"]["mine"]}
def f(x):
    kind = made({"type": "type"}, "Yes", {"tuple": []}, {"dict": [["__eq__", {"type": "type"}]]})
    said({"value": made(kind)})
"""
    assert graded(program, "assert f(1) == 2").status == "failed"


@pytest.mark.parametrize(
    "program",
    table(
        ("deep", "def f(x):\n    for _ in range(100_000): x = [x]\n    return x"),
        ("round", "def f(x):\n    x = []\n    x.append(x)\n    return x"),
        ("large", f"def f(x): return 'x' * {LONGEST_MESSAGE + 1}"),
        ("error without end", "def f(x): raise ValueError('x' * 10**7)"),
    ),
)
def test_a_value_that_cannot_cross_is_wrong(program):
    outcome = graded(program, "assert f(1) == 2")
    assert outcome.status in ("failed", "out-of-memory")
    assert len(outcome.detail) <= 500


# ------------------------------------------------------------------------------------------------------------- the wire


def closed(operation, target, *values):
    return False


def crossed(value):
    """What a value is on the other side."""
    line = json.dumps(Wire(io.BytesIO(), io.BytesIO(), closed).write(value))
    return Wire(io.BytesIO(), io.BytesIO(), closed).read(json.loads(line))


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.fractions(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.frozensets(st.integers() | st.text(), max_size=3)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(plain)
@settings(deadline=None, max_examples=150)
def test_plain_data_crosses_as_it_is(value):
    back = crossed(value)
    assert back == value
    assert type(back) is type(value)


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "kind"),
    table(
        ("counter", Counter("aab"), dict),
        ("ordered", OrderedDict(a=1), dict),
        ("with default", defaultdict(list, a=[1]), dict),
        ("named", Point(1, 2), tuple),
        ("deque", deque([1]), deque),
        ("range", range(3), range),
        ("decimal", Decimal("0.10"), Decimal),
        ("fraction", Fraction(1, 3), Fraction),
        ("bytearray", bytearray(b"a"), bytearray),
        ("infinite", math.inf, float),
        ("one half of a letter", "\ud800", str),
    ),
)
def test_an_instance_of_a_subclass_crosses_as_the_built_in_that_it_is(value, kind):
    assert crossed(value) == value
    assert type(crossed(value)) is kind


def test_an_object_is_equal_to_itself_alone():
    wire = Wire(io.BytesIO(), io.BytesIO(), closed)
    first, again, other = (wire.read({"mine": number}) for number in (3, 3, 4))
    assert type(first) is Handle
    assert first is again
    assert first == again != other
    assert first != 3


@pytest.mark.parametrize(
    "line",
    table(
        ("no JSON", b"x\n"),
        ("no object", b"[]\n"),
        ("broken off", b"{"),
        ("deep", b"[" * 10_000 + b"\n"),
        ("long number", b"9" * 5000 + b"\n"),
        ("long", b"x" * (LONGEST_MESSAGE + 5)),
    ),
)
def test_what_is_no_message_breaks_the_wire_for_good(line):
    wire = Wire(io.BytesIO(line + b'{"value": 1}\n'), io.BytesIO(), closed)
    for _ in range(2):
        with pytest.raises(WireError):
            wire.result()
    assert wire.broken


@pytest.mark.parametrize(
    "form",
    [
        [1],
        {},
        {"list": 3},
        {"dict": [[{"list": []}, 1]]},
        {"mine": -1},
        {"mine": "1"},
        {"yours": 0},
        {"eval": "1"},
        {"type": "no such"},
        {"int": "x"},
        {"range": [1, 2, 3, 4]},
        {"Fraction": [1, 0]},
        {"Decimal": "x"},
        {"bytes": "x"},
    ],
    ids=repr,
)
def test_a_form_that_stands_for_nothing_is_refused(form):
    wire = Wire(io.BytesIO(json.dumps({"value": form}).encode() + b"\n"), io.BytesIO(), closed)
    with pytest.raises(WireError):
        wire.result()


@given(plain, plain)
@settings(deadline=None, max_examples=100)
def test_restoring_gives_the_new_content_to_the_old_object(old, new):
    kept = [old]
    if restore(old, new):
        assert kept[0] == new
    else:
        assert not (isinstance(old, list) and isinstance(new, list))

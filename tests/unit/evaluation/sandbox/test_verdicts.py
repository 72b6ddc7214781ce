"""Claim: a right program passes, a wrong one does not, and the verdict says why."""

# ruff: noqa: E501 - programs in one line

import contextlib
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

from mull.evaluation.isolation import session
from mull.evaluation.sandbox import (
    Asserts,
    Calls,
    Limits,
    Pool,
    SandboxError,
    Stdio,
    Verdict,
    check_sandbox,
    expected_values,
    run_program,
)

ADD = "def add(a, b):\n    return a + b\n"
ADDS = Asserts("assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'\nassert add([1], [2]) == [1, 2]", ("add",))


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, timeout=10) as pool:
        yield pool


def judge(pool: Pool, program: str, tests: Asserts | Calls | Stdio = ADDS, timeout: float = 10) -> Verdict:
    return pool.submit(program, tests, timeout=timeout).result()


def test_one_call_is_enough() -> None:
    verdict = run_program(ADD, ADDS)
    assert (verdict.passed, verdict.reason, verdict.n_passed, verdict.n_tests, verdict.proof) == (
        True,
        "passed",
        3,
        3,
        "outside",
    )


@pytest.mark.parametrize(
    ("program", "reason", "detail"),
    [
        ("def add(a, b):\n    return a", "wrong answer", ""),
        ("def add(a, b):\n    raise KeyError('x')", "error", "KeyError: 'x'"),
        ("def add(a, b) return", "error", "SyntaxError"),
        ("def sum(a, b):\n    return a + b", "error", "defines no add"),
        ("add = 3", "error", "not callable"),
        ("def add(a, b):\n    return bytearray(1 << 40)", "memory", "MemoryError"),
        ("table = bytearray(1 << 40)\ndef add(a, b): return a + b", "memory", "MemoryError"),
        ("def add(a, b):\n    while True: pass", "time-out", "killed"),
        ("import time\ntime.sleep(60)", "time-out", "killed"),
        ("x = '\0'", "error", "null bytes"),
        ("def add(a, b):\n    return '\\udc80'", "wrong answer", ""),
    ],
)
def test_a_wrong_program_fails_for_its_reason(pool: Pool, program: str, reason: str, detail: str) -> None:
    verdict = judge(pool, program, timeout=1.5)
    assert not verdict.passed
    assert verdict.reason == reason
    assert detail in verdict.detail
    assert "\n" not in verdict.detail


def test_a_failure_that_tests_only_report_fails(pool: Pool) -> None:
    source = "def check(g):\n    assert g(1) == 2\ntry:\n    check(f)\n    assert f(2) == 4\n    ok = True\nexcept AssertionError:\n    print('failed')"
    assert judge(pool, DOUBLE, Asserts(source, ("f",))).passed
    assert not judge(pool, "def f(x):\n    return 4", Asserts(source, ("f",))).passed


def test_a_part_of_the_tests_counts_for_rewards(pool: Pool) -> None:
    verdict = judge(pool, "def add(a, b):\n    return 3")
    assert (verdict.passed, verdict.n_passed, verdict.n_tests) == (False, 1, 3)
    late = judge(pool, "import time\ndef add(a, b):\n    if b == 'b': time.sleep(60)\n    return a + b", timeout=1)
    assert (late.reason, late.n_passed, late.n_tests) == ("time-out", 1, 3)


DOUBLE = "def f(x):\n    return 2 * x"
BRANCHES = "r = f(1)\nif isinstance(r, float):\n    assert abs(r - 2) < 1e-6\nelse:\n    assert r == 2\n"
LOOP = "for i in range(10):\n    assert f(i) == 2 * i\nassert f('a') == 'aa'\n"
HELPER = "def check(g):\n    if g(1) != 2:\n        raise ValueError('no')\ncheck(f)\n"
EXPECTS = "try:\n    f(None)\n    assert False\nexcept TypeError:\n    pass\n"
RETURNS = f"def check():\n{textwrap.indent(EXPECTS.replace('pass', 'return'), '    ')}check()\n"


@pytest.mark.parametrize(
    ("source", "program", "n_passed", "n_tests"),
    [
        (BRANCHES, DOUBLE, 1, 1),
        (BRANCHES, "def f(x):\n    return 2.0", 1, 1),
        (BRANCHES, "def f(x):\n    return 3", 0, 1),
        (BRANCHES, "def f(x):\n    1 / 0", 0, 2),
        (LOOP, DOUBLE, 11, 11),
        (LOOP, "def f(x):\n    return 0 if x == 3 else 2 * x", 10, 11),
        (LOOP, "import os\ndef f(x):\n    return 2 * x if x != 3 else os._exit(0)", 3, 11),
        (HELPER, DOUBLE, 1, 1),
        (HELPER, "def f(x):\n    return 3", 0, 1),
        (EXPECTS, DOUBLE, 1, 1),
        (EXPECTS, "def f(x):\n    return x", 0, 1),
        (EXPECTS, "def f(x):\n    exit()", 0, 1),
        (RETURNS, DOUBLE, 1, 1),
        (RETURNS + LOOP, DOUBLE, 12, 12),
        (LOOP + "r = f(5)\nassert r\n", "def f(x):\n    return 1 / (5 - x)", 0, 12),
    ],
)
def test_tests_are_counted_as_they_run(pool: Pool, source: str, program: str, n_passed: int, n_tests: int) -> None:
    verdict = judge(pool, program, Asserts(source, ("f",)))
    assert (verdict.n_passed, verdict.n_tests) == (n_passed, n_tests), verdict
    assert (verdict.passed, verdict.proof) == (n_passed == n_tests, "outside")


@pytest.mark.parametrize(
    ("source", "program", "share"),
    [
        ("for x in f():\n    assert x < 5\nassert f() == [1, 2]", "def f(): return [1] * 1000", 1 / 2),
        (LOOP, "def f(x):\n    return 0 if x == 3 else 2 * x", 19 / 20),
        ("assert f(1)\nassert f(0)\nf(2)\nassert f(3)", "def f(x): return 1 / (2 - x) > 0.6", 1 / 3),
        ("for x in range(3):\n    y = f(x)\n    assert y", "def f(x): return 1 / (2 - x)", 1 / 2),
        ("if f(1):\n    assert f(1) == 1\nelse:\n    assert f(1) == 0", "def f(x): return x", 1),
    ],
)
def test_the_share_of_tests_is_a_mean_over_asserts(pool: Pool, source: str, program: str, share: float) -> None:
    verdict = judge(pool, program, Asserts(source, ("f",)))
    assert verdict.share == pytest.approx(share), verdict
    assert verdict.passed == (share == 1)


@pytest.mark.parametrize(
    "source",
    ["", "f(3)", "def check(g):\n    assert g(1) == 2", "def check(g):\n    raise ValueError", "for x in []:\n    assert f(x)",
     "class P:\n    pass\nf(P)", "if f(1) == 3:\n    assert f(2) == 4", "try:\n    f(1)\nexcept ValueError:\n    pass"],
)  # fmt: skip
def test_tests_that_check_nothing_pass_nobody(pool: Pool, source: str) -> None:
    verdict = judge(pool, DOUBLE, Asserts(source, ("f",)))
    assert (verdict.passed, verdict.n_passed, verdict.reason) == (False, 0, "no proof")
    assert "reached their end without a check" in verdict.detail


def test_tests_that_end_by_themselves_pass_nobody(pool: Pool) -> None:
    verdict = judge(pool, DOUBLE, Asserts("assert f(1) == 2\nimport sys\nsys.exit()\nassert f(1) == 3", ("f",)))
    assert (verdict.n_passed, verdict.n_tests, verdict.reason) == (1, 2, "error")
    assert "SystemExit" in verdict.detail


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """Two programs at work for each core, so that a third gets a third of it."""
    with contextlib.ExitStack() as ends:
        for _ in range(2 * len(os.sched_getaffinity(0))):
            # Sessions of their own, because Linux shares a core among sessions (sched_autogroup), and the sandbox has its own.
            command = [sys.executable, "-c", "while True: pass"]
            other = ends.enter_context(subprocess.Popen(command, start_new_session=True))
            ends.callback(other.kill)
        yield


@pytest.mark.usefixtures("busy_machine")
def test_waiting_for_a_core_is_no_time_of_the_program(pool: Pool) -> None:
    work = "import time\ndef add(a, b):\n    while time.process_time() < 0.4: pass\n    return a + b"
    verdict = judge(pool, work, timeout=0.7)
    assert verdict.passed, verdict
    assert verdict.seconds > 0.7, "the machine was not busy"
    asleep = judge(pool, "import time\ndef add(a, b):\n    time.sleep(60)", timeout=0.7)
    assert (asleep.reason, asleep.seconds < 2.5) == ("time-out", True)
    endless = judge(pool, "def add(a, b):\n    while True: pass", timeout=0.5)
    assert endless.reason == "time-out"
    assert endless.seconds < 0.5 * (1 + session.MAX_WAIT) + 2


def test_tests_that_expect_an_error_see_it(pool: Pool) -> None:
    source = "try:\n    root(-1)\n    assert False\nexcept ValueError:\n    pass\nassert root(4) == 2"
    tests = Asserts(source, ("root",))
    assert judge(pool, "import math\ndef root(x):\n    return math.sqrt(x)", tests).passed
    assert not judge(pool, "def root(x):\n    return 2", tests).passed


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        ("[3, 1, 2]", "x.sort()", "[1, 2, 3]"),
        ("{'a': 1, 'b': 2}", "x['n'] = x.pop('a')", "{'b': 2, 'n': 1}"),
        ("{1, 2}", "x.add(3) or x.remove(1)", "{2, 3}"),
        ("deque([1, 2, 3])", "x.append(x.popleft())", "deque([2, 3, 1])"),
        ("bytearray(b'ab')", "x.pop()", "bytearray(b'a')"),
    ],
)
def test_what_the_program_does_to_its_arguments_reaches_the_tests(
    pool: Pool, before: str, change: str, after: str
) -> None:
    source = f"from collections import deque\nx = {before}\nchange(x)\nassert x == {after}"
    assert judge(pool, f"def change(x):\n    {change}", Asserts(source, ("change",))).passed
    assert not judge(pool, "def change(x):\n    pass", Asserts(source, ("change",))).passed


def test_arguments_change_as_they_would_in_one_process(pool: Pool) -> None:
    source = """
a, b, c = [1, 0], [[2]], (i for i in range(3))
inner = b[0]
change(a, b)
assert a[0] is True and a[1] is False
assert b[0] is inner, "what the program leaves alone stays the same object"
assert change(a, b) is a and change(b, a) is not a
assert change(a, b, last=b) is b
assert [*change(c, None)] == [0, 1, 2]
"""
    program = "def change(x, y, last=None):\n    if isinstance(x, list): x[:] = [v == 1 if v in (0, 1) else v for v in x]\n    return last or x"
    verdict = judge(pool, program, Asserts(source, ("change",)))
    assert verdict.passed, verdict
    copying = program.replace("return last or x", "return last or x[:]")
    assert judge(pool, copying, Asserts(source, ("change",))).n_passed == 3


def test_functions_of_the_tests_are_called_back_and_those_of_the_program_too(pool: Pool) -> None:
    source = "assert apply(lambda x: x + 1, 2) == 3\nassert adder(2)(3) == 5\nassert apply(len, 'abc') == 3"
    program = "def apply(f, x):\n    return f(x)\ndef adder(n):\n    return lambda x: x + n"
    verdict = judge(pool, program, Asserts(source, ("apply", "adder")))
    assert (verdict.passed, verdict.proof) == (True, "outside")


def test_objects_of_the_program_stay_there(pool: Pool) -> None:
    """As in Mbpp/601 and Mbpp/367."""
    source = "p = Pair(1, 2)\nassert total([p, Pair(3, 4)]) == 10\np.a = 5\nassert p.a == 5 and total([p]) == 7\nassert len(p) == 2"
    program = (
        "class Pair:\n    def __init__(self, a, b): self.a, self.b = a, b\n    def __len__(self): return 2\n"
        "def total(pairs):\n    return sum(p.a + p.b for p in pairs)"
    )
    assert judge(pool, program, Asserts(source, ("total",))).passed


def test_names_of_the_library_are_the_librarys(pool: Pool) -> None:
    source = "assert math.isclose(f(1), 5)\nassert copy(f)(1) == f(1)\nassert datetime(2020, 1, 2) == day()\nassert queue.first() == 7"
    tests = Asserts(source, ("f",))
    rest = "from copy import copy\nfrom datetime import datetime\ndef day(): return datetime(2020, 1, 2)\nclass queue:\n    first = lambda: 7\n"
    verdict = judge(pool, "import math\ndef f(x): return 5.0\n" + rest, tests)
    assert verdict.passed, verdict
    assert judge(pool, "def f(x): return 5.0\n" + rest, tests).passed, "the program need not import it"
    cheat = "class math: isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return None\n" + rest
    assert judge(pool, cheat, tests).n_passed == 3
    as_entry = Asserts("assert bisect(1) == 2", ("bisect",))
    assert judge(pool, "def bisect(x):\n    return x + 1", as_entry).passed


VECTOR = """
class V:
    def __init__(self, *v): self.v = list(v)
    def __add__(self, o): return V(*[a + b for a, b in zip(self.v, o.v)])
    def __neg__(self): return V(*[-a for a in self.v])
    def __eq__(self, o): return type(o) is V and self.v == o.v
    def __lt__(self, o): return self.v < o.v
    def __hash__(self): return hash(tuple(self.v))
    def __str__(self): return ",".join(map(str, self.v))
    def __repr__(self): return f"V({self})"
    def __iter__(self): return iter(self.v)
    def __getitem__(self, at): return self.v[at]
    def __setitem__(self, at, value): self.v[at] = value
    def __delitem__(self, at): del self.v[at]
"""
VECTORS = """
v = V(1, 2) + V(3, 4)
assert str(v) == "4,6" and repr(v) == "V(4,6)" and f"{v}" == "4,6"
assert v == V(4, 6) and v != V(4, 7) and -v == V(-4, -6)
assert V(1) < V(2) and not V(2) < V(2) and sorted([V(2), V(1)]) == [V(1), V(2)] and max(V(1), V(2)) == V(2)
assert len({V(1), V(1), V(2)}) == 2
assert [*v] == [4, 6] and 6 in v and 7 not in v
v[0] = 9
del v[1]
assert [*v] == [9]
assert isinstance(v, V) and not isinstance(3, V) and not isinstance(v, int)
w = copy.deepcopy(v)
w[0] = 1
assert w is not v and v[0] == 9
"""
OBJECTS = {
    "operators": (VECTORS, VECTOR),
    "named tuple": ("p = f()\nassert p == (1, 2) and p.x == 1 and p.y == 2 and g(p) == 3",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)\ndef g(p): return p.x + p.y"),
    "context": ("with f() as x:\n    assert x == 1\nassert log() == ['in', 'out']",
        "from contextlib import contextmanager\nL = []\n@contextmanager\ndef f():\n    L.append('in')\n    yield 1\n    L.append('out')\ndef log(): return L"),
    "name": ("assert f.__name__ == 'f'", "def f(): pass"),
    "endless generator": ("g = f()\nassert [next(g), next(g)] == [0, 1]\nassert [x for x, _ in zip(g, range(5000))][-1] == 5001",
        "def f():\n    n = 0\n    while True:\n        yield n\n        n += 1"),
    "generator with an error": ("for n in (3, 4):\n    g = f(n)\n    assert [next(g) for _ in range(n)] == [*range(n)]\n"
        "    try:\n        next(g)\n        assert False\n    except ZeroDivisionError:\n        pass",
        "def f(n):\n    yield from range(n)\n    1 / 0"),
    "error of a callback": ("def bad(): return 1/0\nassert f(bad) == 'no'\ndef key(): return {}['k']\nassert f(key) == 'k'",
        "def f(g):\n    try: return g()\n    except ZeroDivisionError: return 'no'\n    except KeyError as e: return e.args[0]"),
    "arguments of an error": ("try:\n    f('a')\n    assert False\nexcept KeyError as e:\n    assert str(e) == \"'a'\" and e.args == ('a', 1)[:1]\n"
        "try:\n    f(2)\n    assert False\nexcept ValueError as e:\n    assert e.args == ('bad', 2) and len(str(e)) == 10\n"
        "try:\n    f(3)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'mine'\n"
        "try:\n    f(4)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'text'",
        "class E(ValueError):\n    def __str__(self): return 'mine'\nclass A(ValueError): args = ['no tuple']\n"
        "def f(x):\n    if x == 4: raise A('text')\n    raise KeyError(x) if x == 'a' else ValueError('bad', 2) if x == 2 else E(1)"),
    "name of a callback": ("def hello(a, b=1, *c, d, **e): pass\nassert f(hello) == ('hello', 'a, b=None, *c, d, **e')\nassert f(lambda x: x)[1] == 'x'",
        "import inspect\ndef f(g): return g.__name__, str(inspect.signature(g))[1:-1]"),
    "one callback": ("e = f()\ngot = []\ndef h(x): got.append(x)\ne.on(h)\ne.on(got.append)\ne.emit(1)\ne.off(h)\ne.off(got.append)\ne.emit(2)\nassert got == [1, 1]",
        "class f:\n    def __init__(s): s.h = []\n    def on(s, g): s.h.append(g)\n    def off(s, g): s.h.remove(g)\n    def emit(s, x):\n        for g in s.h: g(x)"),
    "function of Python": ("assert f(print) is None and f(callable) is False and f(len, 'ab') == 2", "def f(g, x=5): return g(x)"),
    "type of Python": ("assert f(bytearray(b'')) == bytearray", "def f(x): return type(x)"),
    "wanted failure of a helper": ("def t(x):\n    assert f(x) > 0\nt(1)\ntry:\n    t(-5)\n    ok = False\nexcept AssertionError:\n    ok = True\nassert ok\n"
        "try:\n    t(-5)\n    raise ValueError\nexcept AssertionError:\n    pass", "def f(x): return x"),
    "main": ("def main():\n    assert f(1) == 1\nif __name__ == '__main__':\n    main()", "def f(x): return x"),
    "callback that asks": ("assert keep([1, 2, 3, 4], lambda x: not f(x)) == [1, 3]\nassert f(2) is True",
        "def f(n): return n % 2 == 0\ndef keep(xs, p): return [x for x in xs if p(x)]"),
    "callback that reads an object": ("assert g([f(2), f(1)], lambda p: p.a) == [1, 2]\nassert g([f(2), f(1)], lambda p: str(p)) == [1, 2]",
        "class f:\n    def __init__(s, a): s.a = a\n    def __str__(s): return str(s.a)\ndef g(ps, key): return [p.a for p in sorted(ps, key=key)]"),
    "decorator of a recursion": ("@f\ndef fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\nassert fib(30) == 832040",
        "def f(g):\n    c = {}\n    def h(*a):\n        if a not in c: c[a] = g(*a)\n        return c[a]\n    return h"),
    "callback that fails on an error of the program's": ("assert f(lambda: g(0)) == 'mine' and f(lambda: g(1)) == 1",
        "class E(Exception):\n    def __init__(s, a, b): super().__init__(a)\ndef g(x):\n    if not x: raise E(1, 2)\n    return x\n"
        "def f(c):\n    try: return c()\n    except E: return 'mine'"),
    "error of the tests'": ("class Boom(Exception):\n    def __init__(s, a, b):\n        super().__init__(a)\n        s.b = b\ndef bad(): raise Boom(1, 2)\n"
        "try:\n    f(bad)\n    assert False\nexcept Boom as e:\n    assert e.b == 2",
        "def f(g):\n    for i in range(3):\n        try: return g()\n        except Exception:\n            if i == 2: raise"),
    "error of the library": ("import json, decimal, dataclasses\nfor n, kind in enumerate([json.JSONDecodeError, decimal.InvalidOperation, dataclasses.FrozenInstanceError]):\n"
        "    try:\n        f(n)\n        assert False\n    except kind as e:\n        assert n or 'Expecting' in str(e)",
        "import json, decimal, dataclasses\n@dataclasses.dataclass(frozen=True)\nclass P: x: int\n"
        "def f(n):\n    if n == 0: json.loads('{')\n    if n == 1: decimal.Decimal('x')\n    P(1).x = 2"),
    "attributes of an error": ("try:\n    f(7)\n    assert False\nexcept ValueError as e:\n    assert e.code == 7 and e.seen == [1]",
        "class E(ValueError):\n    def __init__(s, code):\n        super().__init__('no')\n        s.code, s.seen, s.me = code, [1], s\ndef f(x): raise E(x)"),
    "slow endless generator": ("from itertools import islice\nassert list(islice(f(), 4)) == [6, 28, 496, 8128]",
        "def f():\n    n = 2\n    while True:\n        while n == 8129: pass\n        s = 1 + sum(d + n // d for d in range(2, int(n ** .5) + 1) if n % d == 0)\n"
        "        if s == n: yield n\n        n += 1"),
    "groups": ("assert [(k, list(g)) for k, g in f([1, 1, 2, 3, 3])] == [(1, [1, 1]), (2, [2]), (3, [3, 3])]", "from itertools import groupby\ndef f(xs): return groupby(xs)"),
    "file": ("r = f()\nassert r.getvalue() == 'a\\nb' and r.readline() == 'a\\n' and list(r) == ['b']", "import io\ndef f(): return io.StringIO('a\\nb')"),
    "class from a container": ("c = f(2)\nc.put(1, 1)\nc.put(2, 2)\nassert c.get(1) == 1\nc.put(3, 3)\nassert c.get(2) == -1 and len(c) == 2 and 3 in c\n"
        "s = stack()\ns.push(5)\nassert s.top() == 5 and s[0] == 5",
        "from collections import OrderedDict\nclass f(OrderedDict):\n    def __init__(s, n):\n        super().__init__()\n        s.n = n\n    def get(s, k):\n        if k not in s: return -1\n"
        "        s.move_to_end(k)\n        return s[k]\n    def put(s, k, v):\n        s[k] = v\n        s.move_to_end(k)\n        if len(s) > s.n: s.popitem(last=False)\n"
        "class stack(list):\n    def push(s, x): s.append(x)\n    def top(s): return s[-1]"),
    "methods of a named tuple": ("p = f(3, 4)\nassert p.norm() == 5 and p.x == 3 and p != f(3, 5)", "from typing import NamedTuple\nclass f(NamedTuple):\n    x: int\n    y: int\n    def norm(s): return (s.x ** 2 + s.y ** 2) ** .5") ,
    "conversions of a named tuple": ("p = f()\nassert p._asdict() == {'x': 1, 'y': 2} and p._replace(x=5) == (5, 2) and repr(p) == 'P(x=1, y=2)' and p == P(1, 2)",
        "from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f(): return P(1, 2)"),
    "default of a dictionary": ("from collections import defaultdict\nassert f(defaultdict(list)) == {'a': [1]}\nassert g()['zz'] == []",
        "from collections import defaultdict\ndef f(d):\n    d['a'].append(1)\n    return d\ndef g(): return defaultdict(list)"),
    "types of the library": ("from collections import deque\nfrom decimal import Decimal\nassert type(f()) is deque and g(Decimal(1)) is Decimal and g(deque()) == deque",
        "from collections import deque\ndef f(): return deque([1])\ndef g(x): return type(x)"),
    "key of the library": ("from operator import itemgetter\nfrom functools import partial\nassert f([(2, 1), (1, 2)], itemgetter(1)) == [(2, 1), (1, 2)]\nassert f([1, 2], partial(pow, -1)) == [1, 2]",
        "def f(xs, key): return sorted(xs, key=key)"),
    "deep recursion through callbacks": ("@f\ndef fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\nassert fib(300) % 1000 == 600\n"
        "def cb(n): return 0 if n == 0 else 1 + g(cb, n - 1)\nassert g(cb, 300) == 300",
        "def f(g):\n    c = {}\n    def h(*a):\n        if a not in c: c[a] = g(*a)\n        return c[a]\n    return h\ndef g(cb, n): return cb(n)"),
    "endless recursion through callbacks": ("def cb(): return f(cb)\nassert f(cb) == 7 and f(lambda: 3) == 3\ntry:\n    g(lambda: g(cb2))\n    assert False\nexcept RecursionError:\n    pass",
        "def f(g):\n    try: return g()\n    except RecursionError: return 7\ndef cb2(): return g(cb2)\ndef g(c): return c()"),
    "threads of the program": ("assert f(lambda x: x + 1, range(300)) == [*range(1, 301)]", "from concurrent.futures import ThreadPoolExecutor\ndef f(g, xs):\n    with ThreadPoolExecutor(4) as e: return list(e.map(g, xs))"),
    "objects of a class from a tuple": ("assert f([R(2, 3), R(1, 1)]) == R(2, 3) and R(2, 3).twice == 4 and R.of(5) == R(5, 5) == (5, 5)",
        "from typing import NamedTuple\nclass R(NamedTuple):\n    w: int\n    h: int\n    @property\n    def twice(s): return 2 * s.w\n    @classmethod\n    def of(c, w): return c(w, w)\ndef f(rs): return max(rs)"),
    "objects of a class from a list": ("m = f([[1, 2]])\nassert m.t() == f([[1], [2]]) and m == [[1, 2]] and m != [[1, 3]] and g([3]).push(1).push(2) == [3, 1, 2] and m + m == f([[1, 2], [1, 2]])",
        "class B(list):\n    def push(s, x):\n        s.append(x)\n        return s\nclass g(B): pass\nclass f(B):\n    def t(s): return f(map(list, zip(*s)))\n    def __add__(s, o): return f([*s, *o])"),
    "operators of a class from a dictionary": ("d = f()\nd['A'] = 1\nassert d['a'] == 1 and 'a' in d and d == {'a': 1}", "class f(dict):\n    def __setitem__(s, k, v): super().__setitem__(k.lower(), v)"),
    "missing file": ("try:\n    f('zz.txt')\n    assert False\nexcept FileNotFoundError as e:\n    assert e.filename == 'zz.txt' and 'zz.txt' in str(e)", "def f(x): return open(x)"),
    "method of Python": ("assert f(str.upper, ['a']) == ['A'] and f('a'.__add__, ['b']) == ['ab'] and f(dict.fromkeys, [['c']]) == [{'c': None}]", "def f(g, xs): return [g(x) for x in xs]"),
    "own class of an error": ("try:\n    f(1)\n    assert False\nexcept Exception as e:\n    assert isinstance(e, Poor) and isinstance(e, Low) and not isinstance(e, Rich) and isinstance(e, ValueError)\n"
        "assert not isinstance(ValueError(), Poor)",
        "class Low(ValueError): pass\nclass Poor(Low): pass\nclass Rich(Low): pass\ndef f(x): raise Poor(x)"),
    "own iterator": ("i = f(3)\nassert next(i) == 3 and i.n == 2 and list(i) == [2, 1]",
        "class f:\n    def __init__(self, n): self.n = n\n    def __iter__(self): return self\n    def __next__(self):\n        if not self.n: raise StopIteration\n        self.n -= 1\n        return self.n + 1"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_of_the_program_behave_as_they_do_there(pool: Pool, kind: str) -> None:
    source, program = OBJECTS[kind]
    verdict = judge(pool, program, Asserts(source, ("V",) if "V(" in source else ("f",)))
    assert (verdict.passed, verdict.proof) == (True, "outside"), verdict


@pytest.mark.parametrize(
    ("source", "program"),
    [
        ("try:\n    f(1)\n    ok = False\nexcept E:\n    ok = True\nassert ok", "class E(Exception): pass\ndef f(x): raise E"),
        ("try:\n    f(1)\n    ok = False\nexcept Exception as e:\n    ok = isinstance(e, MyError)\nassert ok", "class MyError(Exception): pass\ndef f(x): raise MyError\nE = 0"),
        ("import contextlib\nok = True\nwith contextlib.suppress(E):\n    f(1)\n    ok = False\nassert ok", "class E(Exception): pass\ndef f(x): raise E"),
        ("import io\nE = f\nassert E(io.StringIO('5\\n6')) == [5, 6]", "def f(x): return [int(x.readline()), int(x.readline())]"),
        ("import io\nE = f\nb = io.StringIO()\nE(3, b)\nassert b.getvalue() == '3\\n'", "def f(x, out): print(x, file=out)"),
        ("import itertools\nE = f\nassert E(3, itertools.count()) == [0, 1, 2]", "from itertools import islice\ndef f(n, xs): return list(islice(xs, n))"),
        ("class C:\n    @f\n    def m(self, x): return 2 * x\nE = 0\nassert C().m(3) == 6", "def f(g): return lambda *a: g(*a)"),
        ("class C(metaclass=f):\n    E = 1\nassert C().E == 1", "class f(type): pass"),
        ("class P:\n    age = f()\nE = P()\nE.age = 5\nassert E.age == 5", "class f:\n    def __get__(s, i, o): return i.x\n    def __set__(s, i, v): i.x = v"),
        ("class G(E):\n    pass\nassert G().f() == 1", "class E:\n    def f(self): return 1"),
        ("import asyncio\nassert asyncio.run(f(1)) == 1", "async def f(x): return x"),
        ("async def t():\n    assert await f(1) == 1\ntry:\n    t().send(None)\nexcept StopIteration:\n    pass", "async def f(x): return x"),
    ],
)  # fmt: skip
def test_tests_that_need_the_programs_classes_run_inside(pool: Pool, source: str, program: str) -> None:
    verdict = judge(pool, program, Asserts(source, ("E" if "class E" in program else "f",)))
    assert (verdict.passed, verdict.proof) == (True, "inside"), verdict


def test_tests_with_objects_of_their_own_run_inside_and_the_verdict_says_so(pool: Pool) -> None:
    source = "class P:\n    x = 4\nassert twice(P()) == 8"
    right = judge(pool, "def twice(p):\n    return 2 * p.x", Asserts(source, ("twice",)))
    assert (right.passed, right.proof) == (True, "inside")
    wrong = judge(pool, "def twice(p):\n    return p.x", Asserts(source, ("twice",)))
    assert (wrong.passed, wrong.reason, wrong.proof) == (False, "wrong answer", "inside")


def test_a_result_that_is_no_data_does_not_choose_the_weaker_proof(pool: Pool) -> None:
    program = "class A:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return A()"
    verdict = judge(pool, program)
    assert (verdict.passed, verdict.proof) == (False, "outside")


def test_calls_are_compared_by_value(pool: Pool) -> None:
    inputs = ((1, 2), (0.1, 0.2), ([1], [2]))
    calls = Calls("add", inputs, (3, 0.3, [1, 2]))
    assert judge(pool, ADD, calls).passed  # 0.1 + 0.2 is 0.3 within EvalPlus' tolerance for floats
    verdict = judge(pool, "def add(a, b):\n    return 3 if a == 1 else 1 / 0", calls)
    assert (verdict.n_passed, verdict.n_tests, verdict.reason) == (1, 3, "error")


def test_what_a_program_does_to_its_arguments_reaches_no_other_call_and_no_other_program() -> None:
    """As HumanEval/34: one grader, one after the other."""
    held = [3, 1, 3]
    calls = Calls("unique", ((held,), ([held],), (held,)), ([1, 3], [[3, 1, 3]], [1, 3]))
    right = "def unique(l):\n    return sorted(set(l)) if l[0] == 3 else list(l)"
    in_place = "def unique(l):\n    if l[0] != 3: return l\n    l[:] = sorted(set(l))\n    return l"
    emptying = "def unique(l):\n    result = sorted(set(l)) if l[0] == 3 else [*l]\n    l.clear()\n    return result"
    with Pool(1, timeout=10) as pool:
        for program in (right, in_place, emptying, right):
            assert judge(pool, program, calls).passed, program
        assert judge(pool, "def unique(l):\n    return l", calls).n_passed == 1
        values = pool.submit_reference(emptying, "unique", [(held,), ([held],), (held,)]).result()
        assert values == calls.expected


def test_an_oracle_sees_the_arguments_as_they_were(pool: Pool) -> None:
    roots = Calls("find_zero", (([1, 2],), ([-6, 11, -6, 1],)), (-0.5, 1.0), 1e-4, "root_of_polynomial")
    assert judge(pool, "def find_zero(xs):\n    xs.clear()\n    return 0", roots).n_passed == 0
    assert judge(pool, "def find_zero(xs):\n    return -xs.pop(0) / xs[0] if len(xs) == 2 else 2.0", roots).passed


@pytest.mark.parametrize(
    "attribute", ["[str(n) for n in range(300000)]", "x = [[[[]]]]\n    for _ in range(60): x = [x, x]", "{str(n): 'a' * 4000 for n in range(30000)}"]
)  # fmt: skip
def test_large_attributes_of_errors_take_no_time(pool: Pool, attribute: str) -> None:
    program = (
        f"def made():\n    x = {attribute.removeprefix('x = ')}\n    return x\nX = made()\n"
        "def f():\n    e = ValueError('a')\n    e.x = X\n    e.__dict__ |= X if type(X) is dict else {}\n    raise e"
    )
    source = "n = 0\nfor _ in range(100):\n    try:\n        f()\n    except ValueError as e:\n        n += not hasattr(e, 'x')\nassert n == 100"
    assert judge(pool, program, Asserts(source, ("f",)), timeout=2).passed


@pytest.mark.parametrize(
    "result",
    ["1 << 8 * 8_000_000", "[1 << 8 * 8_000_000]", "-(1 << 8 * 8_000_000)", "range(1 << 8 * 8_000_000)", "{1: {2: (1 << 8 * 8_000_000,)}}",
     "__import__('fractions').Fraction(1 << 8 * 8_000_000)", "[[0] * 400_000] * 2", "'x' * 10_000_000"],
)  # fmt: skip
def test_to_show_a_large_result_takes_no_time(pool: Pool, result: str) -> None:
    verdict = judge(pool, f"def f(x):\n    return {result}", Calls("f", ((1,),), (2,)), timeout=4)
    assert (verdict.reason, verdict.seconds < 2) == ("wrong answer", True), verdict
    assert len(verdict.detail) < 120


def test_a_wrong_answer_is_shown(pool: Pool) -> None:
    verdict = judge(pool, "def f(x):\n    return [1, (2.5, 'b'), {3: {4}}]", Calls("f", ((1,),), (2,)))
    assert verdict.detail == "[1, (2.5, 'b'), {3: {4}}] for (1,), not 2"
    assert judge(pool, "def f(x):\n    return [*range(99)]", Calls("f", ((1,),), (2,))).detail.startswith(
        "[0, 1, 2, 3, 4, "
    )


def test_expected_values_come_from_the_reference() -> None:
    assert expected_values(ADD, "add", [(1, 2), ("a", "b"), ((1,), (2,))]) == (3, "ab", (1, 2))
    with pytest.raises(ValueError, match="The reference solution add fails: error, TypeError"):
        expected_values(ADD, "add", [(1, "b")])
    with pytest.raises(ValueError, match="no plain data|fails"):
        expected_values("def f():\n    return object()", "f", [()])


@pytest.mark.slow
def test_results_that_are_larger_than_a_message_in_all_are_computed_and_compared() -> None:
    program = "def f(n):\n    return [str(n) * (6 << 20), n]"
    inputs = [(number,) for number in range(10, 17)]
    values = expected_values(program, "f", inputs)
    assert values == tuple([str(number) * (6 << 20), number] for (number,) in inputs)
    assert run_program(program, Calls("f", tuple(inputs), values), timeout=20).passed
    with pytest.raises(
        ValueError, match=r"fails: error, .*it takes [\d,]+ bytes, more than the 67,108,864 that a message"
    ):
        expected_values("def f():\n    return 'x' * (65 << 20)", "f", [()])


def test_tests_that_are_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_TESTS_BYTES", 1 << 10)
    with pytest.raises(
        ValueError, match=r"The tests take [\d,]+ bytes, more than the 1,024 that a grader takes: divide"
    ):
        run_program("def f():\n    return ''", Calls("f", ((),), ("x" * 2000,)))


def test_scripts_read_and_print(pool: Pool) -> None:
    tests = Stdio(("2\n3 4\n", "1\n10\n"), ("7\n", "10"))
    assert judge(pool, "n = int(input())\nprint(sum(map(int, input().split())))", tests).passed
    by_file = (
        "import sys\ndata = sys.stdin.buffer.read().split()\nsys.stdout.write(str(sum(map(int, data[1:]))))\nexit(0)"
    )
    assert judge(pool, by_file, tests).passed
    half = judge(pool, "print(10)", tests)
    assert (half.reason, half.n_passed, half.n_tests) == ("wrong answer", 1, 2)
    assert judge(pool, "print(open('/etc/passwd').read())", tests).reason == "error"
    assert judge(pool, "print(len(bytearray(1 << 40)))", tests).reason == "memory"
    assert judge(pool, "while True: print('x' * 1000)", tests).reason == "output"


@pytest.mark.parametrize(
    "end",
    ["import time\ntime.sleep(60)", "while True: pass", "import os\nos.close(1)\nwhile True: pass", "import _thread\nlock = _thread.allocate_lock()\nlock.acquire()\nlock.acquire()"],
)  # fmt: skip
def test_a_script_that_does_not_end_fails_whatever_it_has_printed(pool: Pool, end: str) -> None:
    verdict = judge(pool, f"print(7, flush=True)\n{end}", Stdio(("",), ("7",)), timeout=1)
    assert (verdict.passed, verdict.reason) == (False, "time-out"), verdict


@pytest.mark.parametrize(
    ("end", "detail"),
    [
        ("raise SystemExit(1)", "SystemExit: 1"),
        ("exit('sorry')", "SystemExit: sorry"),
        ("exit('0')", "SystemExit: 0"),
        ("exit('')", "SystemExit: "),
        ("exit(0.0)", "SystemExit: 0.0"),
        ("exit(True)", "SystemExit: 1"),
        ("1 / 0", "ZeroDivisionError"),
        ("import os\nsys.stdout.flush()\nos._exit(3)", "the right text, but ended with status 3"),
        ("import os\nsys.stdout.flush()\nos.kill(os.getpid(), 9)", "the right text, but was killed by signal 9"),
        ("raise ValueError('a\\nb\\ud800')", "ValueError: a b?"),
    ],
)
def test_a_script_that_ends_badly_fails_whatever_it_has_printed(pool: Pool, end: str, detail: str) -> None:
    verdict = judge(pool, f"import sys\nprint(7)\n{end}", Stdio(("",), ("7",)))
    assert (verdict.passed, verdict.reason) == (False, "error")
    assert detail in verdict.detail


@pytest.mark.parametrize(
    "end",
    [
        "exit(0)",
        "exit()",
        "exit(False)",
        "import os\nsys.stdout.flush()\nos._exit(0)",
        "sys.stdout.close()",
        "sys.stdout = None",
    ],
)
def test_a_script_may_end_itself_when_it_is_done(pool: Pool, end: str) -> None:
    assert judge(pool, f"import sys\nprint(7)\n{end}", Stdio(("",), ("7",))).passed


def test_verdicts_come_in_order_and_reasons_are_counted() -> None:
    with Pool(2, timeout=5) as pool:
        programs = [ADD, "def add(a, b):\n    return None", ADD, "1 / 0"]
        assert [verdict.passed for verdict in pool.map((program, ADDS) for program in programs)] == [
            True,
            False,
            True,
            False,
        ]
        assert pool.reasons == {"passed": 2, "wrong answer": 1, "error": 1}


def test_leaving_a_pool_ends_what_still_runs() -> None:
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Pool(2, timeout=60) as pool:  # noqa: PT012 - as a user would
        waiting = [pool.submit("import time\ntime.sleep(60)", ADDS) for _ in range(4)]
        while not waiting[0].running():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 10


def test_packages_are_visible_only_when_asked_for() -> None:
    tests = Asserts("assert f() == [2, 3]", ("f",))
    program = "import numpy\ndef f():\n    return numpy.array([1, 2]) + 1"
    assert run_program(program, tests).reason == "error"
    limits = Limits(packages=("numpy",), memory=4 << 30, threads=64)
    assert run_program(program, tests, limits=limits, timeout=20).passed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: run_program(ADD, ADDS, timeout=0), r"timeout=0 must lie in \(0, 3600\] seconds."),
        (lambda: run_program(ADD, ADDS, allow_weak=["netwrk"]), "netwrk is no layer of the sandbox; there are user, "),
        (lambda: check_sandbox(["netwrk"]), "netwrk is no layer of the sandbox; there are user, "),
        (lambda: Pool(0), "workers=0 must be at least 1."),
        (lambda: Calls("f", ((1,),), ()), "There are 1 inputs and 0 expected values"),
        (lambda: Calls("f", (), ()), "Calls without inputs test nothing"),
        (lambda: Calls("f", ((1,),), (1,), oracle="x"), "oracle='x' must be one of equal, "),
        (lambda: Stdio((), ()), "give one for each, at least one"),
        (lambda: Limits(memory=1), "Limits.memory=1 is less than 67108864, with which no program runs."),
        (lambda: run_program(ADD, ADDS, limits=Limits(packages=("nosuch",))), "names nosuch, which is not installed"),
    ],
)
def test_a_bad_argument_is_refused_with_a_sentence(call: object, message: str) -> None:
    assert callable(call)
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_layer_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from mull.evaluation import sandbox

    monkeypatch.setattr(sandbox, "missing_layers", lambda: {"network": "it is the host's namespace"})
    for refusing in (check_sandbox, lambda: run_program(ADD, ADDS)):
        with pytest.raises(SandboxError, match="lacks network on this machine.*--allow-weak-sandbox=network"):
            refusing()
    check_sandbox(["network"])
    assert run_program(ADD, ADDS, allow_weak=["network"]).passed

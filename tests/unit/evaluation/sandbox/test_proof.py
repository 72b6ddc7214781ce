"""Claim: a program cannot pass tests that it does not fulfil, whatever it does to its own process. One program per trick."""

# ruff: noqa: E501 - programs in one line

from collections.abc import Iterator

import pytest

from mull.evaluation.sandbox import Asserts, Calls, Pool, Stdio

SECRET = 748_159_263
TESTS = Asserts(f"assert f(1) == {SECRET}\nassert f(2) == {SECRET + 1}", ("f",))

LINE = """
import os
for fd in range(3, 64):
    try:
        os.fstat(fd)
        break
    except OSError:
        pass
"""

FORGED = """
import sys
channel = sys.modules['mull.evaluation.isolation.channel'].Channel(fd)
"""

TRICKS = {
    "exit while loading": "exit(0)",
    "sys.exit while loading": "import sys\nsys.exit()",
    "os._exit while loading": "import os\nos._exit(0)",
    "exit in the call": "def f(x):\n    exit(0)",
    "os._exit in the call": "import os\ndef f(x):\n    os._exit(0)",
    "raise SystemExit": "def f(x):\n    raise SystemExit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    return 0",
    "always equal": "class A:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\ndef f(x):\n    return A()",
    "always equal number": "class A(int):\n    def __eq__(self, other): return True\ndef f(x):\n    return A(5)",
    "always equal, by metaclass": "class M(type):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
    "class A(metaclass=M): pass\ndef f(x):\n    return A",
    "patched AssertionError": "import builtins\nclass E(BaseException):\n    pass\nbuiltins.AssertionError = E\ndef f(x):\n    return 0",
    "patched built-ins": "import builtins\nbuiltins.compile = builtins.exec = lambda *a, **k: None\ndef f(x):\n    return 0",
    "patched operators": "import operator\noperator.eq = lambda a, b: True\ndef f(x):\n    return 0",
    "trace function": "import sys\nsys.settrace(lambda *a: None)\ndef f(x):\n    return 0",
    "frame walking": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for v in [*frame.f_locals.values(), "
    "*frame.f_globals.values()]:\n            if isinstance(v, int) and v > 10 ** 8: return v\n        frame = frame.f_back",
    "search of the heap": "import gc\ndef f(x):\n    for o in gc.get_objects():\n        for v in (o.values() if isinstance(o, dict) else o if "
    "isinstance(o, (list, tuple)) else ()):\n            if isinstance(v, int) and 700_000_000 < v < 800_000_000: return v",
    "search of code constants": "import gc, types\ndef f(x):\n    for o in gc.get_referrers(types.CodeType):\n        for v in getattr(o, "
    "'co_consts', ()):\n            if v == 748159263: return v",
    "reading its memory": "def f(x):\n    data = open('/proc/self/mem', 'rb').read(1 << 20)\n    return 748159263 if b'748159263' in data else 0",
    "reading files": "import os\ndef f(x):\n    for folder, _, files in os.walk('/tmp'):\n        for file in files:\n            exec(open(os.path.join(folder, file)).read())",
    "silence": LINE + "def f(x):\n    os.close(fd)\n    return 0",
    "forged verdict": LINE
    + FORGED
    + "def f(x):\n    channel.send({'passed': True, 'reason': 'passed', 'detail': '', 'n_passed': 2, 'n_tests': 2})\n    return 0",
    "forged nonce": LINE + FORGED + "channel.send(('nonce', b'0' * 16))\ndef f(x):\n    return 0",
    "forged results": LINE
    + FORGED
    + "for _ in range(9): channel.send(('return', True, {}, None))\ndef f(x):\n    return 0",
    "calling back what was not given": LINE
    + FORGED
    + "def f(x):\n    channel.send(('callback', 0, (), {}))\n    return channel.receive()",
    "raising the tests' errors": "def f(x):\n    raise AssertionError",
    "raising StopIteration": "def f(x):\n    raise StopIteration",
    "raising an error with a method": "class E(Exception):\n    def __str__(self): exit(0)\ndef f(x):\n    raise E",
    "a generator instead of a result": "def f(x):\n    yield 748159263",
    "endless text": "def f(x):\n    return 'x' * (40 << 20)",
    "a nan": "def f(x):\n    return float('nan')",
    "changing the list of tests": "import gc\nfor o in gc.get_objects():\n    if type(o) is list: o.clear()\ndef f(x):\n    return 0",
    "replacing the runner": "import sys\nrunner = sys.modules['mull.evaluation.isolation.candidate']\nrunner.Program.answer = lambda self, r: ('return', "
    "True, {}, None)\ndef f(x):\n    return 0",
    "a place that is none": LINE
    + FORGED
    + "def f(x):\n    for place in (9, -1, 's', {}): channel.send(('return', 0, {}, place))\n    return 0",
    "changing what is none": LINE
    + FORGED
    + "def f(x):\n    for place in (9, -1, 's'): channel.send(('return', 0, {place: []}, None))\n    return 0",
    "asking for the tests": LINE
    + FORGED
    + "def f(x):\n    channel.send(('return', 0, {}, None))\n    return channel.receive()",
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    with Pool(2, timeout=5) as pool:
        yield pool


@pytest.fixture(scope="module")
def single() -> Iterator[Pool]:
    """One grader, one program after the other."""
    with Pool(1, timeout=5) as pool:
        yield pool


@pytest.mark.parametrize("trick", TRICKS)
def test_the_trick_fails(pool: Pool, trick: str) -> None:
    verdict = pool.submit(TRICKS[trick], TESTS).result()
    assert not verdict.passed, verdict
    assert verdict.proof == "outside"


OBLIGING = """
class A:
    def _yes(self, *_): return True
    def _self(self, *_): return self
    def __call__(self, *_): return self
    def __iter__(self): return iter([self])
    def __len__(self): return 1
    def __hash__(self): return hash(SECRET)
    def __abs__(self): return 0.0
    def __float__(self): return 0.0
    def __int__(self): return 0
    def __exit__(self, *_): return True
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __contains__ = __instancecheck__ = __bool__ = _yes
    __add__ = __sub__ = __rsub__ = __truediv__ = __rtruediv__ = __mod__ = __enter__ = __getitem__ = _self
def f(x):
    return A()
def g(x):
    return A()
"""


@pytest.mark.parametrize(
    "check",
    ["f(1) == 5", "5 == f(1)", "not f(1) != 5", "f(1) < 5", "5 >= f(1)", "abs(f(1) - 5) < 1e-6", "abs(5 - f(1)) < 1e-6", "5 in f(1)", "f(1) in [5, 6]", "f(1) in {5}",
     "[f(1)] == [5]", "(5, f(1)) == (5, 5)", "isinstance(f(1), int)", "sorted(f(1)) == [5]", "f(1) / 5 == 1", "f(1) % 5 == 0", "max(f(1), 5) == 5", "f(1).a == 5",
     "{5: 1}[f(1)] == 1", "set(f(1)) == {5}", "f(1)[0] == 5", "math.isclose(f(1), 5)", "str(f(1)) == '5'", "isinstance(5, f(1))", "len(f(1)) == 5"],
)  # fmt: skip
def test_no_comparison_with_data_is_the_programs_word(pool: Pool, check: str) -> None:
    verdict = pool.submit(OBLIGING.replace("SECRET", "5"), Asserts(f"assert {check}", ("f",))).result()
    assert (verdict.passed, verdict.proof) == (False, "outside"), verdict


def test_a_context_of_the_program_passes_over_no_test(pool: Pool) -> None:
    source = "assert f(1)\nwith g(1):\n    x = 1 / 0\n    assert x == 2"
    assert not pool.submit(OBLIGING.replace("SECRET", "5"), Asserts(source, ("f",))).result().passed


def test_the_honest_program_passes(pool: Pool) -> None:
    assert pool.submit(f"def f(x):\n    return {SECRET - 1} + x", TESTS).result().passed


INSIDE = Asserts("class P:\n    x = 1\nassert f(P()) == 2", ("f",))
"""Tests that need the weaker proof."""

INSIDE_STOPS = {
    "exit while loading": "exit(0)",
    "exit in the call": "def f(p):\n    exit(0)",
    "os._exit in the call": "import os\ndef f(p):\n    os._exit(0)",
    "guessed nonce": LINE + FORGED + "channel.send(('nonce', b'0' * 16))\ndef f(p):\n    return 0",
    "raise SystemExit": "def f(p):\n    raise SystemExit(0)",
}

INSIDE_DOES_NOT_STOP = {
    "always equal": "class A:\n    def __eq__(self, other): return True\ndef f(p):\n    return A()",
    "patched exec": "import builtins\nbuiltins.exec = lambda *a: None\ndef f(p):\n    return 0",
    "frame walking": LINE
    + FORGED
    + "def f(p):\n    frame = sys._getframe()\n    while 'nonce' not in frame.f_locals: frame = frame.f_back\n"
    "    channel.send(('nonce', frame.f_locals['nonce']))\n    return 0",
}
"""Named in docs/concepts/sandbox.md. If one of them is stopped one day, the page has to say so."""


@pytest.mark.parametrize("trick", INSIDE_STOPS)
def test_the_nonce_stops_what_the_page_says(pool: Pool, trick: str) -> None:
    verdict = pool.submit(INSIDE_STOPS[trick], INSIDE).result()
    assert not verdict.passed, verdict


@pytest.mark.parametrize("trick", INSIDE_DOES_NOT_STOP)
def test_the_nonce_does_not_stop_what_the_page_says(pool: Pool, trick: str) -> None:
    verdict = pool.submit(INSIDE_DOES_NOT_STOP[trick], INSIDE).result()
    assert (verdict.passed, verdict.proof) == (True, "inside")


OWN_END = """
import sys
frame = sys._getframe()
while type(frame.f_locals.get("program")).__name__ != "Program": frame = frame.f_back
P = frame.f_locals["program"]
send = P.send
"""
"""The program's own end of the socket, which its caller has."""

LOADED = """
def f(*args): return 7.0
def nothing(*args, **kwargs): return 0
def yes(*args, **kwargs): return True
class M: isclose = yes
def load(*args): return M
def forge(message):
    if message[0] == "loaded": message[1].update(FORGED)
    send(message)
P.send = forge
"""


@pytest.mark.parametrize(
    ("forged", "check"),
    [
        ("{'abs': ('value', nothing)}", "assert abs(f(1) - 5) < 1e-6"),
        ("{'set': ('value', nothing), 'sorted': ('value', nothing)}", "assert set([f(1)]) == set([5])\nassert sorted([f(1)]) == [5]"),
        ("{'all': ('value', yes)}", "assert all(f(x) == x for x in range(9))"),
        ("{'__builtins__': ('value', {'__import__': load})}", "import math\nassert math.isclose(f(1), 5)"),
        ("{'__builtins__': ('value', {'abs': nothing})}", "__builtins__\nassert abs(f(1) - 5) < 1e-6"),
        ("{'a test': ('value', f)}", "assert f(1) == 5"),
        ("{'f': ('value',)}", "assert f(1) == 5"),
        ("{'f': ()}", "assert f(1) == 5"),
        ("{'f': 7}", "assert f(1) == 5"),
        ("{'f': ('value', f, f)}", "assert f(1) == 5"),
        ("{'f': ('module', 'math')}", "assert f(1) == 5"),
        ("{'g': ('module', 7)}", "assert g.x(f(1)) == 5"),
        ("{'g': ('module', ['math'])}", "assert g.x(f(1)) == 5"),
        ("{'g': (f, f)}", "assert g.x(f(1)) == 5"),
    ],
)  # fmt: skip
def test_a_program_gives_only_the_names_that_the_tests_ask_for(pool: Pool, forged: str, check: str) -> None:
    program = OWN_END + LOADED.replace("FORGED", forged)
    verdict = pool.submit(program, Asserts(check, ("f",))).result()
    honest = {"{'f': ('module', 'math')}": "error", "{'__builtins__': ('value', {'abs': nothing})}": "wrong answer"}
    reason = honest.get(forged, "no proof")
    assert (verdict.passed, verdict.reason, verdict.proof) == (False, reason, "outside"), verdict
    assert pool.submit("def f(x): return 5", Asserts("assert f(1) == 5", ("f",))).result().passed


EQUAL = "class E:\n    __hash__ = None\n    def __eq__(s, o): return True\n    def __ne__(s, o): return False\n"


@pytest.mark.parametrize(
    ("program", "check"),
    [
        ("def f(xs, key):\n    try: key(list)\n    except Exception: pass\n    return E()", "f([2, 1], key=lambda x: x[0]) == [1, 2]"),
        ("def f():\n    while True: yield 1\ndef norm(p): return E()", "norm(f()) == 5"),
        ("def f(): return range(2000000)\ndef norm(p): return E()", "norm(map(str, f())) == 5"),
        ("def f(): raise ValueError(5)\ndef norm(e): return E()", "norm(caught(f)) == 5"),
        ("import json\ndef f(): json.loads('{')\ndef norm(e): return E()", "norm(type(caught(f))) == 5"),
        ("def f(g):\n    g()\n    return E()\ndef h(): raise KeyError", "f(lambda: caught(h)) == 5"),
        ("def f(): return 5\ndef norm(g): return E()", "norm(f().__str__) == '7'"),
        ("def f(s): return list\ndef norm(p): return E()", "norm(f('3,4')[0]) == 5"),
        ("Point = ValueError\ndef f(a, b): return E()", "f(Point(0, 0), Point(3, 4)) == 5"),
        ("def f(g):\n    try: g(ValueError)\n    except Exception: pass\n    return E()", "f(lambda g: g(2)) == 5"),
        ("from collections import namedtuple\ndef f(g):\n    try: g(namedtuple('N', 'x')(1))\n    except Exception: pass\n    return E()", "f(lambda x: object()) == 5"),
    ],
)  # fmt: skip
def test_what_a_program_gives_does_not_lead_to_the_weaker_proof(pool: Pool, program: str, check: str) -> None:
    source = f"import json\ndef caught(g):\n    try: return g()\n    except Exception as e: return e\nassert {check}"
    verdict = pool.submit(EQUAL + program, Asserts(source, ("f",))).result()
    assert (verdict.passed, verdict.proof) == (False, "outside"), verdict


@pytest.mark.parametrize("check", ["f(lambda x: type(x)) == 5", "f(type(f(lambda x: x))) == 5"])
def test_a_program_does_not_choose_the_weaker_proof(pool: Pool, check: str) -> None:
    program = "class E:\n    def __eq__(self, other): return True\ndef f(g):\n    try: return g(E()) and E()\n    except Exception: return E()"
    verdict = pool.submit(program, Asserts(f"assert {check}", ("f",))).result()
    assert (verdict.passed, verdict.proof) == (False, "outside"), verdict


def test_a_forged_change_of_the_inputs_reaches_no_other_program() -> None:
    """One grader, one program after the other."""
    roots = Calls("f", (([1, 2],), ([4, 2],)), (None, None), oracle="root_of_polynomial")
    right = "def f(xs): return -xs[0] / xs[1]"
    with Pool(1, timeout=5) as pool:
        for change in ("{0: []}, None", "{0: [0, 0]}, None", "{}, 0"):
            forged = f"{OWN_END}\ndef f(xs): return 5.0\nP.answer = lambda request: ('return', 5.0, {change})"
            assert not pool.submit(forged, roots).result().passed
            assert pool.submit(right, roots).result().passed


@pytest.mark.parametrize(
    "answer",
    ["callback, 9, (), {}", "callback, -1, (), {}", "callback, 1, [], {}", "about, 9", "about, 0", "return, 5, {}, 9", "return, 5, {}, -9",
     "return, 5, {9: []}, None", "return, 5, [], None", "raise, 'X', '', ('builtins.ValueError',)", "raise, 7, 7, 7, 7, 7, 7",
     "raise, 'X', '', (7, 'x', '.', 'builtins.print', 'os.system', 'os.error.x', 'builtins.BaseException'), (), {}, -5",
     "raise, 'X', '', ('builtins.ValueError',), [], {}, 0",
     "iterator, 5, {}, None", "loaded, {}", "passed"],
)  # fmt: skip
def test_an_answer_that_no_honest_program_gives_fails(pool: Pool, answer: str) -> None:
    kind, _, rest = answer.partition(", ")
    program = f"{OWN_END}\ndef f(xs, g): return 5\nP.answer = lambda request: ({kind!r}, {rest})"
    verdict = pool.submit(program, Asserts("assert f([1], lambda x: x) == 7", ("f",))).result()
    reason, detail = ("error", "CandidateError: X: ") if "print" in answer else ("no proof", verdict.detail)
    assert (verdict.passed, verdict.proof) == (False, "outside")
    assert (verdict.reason, verdict.detail) == (reason, detail)
    assert pool.submit("def f(xs, g): return g(7)", Asserts("assert f([1], lambda x: x) == 7", ("f",))).result().passed


def test_no_error_of_a_program_has_a_test_skipped(pool: Pool) -> None:
    source = (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(f(1), 2)\n"
        "found = unittest.TestResult()\nunittest.defaultTestLoader.loadTestsFromTestCase(T).run(found)\nassert found.wasSuccessful()"
    )
    assert pool.submit("def f(x): return 2", Asserts(source, ("f",))).result().passed
    for base in ("SkipTest", "case._ShouldStop"):
        wrong = f"import unittest\nclass E(unittest.{base}): pass\ndef f(x): raise E"
        assert not pool.submit(wrong, Asserts(source, ("f",))).result().passed


@pytest.mark.parametrize("kind", ["fractions.Fraction", "collections.Counter"])
def test_what_tests_do_to_a_class_reaches_no_other_program(kind: str) -> None:
    """``C(6, 4)`` of the first program is the class itself, on whose attribute the tests write."""
    module, _, name = kind.rpartition(".")
    with Pool(1, timeout=5) as pool:
        given = f"from {module} import {name}\ndef C(*args): return {name}"
        pool.submit(given, Asserts("r = C(6, 4)\nr.size = 3\nassert r.size == 3", ("C",))).result()
        wrong = f"from {module} import {name}\ndef f(): return {name}()"
        assert not pool.submit(wrong, Asserts("assert f().size == 3", ("f",))).result().passed


def test_the_text_of_a_failed_assertion_stays_with_the_tests(pool: Pool) -> None:
    source = (
        "import unittest\nt = unittest.TestCase()\ndef cb(x): t.assertEqual(x, 748159263)\nassert f(cb) == 748159263"
    )
    program = "import re\ndef f(cb):\n    try: cb(0)\n    except AssertionError as e: return int((re.findall(r'\\d{9}', str(e)) or [0])[-1])"
    assert pool.submit(program, Asserts(source, ("f",))).result().reason == "wrong answer"


def test_tests_that_are_made_to_stop_stop_no_grader(single: Pool) -> None:
    for kind in ("KeyboardInterrupt", "GeneratorExit", "SystemExit"):
        source = "def handler(e): raise e\nassert f(handler)"
        verdict = single.submit(f"def f(h): return h({kind})", Asserts(source, ("f",))).result()
        assert not verdict.passed
        assert "the tests ended the grader" not in verdict.detail


@pytest.mark.parametrize(
    "end", ["os._exit(3)", "os.kill(os.getpid(), 9)", "os.close(1)\nos.close(channel)\nwhile True: pass"]
)
def test_a_script_does_not_say_itself_that_it_has_ended(pool: Pool, end: str) -> None:
    program = (
        f"{OWN_END}\nimport os\nchannel = P._channel._descriptor\nprint(7, flush=True)\nsend(('finished', 0))\n{end}"
    )
    assert not pool.submit(program, Stdio(("",), ("7",)), timeout=1).result().passed


def test_inputs_that_are_used_up_are_there_for_the_next_program() -> None:
    tests = Calls("f", ((iter([1, 2]),),), (3,))
    with Pool(1, timeout=5) as pool:
        assert [pool.submit("def f(x): return sum(x)", tests).result().passed for _ in range(3)] == [True] * 3


LIAR = """
class L:
    def __init__(self, xs): self.n, self.xs = -1, xs
    def root(self):
        self.n += 1
        return 0.0 if self.n % 2 == 0 else -self.xs[0] / self.xs[1]
    __float__ = root
    def __int__(self): return int(self.root())
    __index__ = __int__
def f(xs): return L(xs)
"""


def test_an_object_does_not_answer_as_another_number_each_time(pool: Pool) -> None:
    roots = Calls("f", (([1, 2],), ([4, 2],)), (None, None), oracle="root_of_polynomial")
    assert pool.submit(LIAR, roots).result().n_passed == 0
    for check in ("sum(c * math.pow(x, i) for i, c in enumerate([4, 2]))", "float(x)", "int(x) * 2 + 4 if int(x) == 0 else 1", "[4][x]", "range(x)[0]"):  # fmt: skip
        source = f"import math\nx = f([4, 2])\nassert abs({check}) < 1e-4"
        assert not pool.submit(LIAR, Asserts(source, ("f",))).result().passed, check


@pytest.mark.parametrize("handler", ["except:", "except BaseException:"])
def test_tests_that_catch_everything_do_not_hide_the_end_of_the_program(pool: Pool, handler: str) -> None:
    source = f"assert f(1) == 1\ntry:\n    f(2)\n{handler}\n    found = True\nassert found"
    program = "import os\ndef f(x):\n    return 1 if x == 1 else os._exit(0)"
    verdict = pool.submit(program, Asserts(source, ("f",))).result()
    assert (verdict.passed, verdict.reason) == (False, "no proof"), verdict
    right = "def f(x):\n    if x == 2: raise ValueError\n    return 1"
    assert pool.submit(right, Asserts(source, ("f",))).result().passed


@pytest.mark.parametrize("error", ["StopIteration", "StopIteration(1)", "E"])
@pytest.mark.parametrize(
    "check",
    ["all(map(lambda c: f(c) == c, [1, 2]))", "all(a == b for a, b in zip(map(f, [1, 2]), [1, 2]))", "all(f(1) == x for x in map(f, [1]))",
     "not [x for x in map(lambda c: g.a, [1]) if x != 1]", "not [x for x in map(lambda c: g[0], [1]) if x != 1]", "not [*map(len, [g])]",
     "[*iter(lambda: f(1), 1)] == []", "not [*map(iter, [g])]"],
)  # fmt: skip
def test_no_call_ends_an_iteration_of_the_tests(pool: Pool, check: str, error: str) -> None:
    program = (
        f"class E(StopIteration): pass\ndef f(*x): raise {error}\n"
        "class G:\n    __getattr__ = __getitem__ = __len__ = __iter__ = f\ng = G()"
    )
    verdict = pool.submit(program, Asserts(f"assert {check}", ("f",))).result()
    assert (verdict.passed, verdict.reason) == (False, "error"), verdict


@pytest.mark.parametrize(
    "message",
    ["'failed',", "'failed', P, P, P", "'failed', 'E', 'E'", "'finished',", "'finished', P", "'finished', 1, 2", "'finished', [0]", "P,", "0,", "", "'ready', 0"],
)  # fmt: skip
def test_a_message_at_the_end_of_a_script_harms_no_later_program(single: Pool, message: str) -> None:
    tests = Stdio(("",), ("2",))
    verdict = single.submit(f"{OWN_END}\nprint(3, flush=True)\nsend(({message}))\nP.send = len", tests).result()
    assert not verdict.passed
    assert "grader" not in verdict.detail, verdict
    assert single.submit("print(2)", tests).result().passed


@pytest.mark.parametrize(
    "check",
    ["raise AssertionError(f(1))", "assert f(1) == 5, f(1)", "raise ValueError(f(1))", "raise KeyError({f(1)})"],
)
@pytest.mark.parametrize("text", ["raise RuntimeError", "return 5", "exit(0)", "os._exit(0)", "raise StopIteration"])  # fmt: skip
def test_an_object_in_the_message_of_an_error_harms_no_later_program(single: Pool, check: str, text: str) -> None:
    tests = Asserts(f"if f(1) != 5: {check}\nassert f(1) == 5", ("f",))
    program = f"import os\nclass A:\n    def __str__(self): {text}\n    __repr__ = __str__\ndef f(x): return A()"
    verdict = single.submit(program, tests).result()
    assert not verdict.passed
    assert "grader" not in verdict.detail, verdict
    assert verdict.n_tests >= 1
    assert single.submit("def f(x): return 5", tests).result().passed

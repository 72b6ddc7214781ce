"""What decides: runs the tests, in a container of its own, against a candidate in another one.

The candidate's functions are stand-ins here. A call sends its arguments across as plain data and gets plain data back, so the
comparisons of the tests see lists and numbers of this process, never an object with methods of the candidate's. One grader serves
many programs, one after the other; each program has a fresh container.
"""

import ast
import builtins
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from reprlib import Repr
from typing import Any

from mull.evaluation.isolation.channel import FROM_CANDIDATE, MAX_ANSWER_BYTES, OUT_OF_MEMORY, Channel, Ended, restrict
from mull.evaluation.isolation.compare import is_right, same_tokens
from mull.evaluation.isolation.stand_ins import Candidate, result_of
from mull.evaluation.isolation.values import NotPlainError, encode

MAX_DETAIL = 300
MAX_SHOWN_BYTES = 300
"""Of a value on its way, such as the hexadecimal digits of an integer."""

OUTSIDE = -1
"""Number of no test: of an error between them."""

UNCHECKED = "the tests reached their end without a check"


class TestFailedError(Exception):
    """Why a program fails: ``(reason, detail)``."""


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except (Exception, Ended):  # noqa: BLE001 - an object of the program's in it has its own
        return "its text is the program's, which gives none"


def _line(text: str) -> str:
    return text.encode("utf-8", "replace").decode().replace("\n", " ")[:MAX_DETAIL]


class Tally:
    """Tests that have passed and failed, and the first failure."""

    def __init__(self, expected: int) -> None:
        self._runs: dict[int, list[int]] = {}  # of each test: how often it has failed, and passed
        self._expected = expected
        self.n_wanted = 0  # `try` statements around what runs now that want it to fail
        self.reason, self.detail = "", ""

    @property
    def n_passed(self) -> int:
        """How many runs have passed."""
        return sum(passed for _, passed in self._runs.values())

    @property
    def n_failed(self) -> int:
        """How many have not."""
        return sum(failed for failed, _ in self._runs.values())

    def passed(self, test: int = OUTSIDE) -> None:
        """One run of a test has passed."""
        self._runs.setdefault(test, [0, 0])[True] += 1

    def failed(self, error: BaseException, test: int = OUTSIDE) -> None:
        """One has not."""
        self._runs.setdefault(test, [0, 0])[False] += 1
        if self.reason:
            return
        if isinstance(error, TestFailedError):
            self.reason, self.detail = error.args
        elif isinstance(error, Ended):
            self.reason, self.detail = "no proof", "the program's process ended before the last test"
        elif (origin := getattr(error, FROM_CANDIDATE, None)) is not None:
            self.reason, self.detail = "memory" if isinstance(error, MemoryError) else "error", origin
        else:
            is_wrong = isinstance(error, AssertionError)
            self.reason = "wrong answer" if is_wrong else "error"
            self.detail = _text(error) if is_wrong else f"{type(error).__name__}: {_text(error)}"

    def result(self, *, complete: bool) -> dict[str, Any]:
        """What the host is told. Tests that reached their end are as many as have run; others at least as many as expected."""
        n_tests = max(0 if complete else self._expected, self.n_passed + self.n_failed, 1)
        passed = complete and self.n_passed == n_tests
        reason = "passed" if passed else self.reason or "no proof"
        detail = _line(self.detail)
        shares = [passed / (failed + passed) for failed, passed in self._runs.values()]
        share = sum(shares) / max(0 if complete else self._expected, len(shares), 1)
        counts = {"n_passed": self.n_passed, "n_tests": n_tests, "share": share}
        return {"passed": passed, "reason": reason, "detail": detail, **counts}


def load(candidate: Candidate, request: dict[str, Any], names: Iterable[str], kind: str = "module") -> dict[str, Any]:
    """Have the program loaded, and describe these names of it.

    Raises:
        TestFailedError: it raises, or lacks an entry point.
    """
    wanted = set(names)
    candidate.send((kind, request["program"], request["cpu_seconds"], sorted(wanted)))
    match candidate.receive():
        # Further names would take the place of built-in ones, such as the `abs` of the tests.
        case ("loaded", dict() as found) if found.keys() == wanted and all(map(_is_description, found.values())):
            pass
        case ("failed", str() as name, str() as text, tuple() as classes, *_):
            if name in ("SystemExit", "KeyboardInterrupt"):
                raise TestFailedError("no proof", f"the program ends itself while it is loaded ({name})")
            raise TestFailedError("memory" if OUT_OF_MEMORY in classes else "error", f"{name}: {text}")
        case _:
            raise Ended
    for name in request["entry_points"]:
        if found.get(name, ("missing",))[0] != "value":
            raise TestFailedError("error", f"the program defines no {name}")
    return found


def _is_description(what: Any) -> bool:
    """One that `candidate.Program.describe` gives: an honest candidate sends no other."""
    match what:
        case ("missing",) | ("value", _):
            return True
        case ("module", str()):
            return True
    return False


class _Test:
    """What stands around each test: it counts, and lets the next one run where this one fails or the program is gone."""

    def __init__(self, tally: Tally, number: int = OUTSIDE) -> None:
        self._tally, self._number = tally, number

    def __getitem__(self, number: int) -> "_Test":
        return _Test(self._tally, number)

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if self._tally.n_wanted:
            return False
        if error is None:
            self._tally.passed(self._number)
            return False
        if isinstance(error, NotPlainError) or not isinstance(error, Exception | Ended):
            return False
        self._tally.failed(error, self._number)
        return True


class _WantedFailure:
    """What stands around a ``try`` that wants an error: asserts of functions that it calls raise theirs."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def __enter__(self) -> None:
        self._tally.n_wanted += 1

    def __exit__(self, *_: object) -> None:
        self._tally.n_wanted -= 1


class _Counting(ast.NodeTransformer):
    """Put a `_Test` around each assert, and around each ``try`` as a whole with asserts in it: their errors may be wanted."""

    NAME = "a test"  # no name of the tests'
    WANTED = "a wanted failure"

    def __init__(self) -> None:
        self.n_tests = 0

    def visit_Try(self, node: ast.Try | ast.TryStar) -> ast.AST:
        around = self._within(ast.Name(self.WANTED, ast.Load()), node) if _wants_failure(node) else node
        return self.visit_Assert(around) if _has(node, ast.Assert | ast.Raise) else around

    visit_TryStar = visit_Try  # noqa: N815 - the name that `ast` looks for

    def visit_Assert(self, node: ast.stmt) -> ast.AST:
        self.n_tests += 1
        number = ast.Constant(self.n_tests)
        return self._within(ast.Subscript(ast.Name(self.NAME, ast.Load()), number, ast.Load()), node)

    def _within(self, context: ast.expr, node: ast.stmt) -> ast.stmt:
        block = ast.With([ast.withitem(context)], [node])
        return ast.fix_missing_locations(ast.copy_location(block, node))


def _wants_failure(node: ast.Try | ast.TryStar) -> bool:
    """Whether its last statement says that none is wrong: ``raise``, ``assert False``, ``ok = False``."""
    match node.handlers and node.body[-1]:
        case ast.Raise() | ast.Assert(test=ast.Constant(value=False | 0)) | ast.Assign(value=ast.Constant(value=False)):
            return True
    return False


def _has(tree: ast.AST, kinds: Any) -> bool:
    return any(isinstance(node, kinds) for node in ast.walk(tree))


def unbound_names(tree: ast.AST) -> list[str]:
    """Names that the tests read and define nowhere: they are the program's."""
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.alias):
            bound.add(node.asname or node.name.partition(".")[0])
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return sorted(read - bound - set(dir(builtins)))


def library_names(tree: ast.AST, names: Iterable[str]) -> dict[str, Any]:
    """Of these names, those of the standard library that the tests read without importing them.

    Programs answer for none of them: their ``math.isclose`` may be true of everything. A name stands for the module, or for what
    the module has of the same name, such as ``datetime``. Where neither has what the tests use, they mean something else.
    """
    uses: dict[str, set[str]] = {name: set() for name in names if name in sys.stdlib_module_names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            uses.get(node.value.id, set()).add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            uses.get(node.func.id, set()).add("__call__")
    found: dict[str, Any] = {}
    for name, used in uses.items():
        with suppress(ImportError):  # one of another system
            module = import_module(name)
            meant = [one for one in (module, getattr(module, name, None)) if all(hasattr(one, use) for use in used)]
            if meant:
                found[name] = meant[0]
    return found


TAKES_ERRORS = {"assertRaises", "assertRaisesRegex", "raises", "suppress"}
"""Functions of the library, and pytest's, that catch errors of a class which they are given."""


def needs_its_classes(tree: ast.AST, names: Iterable[str]) -> bool:
    """Whether the tests do with the program's names what a stand-in cannot: catch its errors, inherit, or await.

    By its name, ``Error`` or ``Exception`` at the end, a class is one of errors also where they do something else with it.
    """
    if any(name.endswith(("Error", "Exception")) for name in names):
        return True
    parts: list[ast.AST] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Await) or (isinstance(node, ast.Name) and node.id == "asyncio"):
            return True
        if isinstance(node, ast.ExceptHandler) and node.type is not None:
            parts.append(node.type)
        elif isinstance(node, ast.ClassDef):
            parts += [*node.bases, *(keyword.value for keyword in node.keywords)]
            for part in node.body:  # what becomes a method has to be one
                parts += getattr(part, "decorator_list", [getattr(part, "value", None) or part])
        elif isinstance(node, ast.Call) and _last_name(node.func) in TAKES_ERRORS:
            parts += node.args
    read = {node.id for part in parts for node in ast.walk(part) if isinstance(node, ast.Name)}
    return not read.isdisjoint(names)


def _last_name(function: ast.expr) -> str:
    return getattr(function, "attr", "") or getattr(function, "id", "")


def grade_asserts(candidate: Candidate, request: dict[str, Any]) -> dict[str, Any]:
    """Run asserts here, with stand-ins for the functions of the program."""
    tree = ast.parse(request["source"])
    entry_points = set(request["entry_points"])
    library = library_names(tree, set(unbound_names(tree)) - entry_points)
    names = entry_points.union(unbound_names(tree)) - library.keys()
    if needs_its_classes(tree, names):
        raise NotPlainError("the tests need the program's classes themselves")
    raises = not _has(tree, ast.Assert) and _has(tree, ast.Raise)
    counting = _Counting()
    tree = counting.visit(tree)
    tally = Tally(counting.n_tests)
    try:
        found = load(candidate, request, names)
        namespace = {name: _bound(*what) for name, what in found.items() if what[0] != "missing"}
        namespace |= library | {"__name__": "__main__", "__builtins__": builtins}
        namespace |= {counting.NAME: _Test(tally), counting.WANTED: _WantedFailure(tally)}
        exec(compile(tree, "<tests>", "exec", dont_inherit=True), namespace)
    except NotPlainError:
        raise
    except BaseException as error:  # noqa: BLE001 - tests and candidates raise anything
        tally.failed(error)
        return tally.result(complete=False)
    if candidate.is_gone and not tally.n_failed:
        tally.failed(Ended())
    elif not tally.n_passed + tally.n_failed:
        if raises and candidate.n_asked:
            tally.passed()  # such tests pass by reaching their end
        else:
            tally.failed(TestFailedError("no proof", UNCHECKED))
    return tally.result(complete=True)


def _bound(kind: str, value: Any) -> Any:
    """What a name of the program is for the tests: a module of Python itself, plain data, or a stand-in."""
    if kind != "module":
        return value
    return import_module(value) if value in sys.stdlib_module_names else None


def grade_calls(candidate: Candidate, request: dict[str, Any]) -> dict[str, Any]:
    """Call one function with each input and compare the results here."""
    inputs, expected = request["inputs"], request["expected"]
    tally = Tally(len(inputs))
    try:
        function = load(candidate, request, request["entry_points"])[request["entry_points"][0]][1]
        for number, (arguments, wanted) in enumerate(zip(inputs, expected, strict=True)):
            try:
                result = result_of(function, arguments)
                if not is_right(request["oracle"], arguments, result, wanted, request["atol"]):
                    raise TestFailedError(
                        "wrong answer", f"{_short(result)} for {_short(arguments)}, not {_short(wanted)}"
                    )
                tally.passed(number)
            except Exception as error:  # noqa: BLE001 - the candidate's errors are of all kinds
                tally.failed(error, number)
    except (TestFailedError, Ended) as error:
        tally.failed(error)
        return tally.result(complete=False)
    return tally.result(complete=True)


def collect_values(candidate: Candidate, request: dict[str, Any]) -> dict[str, Any]:
    """What the function returns for each input. The first error ends it."""
    try:
        function = load(candidate, request, request["entry_points"])[request["entry_points"][0]][1]
        values = [result_of(function, arguments) for arguments in request["inputs"]]
        if request["oracle"] == "equally_none":
            values = [value if isinstance(value, bool) else value is not None for value in values]
        if (size := len(encode(values))) > MAX_ANSWER_BYTES - MAX_DETAIL:  # and refuses what is no data
            told = (
                f"its results take {size:,} bytes, more than the {MAX_ANSWER_BYTES:,} that come back: give fewer inputs"
            )
            raise TestFailedError("error", told)
    except (Exception, Ended) as error:  # noqa: BLE001
        tally = Tally(1)
        tally.failed(error)
        return tally.result(complete=False)
    return {"passed": True, "reason": "passed", "detail": "", "values": values}


def grade_inside(candidate: Candidate, request: dict[str, Any]) -> dict[str, Any]:
    """The weaker proof: the tests run beside the program, and it gets a nonce to return only after it has been loaded."""
    tally = Tally(1)
    nonce = os.urandom(16)
    try:
        if not _has(ast.parse(request["source"]), ast.Assert | ast.Raise):
            raise TestFailedError("no proof", UNCHECKED)
        load(candidate, request, request["entry_points"], "inside")
        candidate.send((request["source"], nonce))
        match candidate.receive():
            case ("nonce", bytes() as returned) if returned == nonce:
                tally.passed()
            case ("failed", str() as name, str() as text, *_):
                raise TestFailedError("wrong answer" if name == "AssertionError" else "error", f"{name}: {text}")
            case _:
                raise Ended
    except (TestFailedError, Ended) as error:
        tally.failed(error)
        return tally.result(complete=False)
    return tally.result(complete=True)


def grade_script(candidate: Candidate, request: dict[str, Any], output: int, max_output: int) -> dict[str, Any]:
    """Give a program its input and compare what it prints."""
    candidate.send(("script", request["program"], request["cpu_seconds"], request["input"]))
    printed = bytearray()
    while part := os.read(output, 1 << 16):
        printed += part
        if len(printed) > max_output:
            return {"passed": False, "reason": "output", "detail": f"it prints more than {max_output:,} bytes"}
    with suppress(Ended):
        match candidate.receive():
            case ("failed", str() as name, str() as text, tuple() as classes, *_):
                kind = "memory" if OUT_OF_MEMORY in classes else "error"
                return {"passed": False, "reason": kind, "detail": _line(f"{name}: {text}")}
            case ("finished", int() | str() as status):
                if status != 0:
                    return {"passed": False, "reason": "error", "detail": _line(f"SystemExit: {status}")}
    text = printed.decode("utf-8", "replace")
    if same_tokens(text, request["output"]):
        # How its process ends, the host knows.
        return {"passed": True, "reason": "passed", "detail": "", "must_end": True}
    return {
        "passed": False,
        "reason": "wrong answer",
        "detail": f"it prints {_short(text)}, not {_short(request['output'])}",
    }


class _Short(Repr):
    """The first items of what is long. Python takes seconds to write an integer of a million digits, whatever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = 20
        self.maxstring = self.maxlong = self.maxother = 80

    def repr1(self, x: Any, level: int) -> str:
        if not isinstance(x, str | list | tuple | set | frozenset | dict) and len(encode(x, id)) > MAX_SHOWN_BYTES:
            return "..."
        return super().repr1(x, level)


def _short(value: Any) -> str:
    try:
        text = _Short().repr(value)
    except Exception:  # noqa: BLE001 - an object of the program's has its own
        return "a value too large to show"
    return text if len(text) <= 80 else text[:77] + "..."


GRADES: dict[str, Callable[[Candidate, dict[str, Any]], dict[str, Any]]] = {
    "asserts": grade_asserts,
    "calls": grade_calls,
    "collect": collect_values,
    "inside": grade_inside,
}


def grade(request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
    """Judge one program; a ``"not plain"`` reason asks for the weaker proof."""
    candidate = Candidate(Channel(descriptors[0]))
    try:
        if request["kind"] == "script":
            return grade_script(candidate, request, descriptors[1], request["max_output"])
        return GRADES[request["kind"]](candidate, request)
    except NotPlainError as error:
        return {"passed": False, "reason": "not plain", "detail": str(error)[:MAX_DETAIL]}
    except Ended:
        return {"passed": False, "reason": "no proof", "detail": "the program's process ended too early"}
    except Exception as error:  # noqa: BLE001 - such as for want of memory: the next program has its turn
        told = f"the grader: {type(error).__name__}: {_text(error)}"[:MAX_DETAIL]
        return {"passed": False, "reason": "error", "detail": told}


def main(line: int) -> None:
    """Serve the host until it closes the line."""
    channel = Channel(line, MAX_ANSWER_BYTES)
    restrict(channel.receive(), line)
    channel.send("ready")
    host = socket.socket(fileno=line)
    tests: dict[bytes, bytes] = {}
    while True:
        header, descriptors, _, _ = socket.recv_fds(host, 12, 2)
        if len(header) < 12:
            os._exit(0)
        message = pickle.loads(_exactly(host, int.from_bytes(header, "big")))
        if "tests" in message:
            tests = dict([*tests.items()][-7:])  # the newest eight stay
            tests[message["key"]] = message["tests"]
        try:
            # Unpickled for each program: what one of them brings about in these objects must not reach the next.
            answer = grade(pickle.loads(tests[message["key"]]) | message["request"], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        channel.send(answer)


def _exactly(line: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = line.recv(min(size, 1 << 20))
        if not part:
            os._exit(0)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


__all__ = ["grade", "main"]

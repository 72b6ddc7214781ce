"""Run programs that a model wrote, and judge them: one fresh container for each, with the tests on the other side of its wall.

The concept page *Sandbox* has the threat model, what each layer stops, and what nothing stops.
"""

import contextlib
import functools
import itertools
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

from mull.evaluation.isolation.compare import EVALPLUS_ORACLES, ORACLES
from mull.evaluation.isolation.container import LAYERS, Limits, SandboxError, packages_options
from mull.evaluation.isolation.layers import Layer, examine, missing_layers
from mull.evaluation.isolation.session import Question, Session

__all__ = [
    "EVALPLUS_ORACLES",
    "LAYERS",
    "ORACLES",
    "Asserts",
    "Calls",
    "Layer",
    "Limits",
    "Pool",
    "SandboxError",
    "Stdio",
    "Tests",
    "Verdict",
    "check_sandbox",
    "doctor",
    "expected_values",
    "run_program",
]

DEFAULT_TIMEOUT = 3.0
"""Seconds, as in HumanEval's own harness."""

MAX_DETAIL = 300

Proof: TypeAlias = Literal["outside", "inside"]


@dataclass(frozen=True)
class Verdict:
    """What became of a program."""

    passed: bool
    reason: str
    """``passed``, ``wrong answer``, ``time-out``, ``error`` (it raised), ``memory``, ``output`` (it printed too much), or
    ``no proof``: its process ended before the tests did, or the tests reached their end without a check."""

    detail: str
    """One line, at most 300 characters; it quotes the program, so it is not to be trusted."""

    seconds: float
    """Wall-clock time of program and tests, without the start of the container; waiting for a core counts here."""

    n_passed: int
    n_tests: int
    """Runs of tests; see `Asserts` for what counts as one."""

    share: float
    """Share of the tests that passed, from 0 to 1: of each test the share of its runs, because a program may have a loop over its
    result run as often as it likes."""

    proof: Proof = "outside"
    """``inside`` where the tests had to run in the program's own process: see the concept page for what that cannot stop."""


@dataclass(frozen=True)
class Asserts:
    """Python source of asserts, such as HumanEval's ``check`` with its call, or MBPP's list joined.

    The source runs in the grader. `entry_points`, and every other name that it reads and does not define, are the program's, and
    become stand-ins there: a helper that tests rely on should be in the source, not left to the program. Names of Python's
    standard library are the library's, whether the program imports them or not.

    Each run of an ``assert`` counts as a test, and so does each ``try`` with asserts in it, as a whole. Where none of them runs,
    no program passes; tests that only ``raise`` are one test.

    Tests that pass objects of a class of their own, or others that are no data, run inside the program's process instead, and so
    do those that catch an error of the program's, inherit from its classes or use ``asyncio``; the tests decide that, never what
    the program returns.
    """

    source: str
    entry_points: tuple[str, ...]

    @functools.cached_property
    def question(self) -> Question:
        """What the grader gets."""
        return Question.of("asserts", source=self.source, entry_points=[*self.entry_points])


@dataclass(frozen=True)
class Calls:
    """Calls of one function, compared by the rules of EvalPlus.

    `oracle` is a name in `ORACLES`; `EVALPLUS_ORACLES` has those of its problems. We differ from EvalPlus in one point:
    there, the tolerance for floats stays on for the inputs that follow one with a float result, so that their integers may
    differ by one part in 10 million.
    """

    entry_point: str
    inputs: tuple[tuple[Any, ...], ...]
    expected: tuple[Any, ...]
    atol: float = 0.0
    oracle: str = "equal"

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.expected):
            raise ValueError(
                f"There are {len(self.inputs)} inputs and {len(self.expected)} expected values: give one for each."
            )
        if not self.inputs:
            raise ValueError("Calls without inputs test nothing: give at least one.")
        if self.oracle not in ORACLES:
            raise ValueError(f"oracle={self.oracle!r} must be one of {', '.join(ORACLES)}.")

    @functools.cached_property
    def question(self) -> Question:
        """What the grader gets."""
        content = {"inputs": self.inputs, "expected": self.expected, "oracle": self.oracle, "atol": self.atol}
        return Question.of("calls", entry_points=[self.entry_point], **content)


@dataclass(frozen=True)
class Stdio:
    """Texts to read and the texts to print for them, as in CodeContests. Each input has a container, and the time, of its own.

    Outputs are compared word by word: case is ignored, integers are compared exactly, and numbers of which one has a point or an
    exponent may differ by 1e-5, except where an integer of 2**53 or more is expected. A program that ends with a status other
    than 0, or by a signal, fails whatever it has printed. After the first time-out the remaining inputs count as failed without
    being run.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.inputs or len(self.inputs) != len(self.outputs):
            raise ValueError(
                f"There are {len(self.inputs)} inputs and {len(self.outputs)} outputs: give one for each, at least one."
            )

    @functools.cached_property
    def question(self) -> Question:
        """What the grader gets; input and output come with each run."""
        return Question.of("script", entry_points=[])


Tests: TypeAlias = Asserts | Calls | Stdio


def run_program(
    program: str,
    tests: Tests,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    limits: Limits | None = None,
    allow_weak: Collection[str] = (),
) -> Verdict:
    """Run one program against its tests. For many, a `Pool` is several times as fast.

    Args:
        program: Python source.
        tests: What it has to do.
        timeout: Seconds for program and tests together; for `Stdio`, for each input. Time in which they were ready to run and
            waited for a core does not count, up to three times `timeout`, so a busy machine gives the same verdicts.
        limits: What it may use.
        allow_weak: Layers of the sandbox that may be missing on this machine (`LAYERS`).

    Raises:
        ValueError: an argument is out of range.
        SandboxError: a layer is missing that `allow_weak` does not name, or the sandbox does not work.
    """
    with Pool(1, timeout=timeout, limits=limits, allow_weak=allow_weak, ahead=False) as pool:
        return pool.submit(program, tests).result()


def expected_values(
    program: str,
    entry_point: str,
    inputs: Sequence[Sequence[Any]],
    *,
    oracle: str = "equal",
    timeout: float = 60.0,
    limits: Limits | None = None,
    allow_weak: Collection[str] = (),
) -> tuple[Any, ...]:
    """What a reference solution returns for each input, run in the same sandbox; `Pool.submit_reference` is for many.

    Args:
        program: Python source.
        entry_point: The function.
        inputs: Arguments of each call.
        oracle: How its results will be compared; ``"equally_none"`` gives whether there is one, because it may be no data.
        timeout: Seconds for all inputs together.
        limits: What it may use.
        allow_weak: See `run_program`.

    Raises:
        ValueError: it fails, or returns something that is no data.
        SandboxError: see `run_program`.
    """
    with Pool(1, timeout=timeout, limits=limits, allow_weak=allow_weak, ahead=False) as pool:
        return pool.submit_reference(program, entry_point, inputs, oracle=oracle).result()


def doctor(off: Collection[str] = ()) -> list[Layer]:
    """Every layer of the sandbox and whether it is active, tried on live containers of this machine.

    Args:
        off: Layers to switch off first, to see that this is noticed.
    """
    return examine(off)


def check_sandbox(allow_weak: Collection[str] = ()) -> None:
    """Refuse what a `Pool` would refuse, before hours of sampling. The first look takes 2 seconds; later ones take none.

    Args:
        allow_weak: See `run_program`.

    Raises:
        ValueError: `allow_weak` names no layer.
        SandboxError: a layer is missing that it does not name.
    """
    _layers_off(allow_weak)


def _layers_off(allow_weak: Collection[str]) -> frozenset[str]:
    """Layers to leave out, because they are missing here and that is allowed.

    Raises:
        ValueError: an unknown name.
        SandboxError: one is missing that is not named.
    """
    if unknown := sorted(set(allow_weak) - LAYERS.keys()):
        raise ValueError(f"{unknown[0]} is no layer of the sandbox; there are {', '.join(LAYERS)}.")
    missing = missing_layers()
    if refused := [name for name in missing if name not in allow_weak]:
        flags = " ".join(f"--allow-weak-sandbox={name}" for name in refused)
        raise SandboxError(
            f"The sandbox lacks {', '.join(refused)} on this machine ({missing[refused[0]]}). `mull sandbox doctor` shows all "
            f"layers. Run programs without only where nothing is at stake: {flags}, or allow_weak in Python."
        )
    return frozenset(missing)


class Pool:
    """Runs many programs at once, each in a fresh container that was started while the one before it ran.

    Args:
        workers: Programs that run at once. Up to twice the number of cores pays, because starting and ending a container is
            mostly waiting for the kernel.
        timeout: Seconds for each program; see `run_program`.
        limits: What each may use.
        allow_weak: See `run_program`.
        ahead: Whether to start containers before their programs come.

    Attributes:
        reasons: How often each `Verdict.reason` came.

    Raises:
        ValueError, SandboxError: as `run_program`.
    """

    def __init__(
        self,
        workers: int,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        limits: Limits | None = None,
        allow_weak: Collection[str] = (),
        ahead: bool = True,
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers={workers} must be at least 1.")
        _check_timeout(timeout)
        self._timeout, self._limits, self._ahead = timeout, limits or Limits(), ahead
        packages_options(self._limits.packages)  # refuses what is not installed
        self._off = _layers_off(allow_weak)
        self.reasons: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._sessions: list[Session] = []
        self._is_closed = False
        self._own = threading.local()
        # Its threads live as long as the pool: a container dies with the thread that started it.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="sandbox")
        self._window = 2 * workers

    def submit(self, program: str, tests: Tests, *, timeout: float | None = None) -> "Future[Verdict]":
        """Have one program run; `timeout` overrides the pool's."""
        if timeout is not None:
            _check_timeout(timeout)
        return self._threads.submit(self._run, program, tests, self._timeout if timeout is None else timeout)

    def map(self, pairs: Iterable[tuple[str, Tests]]) -> Iterator[Verdict]:
        """Verdicts of ``(program, tests)``, in order. Pairs are read as they are needed."""
        iterator = iter(pairs)
        waiting = [self.submit(*pair) for pair in itertools.islice(iterator, self._window)]
        try:
            while waiting:
                verdict = waiting.pop(0).result()
                waiting += [self.submit(*pair) for pair in itertools.islice(iterator, 1)]
                yield verdict
        finally:
            for unread in waiting:
                unread.cancel()

    def submit_reference(
        self, program: str, entry_point: str, inputs: Sequence[Sequence[Any]], *, oracle: str = "equal"
    ) -> "Future[tuple[Any, ...]]":
        """Have a reference solution's results computed: see `expected_values`."""
        return self._threads.submit(
            self._values, program, entry_point, [tuple(arguments) for arguments in inputs], oracle
        )

    def _values(self, program: str, entry_point: str, inputs: list[tuple[Any, ...]], oracle: str) -> tuple[Any, ...]:
        question = Question.of("collect", inputs=inputs, entry_points=[entry_point], oracle=oracle)
        answer = self._session().judge(program, question, {}, self._timeout)
        if not answer["passed"]:
            raise ValueError(f"The reference solution {entry_point} fails: {answer['reason']}, {answer['detail']}.")
        return tuple(answer["values"])

    def _run(self, program: str, tests: Tests, timeout: float) -> Verdict:
        verdict = _verdict(self._session(), program, tests, timeout, self._limits)
        with self._lock:
            self.reasons[verdict.reason] += 1
        return verdict

    def _session(self) -> Session:
        session: Session | None = getattr(self._own, "session", None)
        if session is None:
            session = self._own.session = Session(self._limits, self._off, ahead=self._ahead)
            with self._lock:
                self._sessions.append(session)
                if self._is_closed:
                    session.interrupt()
        return session

    def close(self) -> None:
        """End everything that still runs, and wait until no process is left."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            self._is_closed = True
            for session in self._sessions:
                session.interrupt()
        self._threads.shutdown(wait=True)
        with contextlib.ExitStack() as ends:
            for session in self._sessions:
                ends.callback(session.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_timeout(timeout: float) -> None:
    if not 0 < timeout <= 3600:
        raise ValueError(f"timeout={timeout} must lie in (0, 3600] seconds.")


def _verdict(session: Session, program: str, tests: Tests, timeout: float, limits: Limits) -> Verdict:
    if "\0" in program:
        return Verdict(False, "error", "SyntaxError: the source contains null bytes", 0.0, 0, 1, 0.0)
    if isinstance(tests, Stdio):
        return _printed_verdict(session, program, tests, timeout, limits)
    answer = session.judge(program, tests.question, {}, timeout)
    proof: Proof = "outside"
    if answer["reason"] == "not plain":
        proof = "inside"
        answer = session.judge(program, tests.question, {"kind": "inside"}, timeout)
    return Verdict(
        passed=answer["passed"],
        reason=answer["reason"],
        detail=answer["detail"][:MAX_DETAIL],
        seconds=answer["seconds"],
        n_passed=answer.get("n_passed", 0),
        n_tests=answer.get("n_tests", 1),
        share=answer.get("share", 0.0),
        proof=proof,
    )


def _printed_verdict(session: Session, program: str, tests: Stdio, timeout: float, limits: Limits) -> Verdict:
    n_passed, seconds = 0, 0.0
    first: dict[str, Any] = {"reason": "passed", "detail": ""}
    for text, wanted in zip(tests.inputs, tests.outputs, strict=True):
        most = limits.output + len(wanted.encode("utf-8", "surrogatepass"))
        request = {"input": text, "output": wanted, "max_output": most}
        answer = session.judge(program, tests.question, request, timeout)
        seconds += answer["seconds"]
        n_passed += answer["passed"]
        if not answer["passed"] and first["reason"] == "passed":
            first = answer
        if answer["reason"] == "time-out":
            break
    n_tests = len(tests.inputs)
    detail, share = first["detail"][:MAX_DETAIL], n_passed / n_tests
    return Verdict(n_passed == n_tests, first["reason"], detail, seconds, n_passed, n_tests, share)

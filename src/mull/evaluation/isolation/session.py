"""A grader and its candidates, one after the other, from the host's side: who is started, told, timed and killed."""

import contextlib
import hashlib
import math
import pickle
import select
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Self

from mull.evaluation.isolation.channel import MAX_ANSWER_BYTES, Channel, Ended
from mull.evaluation.isolation.container import CANDIDATE, GRADER, Container, Limits, SandboxError

GRADER_LIMITS = Limits(memory=4 << 30, disk=1 << 20, threads=8)

MAX_TESTS_BYTES = 512 << 20
"""Of tests with their inputs and expected values, pickled: the grader's memory holds them several times while it reads them."""

GRACE_SECONDS = 5.0
"""How long the grader may take to notice that a candidate is gone."""

MAX_WAIT = 3
"""A program gets back the time in which it waited for a core, up to so many times its own."""

LEAST_WAIT = 0.01
"""Seconds below which it is not asked again how long a program has waited."""

START_ATTEMPTS = 3
"""Starts that may fail one after the other, such as for want of memory, before the sandbox counts as broken."""


@dataclass(frozen=True)
class Question:
    """Tests as the grader gets them, once for many programs."""

    kind: str
    content: bytes

    @classmethod
    def of(cls, kind: str, **content: Any) -> Self:
        """Pack tests. The grader trusts the host, so a pickle will do; nothing is unpickled that comes back.

        Raises:
            ValueError: they are larger than `MAX_TESTS_BYTES`.
        """
        packed = pickle.dumps(content, protocol=5)
        if len(packed) > MAX_TESTS_BYTES:
            raise ValueError(
                f"The tests take {len(packed):,} bytes, more than the {MAX_TESTS_BYTES:,} that a grader takes: "
                "divide their inputs among several."
            )
        return cls(kind, packed)

    @property
    def key(self) -> bytes:
        """Digest of the content."""
        return hashlib.blake2b(self.content, digest_size=16).digest()


class Grader:
    """The container that runs the tests. It is started again where it has died."""

    def __init__(self, off: Collection[str]) -> None:
        # A grader runs code of the tests beside data of the candidates, so it has all layers, except that its time is that of
        # many programs.
        self._off = frozenset(off)
        self._container: Container | None = None
        self._known: list[bytes] = []

    def ask(self, descriptors: list[int], question: Question, request: dict[str, Any]) -> None:
        """Hand over a candidate and what to do with it."""
        if self._container is None:
            container = _started(GRADER, GRADER_LIMITS, self._off)
            container.wait_until_ready()
            self._container, self._known = container, []
        key = question.key
        message: dict[str, Any] = {"key": key, "request": request}
        if key not in self._known:
            message["tests"] = question.content
            self._known = [*self._known[-7:], key]  # as many as the grader keeps
        content = pickle.dumps(message, protocol=5)
        socket.send_fds(self._container.line, [len(content).to_bytes(12, "big")], descriptors)
        self._container.line.sendall(content)

    def answer(self, deadline: float) -> dict[str, Any] | None:
        """The verdict; None when the time is over, or the grader has died."""
        assert self._container is not None
        waiting = select.poll()
        waiting.register(self._container.line, select.POLLIN)
        if not waiting.poll(max(0.0, deadline - time.monotonic()) * 1000):
            return None
        try:
            answer = Channel(self._container.line.fileno(), MAX_ANSWER_BYTES).receive()
        except (Ended, ValueError):
            self.close()
            return {
                "passed": False,
                "reason": "error",
                "detail": "the tests ended the grader, or took all of its memory",
            }
        return dict(answer)

    def seconds_waiting(self) -> float:
        """See `Container.seconds_waiting`."""
        return self._container.seconds_waiting() if self._container is not None else 0.0

    def close(self) -> None:
        """End it."""
        if self._container is not None:
            self._container.close()
            self._container = None


class Session:
    """Judges programs one at a time. While one runs, the container of the next starts.

    Args:
        limits: Of each program.
        off: Layers that are left out.
        ahead: Whether to start the next container ahead.
    """

    def __init__(self, limits: Limits, off: Collection[str] = (), *, ahead: bool = False) -> None:
        self._limits, self._off, self._ahead = limits, frozenset(off), ahead
        self._grader = Grader(off)
        self._next: Container | None = None
        self._dying: list[Container] = []
        self._current: Container | None = None
        self._is_stopped = False

    def judge(self, program: str, question: Question, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Run one program against its tests.

        Args:
            program: Source.
            question: Tests.
            request: What is particular to this run.
            timeout: Seconds from when the container is ready and gets the program to its verdict, without those in which
                program and grader waited for a core.

        Returns:
            The grader's answer, with ``seconds``.

        Raises:
            SandboxError: the sandbox fails, whatever the program.
        """
        self._current = container = self._take()
        cpu_seconds = 0 if "cpu" in self._off else math.ceil(timeout) + 1
        request = {"program": program, "kind": question.kind, "cpu_seconds": cpu_seconds, **request}
        started = time.monotonic()
        try:
            if self._is_stopped:
                raise SandboxError("The sandbox was closed while programs waited for it.")
            self._hand_over(container, question, request)
            if self._ahead:
                self._next = _started(CANDIDATE, self._limits, self._off)
            answer = self._await(container, started, timeout if "wall-clock" not in self._off else 86_400)
        finally:
            self._current = None
            container.kill()
            self._dying.append(container)
            self._bury(leave=1 if self._ahead else 0)
        return answer | {"seconds": time.monotonic() - started}

    def _hand_over(self, container: Container, question: Question, request: dict[str, Any]) -> None:
        for _ in range(START_ATTEMPTS):
            try:
                self._grader.ask(container.hand_on(), question, request)
            except OSError:  # it died between two programs
                self._grader.close()
            else:
                return
        raise SandboxError("The sandbox's grader does not stay alive: `mull sandbox doctor` says what is missing.")

    def _await(self, container: Container, started: float, timeout: float) -> dict[str, Any]:
        answer = self._answer_in_time(container, started, timeout)
        if answer is None:
            container.kill()
            answer = self._grader.answer(time.monotonic() + GRACE_SECONDS) or {}
            if not answer:
                self._grader.close()  # the tests themselves do not end
            if not answer.get("passed") or answer.get("must_end"):
                answer |= {"passed": False, "reason": "time-out", "detail": "it was killed when its time was over"}
        elif answer["reason"] == "no proof" and (status := container.exit_status(0.2)) is not None:
            answer["detail"] = f"{answer['detail']}: it {_how(status)}"
        elif answer.get("must_end") and (status := container.exit_status(GRACE_SECONDS)) != 0:
            how = "closed its line and went on" if status is None else _how(status)
            answer |= {"passed": False, "reason": "error", "detail": f"it prints the right text, but {how}"}
        return answer

    def _answer_in_time(self, container: Container, started: float, timeout: float) -> dict[str, Any] | None:
        allowed, before = timeout, self._seconds_waiting(container)
        while (answer := self._grader.answer(started + allowed)) is None:
            back = min(self._seconds_waiting(container) - before, MAX_WAIT * timeout)
            if timeout + back < allowed + LEAST_WAIT:
                return None
            allowed = timeout + back
        return answer

    def _seconds_waiting(self, container: Container) -> float:
        return container.seconds_waiting() + self._grader.seconds_waiting()

    def _take(self) -> Container:
        for attempt in range(START_ATTEMPTS):
            try:
                container = self._next or _started(CANDIDATE, self._limits, self._off)
                self._next = None
                container.wait_until_ready()
            except SandboxError:
                self._next = None
                if attempt == START_ATTEMPTS - 1:
                    raise
            else:
                return container
        raise AssertionError("the last attempt returns or raises")

    def _bury(self, leave: int) -> None:
        """Wait for the ends of killed containers, except of the newest, which overlaps with the next program."""
        while len(self._dying) > leave:
            self._dying.pop(0).close()

    def interrupt(self) -> None:
        """End the running program, from another thread, and run no other."""
        self._is_stopped = True
        if (current := self._current) is not None:
            current.kill()

    def close(self) -> None:
        """End everything, and wait until it has ended."""
        with contextlib.ExitStack() as ends:  # each has its turn, also where another's end fails
            ends.callback(self._grader.close)
            if self._next is not None:
                ends.callback(self._next.close)
            for container in self._dying:
                ends.callback(container.close)
            self._next, self._dying = None, []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _how(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


def _started(modules: tuple[str, ...], limits: Limits, off: Collection[str]) -> Container:
    for _ in range(START_ATTEMPTS - 1):
        try:
            return Container(modules, limits, off)
        except SandboxError:
            time.sleep(0.1)
    return Container(modules, limits, off)

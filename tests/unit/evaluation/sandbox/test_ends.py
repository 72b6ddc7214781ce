"""Claim: whatever fails, and wherever it is interrupted, no descriptor of the host stays open and no process stays behind."""

import ast
import gc
import os
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mull.evaluation.isolation import container as containers
from mull.evaluation.isolation.container import CANDIDATE, Container, Limits, SandboxError
from mull.evaluation.isolation.session import Question, Session
from mull.evaluation.sandbox import Asserts, Pool

RIGHT, TESTS = "def f():\n    return 1", Asserts("assert f() == 1", ("f",))


def held() -> tuple[list[str], list[str]]:
    """What is open in this process, and its children."""
    opened = []
    for file in Path("/proc/self/fd").iterdir():
        try:
            opened.append(f"{file.name} {file.readlink()}")
        except OSError:  # the one that lists the folder
            continue
    tasks = Path("/proc/self/task").iterdir()
    return sorted(opened), sorted(
        pid for task in tasks for pid in (task / "children").read_text(encoding="ascii").split()
    )


@pytest.fixture(scope="module", autouse=True)
def read_once() -> None:
    """What is read and kept once."""
    with Pool(1) as pool:
        pool.submit(RIGHT, TESTS).result()
    gc.collect()


@pytest.fixture(autouse=True)
def nothing_is_held() -> Iterator[None]:
    before = held()
    yield
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        gc.collect()
    assert [str(warning.message) for warning in found] == []
    assert held() == before


def failing(real: Callable[..., Any], error: BaseException, at: int = 1) -> Callable[..., Any]:
    """A function that raises the error when it is called for this time."""
    calls = iter(range(1, 1000))

    def called(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise error
        return real(*args, **kwargs)

    return called


STEPS: list[tuple[Any, str, int]] = [
    (socket, "socketpair", 1),
    *[(os, "pipe", at) for at in range(1, 5 if os.geteuid() == 0 else 4)],  # root maps the users through one
    (containers, "_filter", 1),
    (containers, "find_bubblewrap", 1),
    (containers, "bubblewrap_options", 1),
    (subprocess, "Popen", 1),
    (Container, "_first_process", 1),
    (os, "pidfd_open", 1),
    (containers, "_code", 1),
    (Container, "_setup", 1),
]


@pytest.mark.parametrize("error", [OSError("no"), KeyboardInterrupt()], ids=repr)
def test_a_container_whose_start_fails_leaves_nothing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    before = held()
    for place, name, at in STEPS:
        with monkeypatch.context() as patched:
            patched.setattr(Container, "complaint", lambda _: "")  # it takes a moment
            patched.setattr(place, name, failing(getattr(place, name), error, at))
            with pytest.raises(SandboxError if isinstance(error, OSError) else KeyboardInterrupt):
                Container(CANDIDATE, Limits())
        assert held() == before, (name, at)


def test_one_thread_at_a_time_compiles_what_runs_in_containers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 fails where several threads parse at once; the probes of all layers start containers at once."""
    inside, most = [0], [0]
    parse = ast.parse

    def counted(*args: Any, **kwargs: Any) -> ast.AST:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        try:
            return parse(*args, **kwargs)
        finally:
            inside[0] -= 1

    monkeypatch.setattr(ast, "parse", counted)
    containers._compiled.cache_clear()
    with ThreadPoolExecutor(8) as threads:
        found = set(threads.map(lambda _: containers._code(*containers.GRADER), range(8)))
    assert (len(found), most[0]) == (1, 1)


@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_nor_does_one_that_never_becomes_ready(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    container = Container(CANDIDATE, Limits())
    monkeypatch.setattr(containers, "_wait", failing(containers._wait, error))
    with pytest.raises(SandboxError if isinstance(error, OSError) else type(error)):
        container.wait_until_ready()
    container.close()


@pytest.mark.parametrize("at", [1, 2, 3])
def test_nor_a_session_whose_containers_fail_at_their_end(at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grader, the one that is dead and the one that was started ahead all have their turn."""
    session = Session(Limits(), ahead=True)
    assert session.judge(RIGHT, Question.of("asserts", source=TESTS.source, entry_points=["f"]), {}, 10.0)["passed"]
    monkeypatch.setattr(containers, "_wait", failing(containers._wait, RuntimeError("no"), at))
    with pytest.raises(RuntimeError, match="no"):
        session.close()


@pytest.mark.parametrize(
    ("place", "name", "at"), [(containers, "_wait", 4), (containers, "_wait", 9), (Container, "hand_on", 3)]
)
def test_nor_a_pool_that_fails_in_the_middle(place: Any, name: str, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, name, failing(getattr(place, name), RuntimeError("no"), at))
    with pytest.raises(RuntimeError, match="no"), Pool(1) as pool:
        list(pool.map([(RIGHT, TESTS)] * 6))


def test_verdicts_that_nobody_reads_are_not_computed() -> None:
    read = []
    with Pool(1) as pool:
        pairs = ((RIGHT, TESTS) for number in range(100) if not read.append(number))  # type: ignore[func-returns-value]
        verdicts = pool.map(pairs)
        assert next(verdicts).passed
        verdicts.close()  # type: ignore[attr-defined]
        pool.submit(RIGHT, TESTS).result()
        assert len(read) == 3
        assert sum(pool.reasons.values()) <= 3  # the first, one that ran already, and the last


def test_a_container_may_be_killed_by_others_while_it_ends() -> None:
    """As `Pool.close` does: its number must not be used after it was given back."""
    stop = threading.Event()
    alive: list[Container] = []
    failures: list[BaseException] = []

    def kill() -> None:
        while not stop.is_set():
            for container in alive:
                try:
                    container.kill()
                except BaseException as error:  # noqa: BLE001 - shown below
                    failures.append(error)

    other = threading.Thread(target=kill)
    other.start()
    try:
        for _ in range(10):
            container = Container(CANDIDATE, Limits())
            alive[:] = [container]
            container.close()
            container.kill()
    finally:
        stop.set()
        other.join()
    assert failures == []

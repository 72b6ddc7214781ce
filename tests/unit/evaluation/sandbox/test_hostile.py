"""Claim: a thousand programs that attack the sandbox leave nothing behind, and the evaluation goes on."""

import os
import platform
import time
from pathlib import Path

import pytest
from hostile_programs import HOSTILE

from mull.evaluation.isolation.container import Container
from mull.evaluation.sandbox import Asserts, Limits, Pool, run_program

ESCAPED = Asserts("assert f() == 'ESCAPED'", ("f",))
HONEST = Asserts("assert f() == 1", ("f",))
N_PROGRAMS = 1000

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the attacks name system calls of x86-64")


@pytest.fixture(autouse=True)
def namespaces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Process namespaces of the containers that a test starts. The kernel uses a number again when a namespace is gone."""
    seen: list[str] = []
    first_process = Container._first_process

    def noted(self: Container, deadline: float) -> int:
        pid = first_process(self, deadline)
        seen.append(str(Path(f"/proc/{pid}/ns/pid").readlink()))
        return pid

    monkeypatch.setattr(Container, "_first_process", noted)
    return seen


def processes_in(namespaces: list[str]) -> list[str]:
    """Processes in these namespaces that are ours or the init's; those of another run of mull have its bwrap as parent."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str((entry / "ns" / "pid").readlink()) in namespaces:
                stat = (entry / "stat").read_text(encoding="ascii", errors="replace")
                if stat.rpartition(")")[2].split()[1] in ("1", str(os.getpid()), *children()):
                    found.append(stat)
        except OSError:
            continue
    return found


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def available_memory() -> int:
    line = next(
        line
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemAvailable")
    )
    return (int(line.split()[1]) << 10) + pages_on_lists() * os.sysconf("SC_PAGE_SIZE")


def pages_on_lists() -> int:
    """Free pages that each processor keeps for itself.

    Linux counts them as used, lets the lists grow to an eighth of the memory while programs start and end, and gives them back
    over minutes.
    """
    lines = Path("/proc/zoneinfo").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.strip().startswith("count:"))


def judge_all(sources: list[str], timeout: float, limits: Limits | None = None) -> list[str]:
    """Which of them have escaped; every fourth program between them is honest and has to pass."""
    honest = "def f():\n    return 1"
    pairs = []
    for number, source in enumerate(sources):
        pairs.append((source.replace("{n}", str(number)), ESCAPED))
        if number % 4 == 0:
            pairs.append((honest, HONEST))
    with Pool(4, timeout=timeout, limits=limits) as pool:
        verdicts = list(pool.map(pairs))
    failed = [
        verdict for (source, _), verdict in zip(pairs, verdicts, strict=True) if source == honest and not verdict.passed
    ]
    assert not failed, "an honest program was harmed by its neighbours"
    return [
        source for (source, tests), verdict in zip(pairs, verdicts, strict=True) if tests is ESCAPED and verdict.passed
    ]


def nothing_is_left(sources: list[str], timeout: float, namespaces: list[str], limits: Limits | None = None) -> None:
    run_program("def f():\n    return 1", HONEST)  # what is read and kept once
    before = (children(), open_files(), {file.name for file in Path("/tmp").iterdir()}, available_memory())
    assert judge_all(sources, timeout, limits) == []
    assert len(namespaces) > len(sources), "one container for each program, and those of the graders"
    deadline = time.monotonic() + 10
    while any(" Z 1 " in process for process in processes_in(namespaces)) and time.monotonic() < deadline:
        time.sleep(0.1)  # dead, and waiting for the host's init to take note
    assert processes_in(namespaces) == []
    assert (children(), open_files()) == before[:2]
    assert {
        name
        for name in {file.name for file in Path("/tmp").iterdir()} - before[2]
        if name.startswith(("link", "file", "input", "big"))
    } == set()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    deadline = time.monotonic() + 30
    while before[3] - available_memory() >= 0.01 * total and time.monotonic() < deadline:
        time.sleep(0.5)  # other programs of the machine use memory, too
    assert before[3] - available_memory() < 0.01 * total


def test_some_of_them_leave_nothing_behind(namespaces: list[str]) -> None:
    kinds = (
        "connect",
        "read passwords",
        "write library",
        "fork bomb",
        "kill everybody",
        "thread bomb",
        "memory",
        "crash",
        "mount",
    )
    nothing_is_left([HOSTILE[kind] for kind in kinds], 5.0, namespaces)


@pytest.mark.slow
def test_a_thousand_leave_nothing_behind(namespaces: list[str]) -> None:
    kinds = list(HOSTILE.values())
    assert len(kinds) >= 40
    nothing_is_left([kinds[number % len(kinds)] for number in range(N_PROGRAMS)], 1.0, namespaces)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["fork", "fork bomb", "leftover daemon", "subprocess", "kill everybody", "memory in small pieces"]
)
def test_where_processes_are_allowed_none_is_left_either(kind: str, namespaces: list[str]) -> None:
    bomb = HOSTILE[kind]
    if kind in ("fork", "leftover daemon"):
        bomb = bomb.replace("return 'ESCAPED'", "return 'started'")  # allowed here
    nothing_is_left([bomb] * 20, 1.0, namespaces, Limits(processes=8, memory=2 << 30))


def test_an_input_whose_process_does_not_read_or_write_is_ended() -> None:
    silent = "import os\nfor fd in range(3, 64):\n    try: os.close(fd)\n    except OSError: pass\nwhile True: pass"
    assert run_program(silent, HONEST, timeout=1.0).reason in ("no proof", "time-out")

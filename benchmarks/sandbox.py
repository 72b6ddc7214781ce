"""How many short programs per second the sandbox runs, and where the time goes.

Each program adds two numbers and passes three asserts. Processor time is that of this process and all that it started, so other
programs on the machine disturb it little; wall-clock time is printed beside it. The kernel does not add the time of a namespace's
processes to their parent's when it kills them, so that is read for one waiting container and added for each program.
The parts are measured by themselves: `true`, Python alone, bubblewrap with `true`, bubblewrap with Python, and our container up
to its first word.

    python benchmarks/sandbox.py [--programs 200] [--workers 1 2 4]
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mull.evaluation.isolation.container import CANDIDATE, Container, Limits, find_bubblewrap
from mull.evaluation.sandbox import Asserts, Pool

PROGRAM = "def add(a, b):\n    return a + b\n"
TESTS = Asserts("assert add(1, 2) == 3\nassert add('a', 'b') == 'ab'\nassert add([1], [2]) == [1, 2]", ("add",))


def measured(action: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Wall-clock and processor seconds of one call, ended children included, and what the call returns as those of others."""
    before, started = os.times(), time.perf_counter()
    others = sum(seconds for _ in range(repeats) if isinstance(seconds := action(), float))
    wall, after = time.perf_counter() - started, os.times()
    return wall / repeats, (sum(after[:4]) - sum(before[:4]) + others) / repeats


def start_and_end() -> float:
    """Seconds of the processor that the container's own processes took until they were killed."""
    container = Container(CANDIDATE, Limits())
    container.wait_until_ready()
    pids = {container.pid, container.program_pid()}
    nanoseconds = sum(int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[0]) for pid in pids)
    container.close()
    return nanoseconds / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    arguments = parser.parse_args()
    bubblewrap = [str(find_bubblewrap()), "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/"]
    python = [sys.executable, "-I", "-S", "-c", "pass"]
    parts: dict[str, Callable[[], object]] = {
        "true": lambda: subprocess.run(["true"], check=True),
        "Python": lambda: subprocess.run(python, check=True),
        "bubblewrap, true": lambda: subprocess.run([*bubblewrap, "true"], check=True),
        "bubblewrap, Python": lambda: subprocess.run([*bubblewrap, *python], check=True),
        "container": start_and_end,
    }
    print(f"{'part':<24}{'wall ms':>9}{'cpu ms':>9}")
    for name, action in parts.items():
        wall, cpu = measured(action, 40)
        print(f"{name:<24}{1e3 * wall:>9.1f}{1e3 * cpu:>9.1f}")
    killed = sum(start_and_end() for _ in range(20)) / 20
    print(f"\n{'workers':<24}{'wall ms':>9}{'cpu ms':>9}{'per second':>12}{'per cpu second':>16}")
    for workers in arguments.workers:
        before = os.times()
        with Pool(workers) as pool:
            started = time.perf_counter()
            verdicts = list(pool.map([(PROGRAM, TESTS)] * arguments.programs))
            wall = time.perf_counter() - started
        after = os.times()
        assert all(verdict.passed for verdict in verdicts)
        n = len(verdicts)
        cpu = sum(after[:4]) - sum(before[:4]) + n * killed
        print(f"{workers:<24}{1e3 * wall / n:>9.1f}{1e3 * cpu / n:>9.1f}{n / wall:>12.1f}{n / cpu:>16.1f}")


if __name__ == "__main__":
    main()

"""Whether each layer of the sandbox is there, tried on live containers."""

import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mull.evaluation.isolation.container import CANDIDATE, LAYERS, OF_BUBBLEWRAP, Container, Limits, SandboxError, find_bubblewrap
from mull.evaluation.isolation.session import Question, Session

PROBE_LIMITS = Limits(memory=256 << 20, disk=1 << 20, processes=1, threads=6, open_files=32, output=1 << 16)
"""Small, so that the probes reach them fast."""


@dataclass(frozen=True)
class Layer:
    """One layer, and what the probe has seen."""

    name: str
    active: bool
    detail: str


_INSIDE = f"""
import errno, os, socket, sys, threading

def failure(action):
    try:
        if action is os.fork and action() == 0:
            os._exit(0)
        elif action is not os.fork:
            action()
    except (OSError, MemoryError, RuntimeError) as error:
        return type(error).__name__
    return ""

def fill(path, size):
    with open(path, "wb") as file:
        for _ in range(size >> 16):
            file.write(bytes(1 << 16))

def fill_folder():
    names = [f"mull-probe-{{os.getpid()}}-{{number}}" for number in range(4)]
    try:
        for name in names:
            fill(name, {PROBE_LIMITS.disk} // 2)
    finally:
        for name in names:
            if os.path.exists(name):
                os.unlink(name)

def fill_one():
    name = f"mull-probe-{{os.getpid()}}"
    try:
        fill(name, 2 * {PROBE_LIMITS.disk})
    finally:
        os.unlink(name)

def start_threads():
    stop = threading.Event()
    started = []
    try:
        for _ in range({PROBE_LIMITS.threads} + 4):
            thread = threading.Thread(target=stop.wait)
            thread.start()
            started.append(thread)
    finally:
        stop.set()
        for thread in started:
            thread.join()

def open_many():
    files = [os.dup(1) for _ in range({PROBE_LIMITS.open_files} + 4)]

def observe():
    seen = {{
        "read-only": all(os.statvfs(path).f_flag & os.ST_RDONLY for path in ("/", os.path.dirname(os.__file__))),
        "tmpfs": failure(fill_folder),
        "fork": failure(os.fork) if {PROBE_LIMITS.processes} == 1 else "",
        "socket": failure(lambda: socket.socket(socket.AF_INET)),
    }}
    seen["processes"] = failure(start_threads)
    seen["file-size"] = failure(fill_one)
    seen["open-files"] = failure(open_many)
    seen["memory"] = failure(lambda: bytearray({PROBE_LIMITS.memory}))
    seen["root"] = sorted(os.listdir("/"))
    return seen
"""


def missing_layers(off: Collection[str] = ()) -> dict[str, str]:
    """Names of layers that are not active, and why. One look per process and set of switched-off layers."""
    return _missing(frozenset(off))


@functools.cache
def _missing(off: frozenset[str]) -> dict[str, str]:
    return {layer.name: layer.detail for layer in examine(off) if not layer.active}


def examine(off: Collection[str] = ()) -> list[Layer]:
    """Try every layer.

    Args:
        off: Layers to switch off, to see that this is noticed.
    """
    off = set(off)
    try:
        found = _outside(off) | _inside(off) | _in_time(off)
    except SandboxError as error:
        return _without(off, str(error))
    return [Layer(name, *found[name]) for name in LAYERS]


def _without(off: set[str], reason: str) -> list[Layer]:
    """Which single layers keep bubblewrap from starting, or all of them."""
    if find_bubblewrap() is None:
        reason = "there is no bwrap: install bubblewrap, or mull's extra eval"
    else:
        for name in ("network", "ipc", "uts", "pid"):
            if name in off:
                continue
            try:
                layers = examine(off | {name})
            except SandboxError:
                continue
            if not {layer.name for layer in layers if not layer.active}.issuperset(OF_BUBBLEWRAP):
                return [Layer(name, False, reason) if layer.name == name else layer for layer in layers]
    if off.issuperset(OF_BUBBLEWRAP):
        return [Layer(name, False, reason) for name in LAYERS]
    return [
        Layer(layer.name, False, reason) if layer.name in OF_BUBBLEWRAP else layer
        for layer in examine(off | set(OF_BUBBLEWRAP))
    ]


Seen = dict[str, tuple[bool, str]]


def _outside(off: set[str]) -> Seen:
    """What the kernel says of a container that waits for its program."""
    os.environ.setdefault("MULL_SANDBOX_PROBE", "1")
    container = Container(CANDIDATE, PROBE_LIMITS, off)
    try:
        container.wait_until_ready()
        own, other = Path("/proc/self"), Path(f"/proc/{container.pid}")
        kinds = {"user": "user", "network": "net", "mount": "mnt", "pid": "pid", "ipc": "ipc", "uts": "uts"}
        seen: Seen = {}
        for layer, kind in kinds.items():
            names = [os.readlink(side / "ns" / kind) for side in (own, other)]
            seen[layer] = (names[0] != names[1], names[1] if names[0] != names[1] else "it is the host's namespace")
        status = _status(other)
        seen["user"] = _user(seen["user"], status)
        kept = {name: status[name] for name in ("CapPrm", "CapEff", "CapAmb") if int(status[name], 16)}
        gains = status["NoNewPrivs"] != "1"
        seen["capabilities"] = (not kept and not gains, f"{kept or 'none'}, {'can' if gains else 'cannot'} gain any")
        same = os.getsid(container.pid) == os.getsid(0)
        seen["session"] = (not same, "it is the host's session" if same else "its own")
        names = sorted({entry.partition(b"=")[0].decode() for entry in (other / "environ").read_bytes().split(b"\0") if entry})
        extra = sorted(set(names) - {"LC_CTYPE", "LD_LIBRARY_PATH", "PWD"})
        seen["environment"] = (not extra, f"{len(extra)} of the host's variables" if extra else ", ".join(names) or "empty")
        n_open = len(os.listdir(other / "fd"))
        seen["descriptors"] = (n_open <= 4, f"{n_open} are open")
        limit = next(line for line in (other / "limits").read_text().splitlines() if line.startswith("Max processes"))
        seen["processes"] = (limit.split()[2] == str(PROBE_LIMITS.threads), limit.split()[2])
        return seen
    except OSError as error:
        raise SandboxError(f"The kernel does not show the container's state: {error}.") from None
    finally:
        container.close()


def _status(process: Path) -> dict[str, str]:
    lines = (process / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _user(seen: tuple[bool, str], status: dict[str, str]) -> tuple[bool, str]:
    uid = status["Uid"].split()[0]
    if uid == "0":
        return False, "it runs as root, under whatever name"
    return seen[0], f"{seen[1]}, uid {uid} on the host"


def _inside(off: set[str]) -> Seen:
    """What a program sees of its limits."""
    question = Question.of("collect", inputs=[()], entry_points=["observe"])
    with Session(PROBE_LIMITS, off) as session:
        answer = session.judge(_INSIDE, question, {}, 20.0)
    if not answer["passed"]:
        raise SandboxError(f"The probe does not run: {answer['reason']}, {answer['detail']}.")
    seen = answer["values"][0]

    def refused(name: str, *errors: str) -> tuple[bool, str]:
        return seen[name] in errors, f"more is refused ({seen[name]})" if seen[name] else "more than the limit was granted"

    hidden = not {"root", "home", "etc", "proc"} & set(seen["root"])
    result = {
        "read-only": (bool(seen["read-only"]), "the root and Python's library"),
        "tmpfs": refused("tmpfs", "OSError"),
        "memory": refused("memory", "MemoryError"),
        "file-size": refused("file-size", "OSError"),
        "open-files": refused("open-files", "OSError"),
        "seccomp": (seen["socket"] == seen["fork"] == "PermissionError", f"socket: {seen['socket'] or 'allowed'}, fork: {seen['fork']}"),
        "processes": refused("processes", "RuntimeError"),
    }
    if not hidden:
        result["mount"] = (False, f"it sees {', '.join(seen['root'])}")
    return result


def _in_time(off: set[str]) -> Seen:
    """Programs that do not end, print without end, or lose their parent."""
    spin = Question.of("collect", inputs=[()], entry_points=["spin"])
    with Session(PROBE_LIMITS, off) as session:
        started = time.monotonic()
        source = "import time\ndef spin():\n    time.sleep(1.5)\n"
        killed = not session.judge(source, spin, {}, 0.3)["passed"] and time.monotonic() - started < 1.4
        flood = f"print('x' * {4 * PROBE_LIMITS.output})"
        limit = PROBE_LIMITS.output if "output" not in off else 1 << 40
        request = {"input": "", "output": "", "max_output": limit}
        capped = session.judge(flood, Question.of("script", entry_points=[]), request, 5.0)["reason"] == "output"
        burn = "def spin():\n    while True:\n        pass\n"
        request = {"cpu_seconds": 1} if "cpu" not in off else {}
        limited = session.judge(burn, spin, request, 1.8)["reason"] == "no proof"
    return {
        "wall-clock": (killed, "a sleeping program was killed" if killed else "a program slept beyond its time"),
        "output": (capped, "a flood was cut off" if capped else "a flood was read whole"),
        "cpu": (limited, "a busy loop was ended by the kernel" if limited else "a busy loop went on"),
        "parent-death": _dies_with_parent(off),
    }


_PARENT = """
import sys, time
from mull.evaluation.isolation.container import CANDIDATE, Container
from mull.evaluation.isolation.layers import PROBE_LIMITS
container = Container(CANDIDATE, PROBE_LIMITS, set(sys.argv[1].split(",")) - {""})
container.wait_until_ready()
print(container.pid, flush=True)
time.sleep(30)
"""


def _dies_with_parent(off: set[str]) -> tuple[bool, str]:
    """Kill a process that has started a container."""
    folders = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, ",".join(sorted(off))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": folders},
    )
    try:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        if not line.strip():
            return False, "the probe did not start"
        pidfd = os.pidfd_open(int(line))
        # It waits for its program, and the end of its parent is the end of that line. A stopped process does not read.
        signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    finally:
        parent.kill()
        parent.communicate()
    waiting = select.poll()
    waiting.register(pidfd, select.POLLIN)
    try:
        died = bool(waiting.poll(2000))
        if not died:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        return died, "it was gone with its parent" if died else "it outlived its parent"
    finally:
        os.close(pidfd)

"""Whether each layer of the sandbox is there, tried on live containers."""

import functools
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mull.evaluation.isolation.container import (
    CANDIDATE,
    LAYERS,
    OF_BUBBLEWRAP,
    Container,
    Limits,
    SandboxError,
    find_bubblewrap,
)
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
    opened = []
    try:
        for _ in range({PROBE_LIMITS.open_files} + 4):
            opened.append(os.dup(2))
    finally:
        for descriptor in opened:
            os.close(descriptor)

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
    chosen = set(off)
    if reason := _refusal(chosen):
        blocking = [name for name in ("network", "ipc", "uts", "pid") if not _refusal(chosen | {name})]
        missing = set(blocking[:1]) or set(OF_BUBBLEWRAP)
    else:
        missing = set()
    probes = (_outside, _inside, _wall_clock, _output, _processor_time, _parent_death)
    found: Seen = {}
    with ThreadPoolExecutor(len(probes)) as threads:  # most of it is waiting
        for seen in threads.map(lambda probe: probe(chosen | missing), probes):
            found |= {name: result for name, result in seen.items() if found.get(name, (True, ""))[0]}
    return [Layer(name, *((False, reason) if name in missing else found[name])) for name in LAYERS]


def _refusal(off: Collection[str]) -> str:
    """Why no container starts without these layers; empty if one does."""
    if find_bubblewrap() is None and not set(OF_BUBBLEWRAP).issubset(off):
        return "there is no bwrap: install bubblewrap, or mull's extra eval"
    try:
        container = Container(CANDIDATE, PROBE_LIMITS, off)
        container.wait_until_ready()
    except SandboxError as error:
        return str(error)
    container.close()
    return ""


Seen = dict[str, tuple[bool, str]]


def _outside(off: set[str]) -> Seen:
    """What the kernel says of a container that waits for its program."""
    os.environ.setdefault("MULL_SANDBOX_PROBE", "1")
    container = Container(CANDIDATE, PROBE_LIMITS, off)
    try:
        container.wait_until_ready()
        own, other = Path("/proc/self"), Path(f"/proc/{container.program_pid()}")
        kinds = {"user": "user", "network": "net", "mount": "mnt", "pid": "pid", "ipc": "ipc", "uts": "uts"}
        seen: Seen = {}
        for layer, kind in kinds.items():
            names = [str((side / "ns" / kind).readlink()) for side in (own, other)]
            seen[layer] = (names[0] != names[1], names[1] if names[0] != names[1] else "it is the host's namespace")
        status = _status(other)
        seen["user"] = _user(seen["user"], status)
        kept = {name: status[name] for name in ("CapPrm", "CapEff", "CapAmb") if int(status[name], 16)}
        gains = status["NoNewPrivs"] != "1"
        seen["capabilities"] = (not kept and not gains, f"{kept or 'none'}, {'can' if gains else 'cannot'} gain any")
        same = os.getsid(container.program_pid()) == os.getsid(0)
        seen["session"] = (not same, "it is the host's session" if same else "its own")
        names = sorted(
            {entry.partition(b"=")[0].decode() for entry in (other / "environ").read_bytes().split(b"\0") if entry}
        )
        extra = sorted(set(names) - {"LC_CTYPE", "LD_LIBRARY_PATH", "PWD"})
        seen["environment"] = (
            not extra,
            f"{len(extra)} of the host's variables" if extra else ", ".join(names) or "empty",
        )
        opened = sorted(str(file.readlink()).partition(":")[0] for file in (other / "fd").iterdir())
        seen["descriptors"] = (opened == ["/dev/null", "/dev/null", "pipe", "socket"], ", ".join(opened))
        for layer, name, wanted in (
            ("processes", "Max processes", PROBE_LIMITS.threads + 1),
            ("file-size", "Max file size", PROBE_LIMITS.disk),
        ):
            lines = (other / "limits").read_text(encoding="ascii").splitlines()
            limit = next(line.removeprefix(name).split()[1] for line in lines if line.startswith(name))
            seen[layer] = (limit == str(wanted), f"the limit is {limit}")
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
    question = Question.of("collect", oracle="equal", inputs=[()], entry_points=["observe"])
    with Session(PROBE_LIMITS, off) as session:
        answer = session.judge(_INSIDE, question, {}, 20.0)
    if not answer["passed"]:
        raise SandboxError(f"The probe does not run: {answer['reason']}, {answer['detail']}.")
    seen = answer["values"][0]

    def refused(name: str, *errors: str) -> tuple[bool, str]:
        return seen[name] in errors, f"more is refused ({seen[name]})" if seen[
            name
        ] else "more than the limit was granted"

    strange = sorted(set(seen["root"]) - {"lib", "lib64", "python", "tmp", "usr"})
    result = {
        "read-only": (bool(seen["read-only"]), "the root and Python's library"),
        "tmpfs": refused("tmpfs", "OSError"),
        "memory": refused("memory", "MemoryError"),
        "file-size": refused("file-size", "OSError"),
        "open-files": refused("open-files", "OSError"),
        "seccomp": (
            seen["socket"] == seen["fork"] == "PermissionError",
            f"socket: {seen['socket'] or 'allowed'}, fork: {seen['fork']}",
        ),
        "processes": refused("processes", "RuntimeError"),
    }
    if strange:
        result["mount"] = (False, f"it sees {', '.join(strange)}")
    return result


def _wall_clock(off: set[str]) -> Seen:
    question = Question.of("collect", oracle="equal", inputs=[()], entry_points=["wait"])
    started = time.monotonic()
    with Session(PROBE_LIMITS, off) as session:
        answer = session.judge("import time\ndef wait():\n    time.sleep(1.5)\n", question, {}, 0.3)
        took = time.monotonic() - started
    killed = not answer["passed"] and answer["seconds"] < 1.4
    return {"wall-clock": (killed, f"a program that sleeps was {'killed' if killed else 'not killed'} ({took:.1f} s)")}


def _output(off: set[str]) -> Seen:
    program = f"print('x' * {4 * PROBE_LIMITS.output})"
    request = {"input": "", "output": "", "max_output": PROBE_LIMITS.output if "output" not in off else 1 << 40}
    with Session(PROBE_LIMITS, off) as session:
        capped = session.judge(program, Question.of("script", entry_points=[]), request, 5.0)["reason"] == "output"
    return {"output": (capped, "a flood was cut off" if capped else "a flood was read whole")}


def _processor_time(off: set[str]) -> Seen:
    question = Question.of("collect", oracle="equal", inputs=[()], entry_points=["spin"])
    request = {"cpu_seconds": 1} if "cpu" not in off else {}
    with Session(PROBE_LIMITS, off - {"wall-clock"}) as session:
        answer = session.judge(
            "def spin():\n    while True:\n        pass\n", question, request, 10.0 if request else 2.0
        )
    limited = answer["reason"] == "no proof"
    return {"cpu": (limited, f"a busy loop was {'' if limited else 'not '}ended by the kernel")}


_PARENT = """
import sys, time
from importlib.util import module_from_spec, spec_from_file_location
for name in ("values", "channel", "seccomp", "container"):
    spec = spec_from_file_location("mull.evaluation.isolation." + name, f"{sys.argv[1]}/{name}.py")
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
container = module.Container(module.CANDIDATE, module.Limits(), set(sys.argv[2].split(",")) - {""})
container.wait_until_ready()
print(container.program_pid(), flush=True)
time.sleep(30)
"""


def _parent_death(off: set[str]) -> Seen:
    """Kill a process that has started a container. It loads these modules alone, because the package takes seconds."""
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(Path(__file__).parent), ",".join(sorted(off))],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        if not line.strip():
            return {"parent-death": (False, "the probe did not start")}
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
        return {"parent-death": (died, "it was gone with its parent" if died else "it outlived its parent")}
    finally:
        os.close(pidfd)

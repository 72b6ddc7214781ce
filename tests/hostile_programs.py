"""Programs that attack the sandbox. Each defines ``f``, which returns ``"ESCAPED"`` where its attack has worked, or does not return.

An attack that is refused may raise. ``HOSTILE`` maps a kind to its source; ``{n}`` is a number that makes a thousand of them differ.
"""

# ruff: noqa: E501 - programs in one line

LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\ndef call(*a):\n    return libc.syscall(*[ctypes.c_long(x) for x in a])\n"


def attempt(body: str, setup: str = "") -> str:
    """A program whose ``f`` does this, and has escaped if it gets to the end."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return f"{setup}\ndef f():\n{lines}    return 'ESCAPED'\n"


def syscall(number: int, *arguments: int) -> str:
    """A program that makes a system call of x86-64, which must fail."""
    return attempt(f"assert call({number}, {', '.join(map(str, arguments)) or 0}) >= 0", LIBC)


HOSTILE: dict[str, str] = {
    # network
    "connect": attempt("import socket\nsocket.create_connection(('127.0.0.1', 22), 1)"),
    "udp": attempt("import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))"),
    "listen": attempt("import socket\ns = socket.socket(); s.bind(('', 9000 + {n})); s.listen()"),
    "raw socket": attempt("import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)"),
    "netlink": attempt("import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW)"),
    "abstract unix socket": attempt("import socket\nsocket.socket(socket.AF_UNIX).bind('\\0mull{n}')"),
    # files outside
    "read passwords": attempt("open('/etc/passwd').read()"),
    "read home": attempt("import os\nassert os.listdir('/root') or os.listdir('/home')"),
    "write library": attempt("import os\nopen(os.path.join(os.path.dirname(os.__file__), 'x{n}.py'), 'w')"),
    "patch library": attempt("import os\nopen(os.__file__, 'a')"),
    "write root": attempt("open('/x{n}', 'w')"),
    "read mull": attempt("import mull"),
    "list packages": attempt(
        "import sys, os\nassert any(os.listdir(p) for p in sys.path if p.endswith('site-packages'))\nassert any(p.endswith('site-packages') for p in sys.path)"
    ),
    "climb out": attempt("open('../' * 20 + 'etc/shadow').read()"),
    "symlink race": attempt("import os\nos.symlink('/etc/passwd', 'link{n}')\nopen('link{n}').read()"),
    "hard link": attempt("import os\nos.link('/usr/lib/os-release', 'link{n}')"),
    "device": attempt("import os, stat\nos.mknod('disk{n}', stat.S_IFBLK | 0o600, os.makedev(254, 0))"),
    # processes
    "fork": attempt("import os\nif os.fork() == 0: os._exit(0)"),
    "fork bomb": attempt("import os\nwhile True: os.fork()"),
    "vfork by spawn": attempt("import os, sys\nos.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})"),
    "subprocess": attempt("import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)"),
    "leftover daemon": attempt(
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\n    os._exit(0)"
    ),
    "thread bomb": attempt(
        "import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    ),
    "deadlocked threads": "import threading\nlock = threading.Lock()\nlock.acquire()\n"
    "[threading.Thread(target=lock.acquire).start() for _ in range(5)]\ndef f():\n    lock.acquire()\n",
    "kill everybody": attempt("import os, signal\nos.kill(-1, signal.SIGKILL)\nassert os.getppid() > 1"),
    "kill parent": attempt(
        "import os, signal, time\nfor _ in range(50):\n    os.kill(os.getppid(), signal.SIGKILL)\n    time.sleep(0.01)\nassert os.getppid() > 1"
    ),
    "stop parent": attempt("import os, signal\nos.kill(os.getppid(), signal.SIGSTOP)\nassert os.getppid() > 1"),
    "kill a process of the host": attempt(
        "import os, signal\nfor pid in range(3, 4000): \n    try: os.kill(pid, signal.SIGKILL); break\n    except ProcessLookupError: pass\nelse: assert False"
    ),
    "ignore signals": "import signal\nfor s in range(1, 32):\n    if s not in (9, 19): signal.signal(s, lambda *a: None)\ndef f():\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass\n",
    "own death": "import os, signal\ndef f():\n    os.kill(os.getpid(), signal.SIGKILL)\n",
    # kernel
    "ptrace": syscall(101, 16, 1, 0, 0),
    "read memory of others": syscall(310, 1, 0, 0, 0, 0, 0),
    "mount": syscall(165, 0, 0, 0, 0, 0),
    "umount": attempt("assert libc.umount2(b'/tmp', 2) == 0", LIBC),
    "unshare user": syscall(272, 0x10000000),
    "clone user": syscall(56, 0x10000000 | 17, 0, 0, 0, 0),
    "clone3": syscall(435, 0, 0),
    "setns": syscall(308, 0, 0),
    "chroot": attempt("import os\nos.chroot('/tmp')"),
    "pivot root": syscall(155, 0, 0),
    "keyring": syscall(250, 0, -3, 1),
    "add key": attempt("assert libc.syscall(248, b'user', b'x{n}', b'y', 1, -3) >= 0", LIBC),
    "io_uring": syscall(425, 8, 0),
    "bpf": syscall(321, 0, 0, 0),
    "perf": syscall(298, 0, 0, -1, -1, 0),
    "userfaultfd": syscall(323, 1),
    "memfd": attempt("import os\nos.memfd_create('x{n}')"),
    "shared memory": attempt("assert libc.shmget(0, ctypes.c_size_t(1 << 34), 0o1600) >= 0", LIBC),
    "message queue": syscall(68, 0, 0o1600),
    "reboot": syscall(169, 0xFEE1DEAD - (1 << 32), 672274793, 0, 0),
    "module": syscall(175, 0, 0, 0),
    "open by handle": syscall(304, 0, 0, 0),
    "x32 call": syscall(0x40000000 | 39),
    "personality": syscall(135, 0x0040000),
    "own user again": attempt("import os\nos.setuid(0)"),
    "setuid file": attempt("import os\nopen('s{n}', 'w').close()\nos.chmod('s{n}', 0o4755)\nos.execv('s{n}', ['s'])"),
    "host name": attempt("import socket\nsocket.sethostname('evil{n}')"),
    "priority": attempt("import os\nos.nice(-5)"),
    "raise limits": attempt("import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))"),
    "limits of others": attempt("import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (1, 1))"),
    "terminal": attempt("open('/dev/tty', 'w').write('x')"),
    "type into the terminal": attempt("import fcntl\nfcntl.ioctl(0, 0x5412, b'x')"),
    "proc of others": attempt("open('/proc/1/environ').read()"),
    "environment": attempt(
        "import os\nassert any(name in os.environ for name in ('HOME', 'PATH', 'USER', 'MULL_SANDBOX_PROBE'))"
    ),
    # amounts
    "memory": attempt("x = bytearray(8 << 30)"),
    "memory in small pieces": attempt("x = []\nwhile True: x.append(bytearray(1 << 20))"),
    "disk": attempt("with open('big', 'wb') as file:\n    for _ in range(1 << 12): file.write(bytes(1 << 16))"),
    "many files": "def f():\n    n = 0\n    while True:\n        open('file' + str(n), 'w').close(); n += 1\n",
    "deep folders": attempt("import os\nwhile True:\n    os.mkdir('d'); os.chdir('d')"),
    "open files": attempt("import os\nx = [os.dup(2) for _ in range(10_000)]"),
    "pipes": attempt("import os\nx = [os.pipe() for _ in range(10_000)]"),
    "endless loop": "def f():\n    while True: pass\n",
    "endless loop while loading": "while True: pass\n",
    "sleep": "import time\ndef f():\n    time.sleep(3600)\n",
    "output flood": "def f():\n    while True: print('x' * 100_000, flush=True)\n",
    "error flood": "import os\ndef f():\n    while True: os.write(2, b'x' * 100_000)\n",
    "huge int": "def f():\n    return 10 ** (10 ** 9)\n",
    "slow int": "def f():\n    return len(str(3 ** (10 ** 7)))\n",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef f():\n    return f()\n",
    "deep recursion in C": "import sys\nsys.setrecursionlimit(10 ** 9)\nclass A:\n    def __repr__(self): return repr(self)\ndef f():\n    return repr(A())\n",
    "deep result": "def f():\n    x = []\n    for _ in range(10 ** 6): x = [x]\n    return x\n",
    "endless iterator": "import itertools\ndef f():\n    return itertools.count()\n",
    "huge result": "def f():\n    return 'x' * (200 << 20)\n",
    "regular expression": "import re\ndef f():\n    return re.match('(a+)+$', 'a' * 50 + 'b')\n",
    "crash": "import ctypes\ndef f():\n    ctypes.string_at(0)\n",
}

# The line to the grader
LINE = "import os\nfor fd in range(3, 64):\n    try: os.fstat(fd); break\n    except OSError: pass\n"
HOSTILE |= {
    "garbage to the grader": LINE + "def f():\n    os.write(fd, os.urandom(1 << 16))\n    os._exit(0)\n",
    "endless message": LINE
    + "def f():\n    os.write(fd, (1 << 24).to_bytes(4, 'big'))\n    while True: os.write(fd, b'l' * 65536)\n",
    "list bomb": LINE
    + "def f():\n    data = b'l99999999:' + b'l0:' * 5000000\n    os.write(fd, len(data).to_bytes(4, 'big'))\n"
    "    while data: data = data[os.write(fd, data):]\n    os._exit(0)\n",
    "close the line": LINE + "def f():\n    os.close(fd)\n    while True: pass\n",
}

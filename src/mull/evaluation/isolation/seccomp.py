"""The system calls that a program in the sandbox may make, as a filter for the kernel (seccomp, classic BPF).

The list allows; what it does not name fails with ``EPERM``. The kernel checks the filter, bubblewrap installs it. We compile it
ourselves because libseccomp is not on every machine; a test compares our numbers with it where it is.
"""

import errno
import platform
import struct

_TABLE = """
read:0:63 write:1:64 open:2:- openat:257:56 close:3:57 close_range:436:436 stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79
statx:332:291 poll:7:- ppoll:271:73 lseek:8:62 mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 mremap:25:216
madvise:28:233 msync:26:227 mincore:27:232 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132 pread64:17:67 pwrite64:18:68
readv:19:65 writev:20:66 access:21:- faccessat:269:48 faccessat2:439:439 pipe:22:- pipe2:293:59 select:23:- pselect6:270:72
sched_yield:24:124 dup:32:23 dup2:33:- dup3:292:24 nanosleep:35:101 clock_nanosleep:230:115 getitimer:36:102
setitimer:38:103 alarm:37:- pause:34:- getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175
getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 setresuid:117:147 setresgid:119:149
getpgrp:111:- getpgid:121:155 getsid:124:156 umask:95:166 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95
kill:62:129 tkill:200:130 tgkill:234:131 uname:63:160 fcntl:72:25 flock:73:32 fsync:74:82 fdatasync:75:83 truncate:76:45
ftruncate:77:46 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 rename:82:- renameat:264:38
renameat2:316:276 mkdir:83:- mkdirat:258:34 rmdir:84:- link:86:- linkat:265:37 unlink:87:- unlinkat:263:35 symlink:88:-
symlinkat:266:36 readlink:89:- readlinkat:267:78 chmod:90:- fchmod:91:52 fchmodat:268:53 utimensat:280:88
gettimeofday:96:169 time:201:- clock_gettime:228:113 clock_getres:229:114 times:100:153 getrusage:98:165 sysinfo:99:179
getrlimit:97:163 setrlimit:160:164 getpriority:140:141 sched_getaffinity:204:123 sched_getparam:143:121
sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126 getcpu:309:168 arch_prctl:158:-
futex:202:98 set_robust_list:273:99 get_robust_list:274:100 set_tid_address:218:96 rseq:334:293 restart_syscall:219:128
membarrier:324:283 getrandom:318:278 sendfile:40:71 fallocate:285:47 fadvise64:221:223 statfs:137:43 fstatfs:138:44
sendto:44:206 recvfrom:45:207 sendmsg:46:211 recvmsg:47:212 shutdown:48:210 getsockname:51:204 getpeername:52:205
getsockopt:55:209 setsockopt:54:208 epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:- epoll_pwait:281:22
eventfd2:290:19 timerfd_create:283:85 timerfd_settime:286:86 timerfd_gettime:287:87 execve:59:221
ioctl:16:29 prctl:157:167 prlimit64:302:261 socketpair:53:199 clone:56:220 clone3:435:435 fork:57:- vfork:58:-
"""
"""``name:number on x86-64:number on AArch64``. ``socket`` is not here: the container has no network, and no use for one.
``execve`` is, because bubblewrap starts Python under the filter; a program gains nothing by another start of the same Python."""

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column of the table, and the kernel's number of the architecture (``AUDIT_ARCH_…``)."""

_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16

_X32 = 0x40000000
"""Calls of the x32 interface begin here. Their numbers would pass a filter that checks the others only."""

_CLONE_THREAD = 0x00010000
_CLONE_NAMESPACES = 0x7E020080
"""Every ``CLONE_NEW…``."""

_AF_UNIX = 1
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Is it a terminal, its size, bytes to read, non-blocking, close on exec or not."""

_PRCTLS = (15, 16, 0x53564D41)
"""Set and read the name of a thread; name a piece of memory, as the C library does."""

_SPECIAL = ("ioctl", "prctl", "prlimit64", "socketpair", "clone", "clone3", "fork", "vfork")
"""Calls whose arguments decide."""

Instruction = tuple[int, int, int, int]


def syscall_numbers(machine: str) -> dict[str, int]:
    """Allowed calls and their numbers on a machine, such as ``"x86_64"``.

    Raises:
        ValueError: we have no table for it.
    """
    if machine not in _ARCHITECTURES:
        raise ValueError(f"There is no list of system calls for {machine}; there are those for x86_64 and aarch64.")
    column = _ARCHITECTURES[machine][0]
    rows = [entry.split(":") for entry in _TABLE.split()]
    return {name: int(numbers[column]) for name, *numbers in rows if numbers[column] != "-"}


def _error(number: int) -> Instruction:
    return (_RETURN, 0, 0, _ERROR | number)


def _only(argument: int, values: tuple[int, ...]) -> list[Instruction]:
    """Allow these values of the lower half of an argument, which the kernel reads as 32 bits in all calls here."""
    body: list[Instruction] = [(_LOAD, 0, 0, _ARGUMENTS + 8 * argument)]
    for place, value in enumerate(values):
        body.append((_EQUAL, len(values) - place, 0, value))
    return [*body, _error(errno.EPERM), (_RETURN, 0, 0, _ALLOW)]


def _special(name: str, *, may_fork: bool) -> list[Instruction]:
    if name == "ioctl":
        return _only(1, _IOCTLS)
    if name == "prctl":
        return _only(0, _PRCTLS)
    if name == "socketpair":
        return _only(0, (_AF_UNIX,))
    if name == "prlimit64":
        return _only(0, (0,))  # its own limits, which it can only lower
    if name == "clone3":
        # Its flags lie in memory, where a filter cannot look. The C library then uses clone.
        return [_error(errno.ENOSYS)]
    if name in ("fork", "vfork"):
        return [(_RETURN, 0, 0, _ALLOW) if may_fork else _error(errno.EPERM)]
    flags: Instruction = (_LOAD, 0, 0, _ARGUMENTS)
    no_namespaces: Instruction = (_BITS, 2 if not may_fork else 1, 0, _CLONE_NAMESPACES)
    if may_fork:
        return [flags, no_namespaces, (_RETURN, 0, 0, _ALLOW), _error(errno.EPERM)]
    return [flags, no_namespaces, (_BITS, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), _error(errno.EPERM)]


def compile_filter(*, may_fork: bool = False, machine: str | None = None) -> bytes:
    """The filter as bubblewrap reads it: an array of ``struct sock_filter``.

    Args:
        may_fork: False refuses new processes; threads remain possible.
        machine: Architecture; this machine's if None.

    Raises:
        ValueError: there is no table for this machine.
    """
    machine = machine or platform.machine()
    numbers = syscall_numbers(machine)
    program: list[Instruction] = [
        (_LOAD, 0, 0, _ARCHITECTURE),
        (_EQUAL, 1, 0, _ARCHITECTURES[machine][1]),
        (_RETURN, 0, 0, _KILL),  # a 32-bit program would use other numbers
        (_LOAD, 0, 0, _NUMBER),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for name, number in numbers.items():
        body = _special(name, may_fork=may_fork) if name in _SPECIAL else [(_RETURN, 0, 0, _ALLOW)]
        program += [(_EQUAL, 0, len(body), number), *body]
    program.append(_error(errno.EPERM))
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)

"""The system calls that a program may make: an allow-list as a seccomp-BPF program, put together and installed by hand.

An allow-list, not a deny-list: the kernel gains system calls with every release, a list of what is dangerous is out of date
on the day it is written, and a program that only computes needs about a hundred of them, which CPython's own code and the C
library bound. What is not listed answers EPERM; a program may catch that and go on, it has just not got anywhere. `clone3`
answers ENOSYS, upon which the C library tries `clone` and gets its EPERM. Another architecture's entry (32-bit code, x32)
kills the process, since the numbers would mean something else there.

Left out on purpose, beside the obvious (socket, connect, ptrace, process_vm_*, pidfd_*, mount, keyctl, bpf, io_uring_*,
perf_event_open, execve, unshare, setns, memfd_create, shm*, mq_*):

- clone, fork, vfork: no process and no thread. RLIMIT_NPROC counts per user, with all of the trainer's threads.
- chmod, chown, utimensat, setxattr, truncate by path, link, symlink, mkdir: the program's user owns the trainer's files too,
  and Landlock does not look at the first four.
- prctl, setpriority, sched_set*, ioprio_set: what they change for a process of the same user needs no further right.
"""

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable

BOTH: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "readv": (19, 65),
    "writev": (20, 66),
    "lseek": (8, 62),
    "open": (2, None),
    "openat": (257, 56),
    "close": (3, 57),
    "fstat": (5, 80),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getdents64": (217, 61),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "ftruncate": (77, 46),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "flock": (73, 32),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "msync": (26, 227),
    "getrandom": (318, 278),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrusage": (98, 165),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getgroups": (115, 158),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "restart_syscall": (219, 128),
    "umask": (95, 166),
    "getrlimit": (97, 163),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigsuspend": (130, 133),
    "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132),
    "alarm": (37, None),
    "pause": (34, None),
    "setitimer": (38, 103),
    "getitimer": (36, 102),
    "futex": (202, 98),
    "sendfile": (40, 71),
    "fadvise64": (221, 223),
    "recvfrom": (45, 207),
    "fcntl": (72, 25),
    "ioctl": (16, 29),
    "kill": (62, 129),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),
    "socketpair": (53, 199),
    "sendto": (44, 206),
    "clone3": (435, 435),
}
"""Numbers on x86-64 and on arm64 (the generic table); None where the call does not exist."""
FILES = frozenset(
    "open openat getdents64 unlink unlinkat rename renameat renameat2".split()  # noqa: SIM905
)
"""Left out where Landlock is missing: no file is opened at all then."""
_TCGETS, _FIOCLEX, _FIONBIO, _FIONREAD = 0x5401, 0x5451, 0x5421, 0x541B
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030)
"""F_DUPFD to F_SETLKW and F_DUPFD_CLOEXEC. F_SETOWN and F_SETSIG are missing: with O_ASYNC they send any signal to any process
of the same user, past every filter of `kill`."""
_AF_UNIX = 1
_DENY_NOSYS = ("clone3",)
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""AUDIT_ARCH_* and the column of the table."""
_X32_BIT = 0x40000000
_LD, _JEQ, _JGE, _RET = 0x20, 0x15, 0x35, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NR, _ARCH, _ARGS = 0, 4, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
Instruction = tuple[int, int, int, int]


def conditions(pid: int) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Calls that are allowed for some values of one argument: its index and those values (low 32 bits; 0 means all 64)."""
    return {
        "kill": (0, (pid,)),
        "tgkill": (0, (pid,)),  # abort() and raise() of the program itself
        "prlimit64": (0, (0,)),  # one's own limits, never those of another process of the same user
        "fcntl": (1, _FCNTL),
        "ioctl": (1, (_TCGETS, _FIOCLEX, _FIONBIO, _FIONREAD)),
        "socketpair": (0, (_AF_UNIX,)),  # asyncio wakes itself up through one
        "sendto": (4, (0,)),  # without an address: the other end of such a pair
    }


def assemble(pid: int, *, files: bool = True, machine: str | None = None) -> bytes:
    """The filter for a process.

    Args:
        pid: the program's own process, the only one that it may signal.
        files: whether files may be opened; Landlock then says which.
        machine: as `platform.machine()` says it; None: this machine.

    Raises:
        KeyError: an architecture that is not in the table.
    """
    arch, column = ARCHITECTURES[machine or platform.machine()]
    checks = conditions(pid)
    code: list[Instruction] = [(_LD, 0, 0, _ARCH), (_JEQ, 1, 0, arch), (_RET, 0, 0, _KILL), (_LD, 0, 0, _NR)]
    if column == 0:
        code += [(_JGE, 0, 1, _X32_BIT), (_RET, 0, 0, _KILL)]
    for name, numbers in BOTH.items():
        number = numbers[column]
        if number is None or (not files and name in FILES):
            continue
        if name in _DENY_NOSYS:
            body: list[Instruction] = [(_RET, 0, 0, _ERRNO | errno.ENOSYS)]
        elif name in checks:
            body = _check(*checks[name])
        else:
            body = [(_RET, 0, 0, _ALLOW)]
        code += [(_JEQ, 0, len(body), number), *body]
    code.append((_RET, 0, 0, _ERRNO | errno.EPERM))
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def _check(index: int, values: Iterable[int]) -> list[Instruction]:
    """Allows the call if the argument has one of the values; a value of 0 is compared in full, since it may be a pointer's."""
    low = _ARGS + 8 * index
    body: list[Instruction] = []
    for value in values:
        if value == 0 and index == 4:
            body += [(_LD, 0, 0, low + 4), (_JEQ, 0, 3, 0), (_LD, 0, 0, low), (_JEQ, 0, 1, 0), (_RET, 0, 0, _ALLOW)]
        else:
            body += [(_LD, 0, 0, low), (_JEQ, 0, 1, value), (_RET, 0, 0, _ALLOW)]
    return [*body, (_RET, 0, 0, _ERRNO | errno.EPERM)]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


def no_new_privileges() -> None:
    """Forbids this process and its children to gain rights; what Landlock and seccomp ask for.

    Raises:
        OSError: the kernel refuses.
    """
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def install(filter_bytes: bytes) -> None:
    """Puts the filter on this thread, for good.

    Raises:
        OSError: the kernel has no seccomp filters, or `no_new_privileges` was not called.
    """
    buffer = ctypes.create_string_buffer(filter_bytes, len(filter_bytes))
    program = _Program(len(filter_bytes) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    _prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.addressof(program))


def available() -> bool:
    """Whether this kernel and architecture have filters, asked without installing one (a null filter answers EFAULT)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if platform.machine() not in ARCHITECTURES:
        return False
    libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT


def _prctl(option: int, value: int, pointer: int = 0) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    words = map(ctypes.c_ulong, (option, value, pointer, 0, 0))
    if libc.prctl(*words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")

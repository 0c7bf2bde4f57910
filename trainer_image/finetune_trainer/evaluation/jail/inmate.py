"""The child: takes its own rights, one after the other, and then becomes the program. Nothing is given back.

The order matters: what needs a right comes before that right goes. The system-call filter is last, and from then on the
process can only compute, read the standard library, and write into its own folder.
"""

import contextlib
import ctypes
import os
import random
import resource
import signal
import struct
import sys
import sysconfig
import types
from typing import Any

from finetune_trainer.evaluation.jail import landlock, seccomp

PR_SET_PDEATHSIG = 1
_CAPSET = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION = 0x20080522
_NEW_NAMESPACES = 0x10000000 | 0x40000000 | 0x08000000
"""CLONE_NEWUSER, NEWNET, NEWIPC."""
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
"""Code that extension modules load; nothing of the job is there."""
PRELOADED = (
    "abc array ast base64 bisect calendar cmath collections colorsys contextlib copy csv dataclasses datetime decimal difflib "
    "enum fractions functools hashlib heapq html io itertools json keyword math numbers operator pprint queue random re "
    "secrets statistics string struct textwrap time traceback types typing unicodedata unittest uuid"
)
"""Imported beforehand where files cannot be opened; names with spaces between them."""


def become(request: dict[str, Any], output: int, result: int) -> None:
    """Runs the program in this process; does not return.

    Writes to `result`: `ready` once all rights are gone, then the request's token and `passed` if the program came to its end,
    or the error that ended it. Anything before `ready` is the sandbox's own failure.
    """
    limits: dict[str, int] = request["limits"]
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # the supervisor's death
        null = os.open(os.devnull, os.O_RDWR)
        result = _only(null, output, result)
        os.chdir(request["folder"])
        if request["user_namespace"]:
            enter_namespaces()
        _limit(limits)
        drop_capabilities()
        _forget()
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        random.seed(0)  # the verdict of a program that draws numbers does not change from run to run
        programs = request["programs"]
        seccomp.no_new_privileges()
        if request["landlock"]:
            landlock.restrict(rights(request["folder"]))
        if request["seccomp"]:
            seccomp.install(seccomp.assemble(os.getpid(), files=bool(request["landlock"])))
        os.write(result, b"ready\n")
    except BaseException as error:
        os.write(result, f"the sandbox could not be closed: {type(error).__name__}: {error}".encode())
        os._exit(1)
    try:
        exec(_first_that_compiles(programs), module.__dict__)
        answer = "passed"
    except MemoryError:
        answer = "MemoryError"  # no allocation for a message
    except BaseException as error:
        answer = f"{type(error).__name__}: {error}"[:500]
    os.write(result, f"{request['token']} {answer}".encode(errors="replace"))
    os._exit(0)


def _first_that_compiles(programs: list[str]) -> types.CodeType:
    """Compiled here, not by the trainer: text can bring a parser down too."""
    for text in programs[:-1]:
        with contextlib.suppress(SyntaxError):
            return compile(text, "<program>", "exec")
    return compile(programs[-1], "<program>", "exec")


def rights(folder: str) -> dict[str, int]:
    """What may be opened: the standard library, the libraries under it, three devices, and the program's own folder."""
    stdlib = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    return {
        **dict.fromkeys((*SYSTEM_LIBRARIES, *stdlib, "/dev/zero", "/dev/urandom"), landlock.READ),
        os.devnull: landlock.READ_FILE | landlock.WRITE_FILE,
        folder: landlock.PRIVATE,
    }


def enter_namespaces() -> None:
    """A user, network and IPC namespace of its own: there is no network in it at all, not even loopback.

    Raises:
        OSError: the kernel or the container runtime does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_NAMESPACES) != 0:
        raise OSError(ctypes.get_errno(), "unshare: " + os.strerror(ctypes.get_errno()))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
            file.write(text)


def drop_capabilities() -> None:
    """Root's (in a run on one's own machine) and those that a new user namespace gives."""
    header = struct.pack("=Ii", _CAPABILITY_VERSION, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(_CAPSET[os.uname().machine], header, bytes(24)) != 0:
        raise OSError(ctypes.get_errno(), "capset: " + os.strerror(ctypes.get_errno()))


def _only(null: int, output: int, result: int) -> int:
    """Keeps null, output, output and `result` as 0 to 3 and closes every other descriptor."""
    result = os.dup2(result, 63, inheritable=False)
    for number, source in enumerate((null, output, output)):
        os.dup2(source, number)
    os.dup2(result, 3, inheritable=False)
    os.closerange(4, 65536)
    return 3


def _limit(limits: dict[str, int]) -> None:
    for number, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, limits["cpu_seconds"]),  # soft = hard: SIGKILL, which cannot be handled
        (resource.RLIMIT_FSIZE, limits["file_bytes"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_NPROC, 0),  # for what a filter does not catch; it does not hold root
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        resource.setrlimit(number, (value, value))


def _forget() -> None:
    """An empty environment, and no way to the trainer's code."""
    os.environ.clear()
    stdlib = sysconfig.get_path("stdlib")
    sys.path[:] = [path for path in sys.path if path == stdlib or path.startswith(stdlib + "/")]
    for name in [name for name in sys.modules if name.split(".")[0] == "finetune_trainer"]:
        del sys.modules[name]

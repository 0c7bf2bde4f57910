"""Which files a program may open, by Landlock: everything is refused but what is listed. Also TCP and, later, signals.

The kernel's interface grows by versions ("ABI"): 1 files; 2 links across folders; 3 truncation; 4 TCP; 5 ioctl of devices;
6 signals and abstract Unix sockets to processes outside. What a version does not know, seccomp refuses (see `seccomp`).
"""

import ctypes
import os
import struct
from collections.abc import Mapping

_CREATE, _ADD, _RESTRICT = 444, 445, 446
"""The same numbers on all architectures."""
_VERSION_FLAG, _PATH_BENEATH = 1, 1
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14
READ = READ_FILE | READ_DIR
PRIVATE = READ | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
"""Regular files in one flat folder: no folder, link, socket, pipe or device can be made, so it is cleaned by a simple loop."""
_OF_FILES = WRITE_FILE | READ_FILE | TRUNCATE
_FS_BITS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_ALL_TCP = 0b11
_ALL_SCOPES = 0b11


def abi() -> int:
    """The version of this kernel's Landlock; 0: none, or a container runtime that refuses its system calls."""
    version: int = _libc().syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION_FLAG))
    return max(0, version)


def restrict(allowed: Mapping[str, int]) -> int:
    """Takes this process's access to all files but some, all of TCP, and signals to processes outside, for good.

    Args:
        allowed: a path, which need not exist, and the rights beneath it.

    Returns:
        The version that was used.

    Raises:
        OSError: the kernel has no Landlock or refuses a rule.
    """
    version = abi()
    handled = (1 << _FS_BITS[min(version, 5)]) - 1 if version else 1
    attributes = struct.pack("=Q", handled)
    if version >= 4:
        attributes += struct.pack("=Q", _ALL_TCP)
    if version >= 6:
        attributes += struct.pack("=Q", _ALL_SCOPES)
    ruleset = _call(_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    for path, rights in allowed.items():
        _allow(ruleset, path, rights & handled)
    _call(_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)
    return version


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):  # noqa: PTH112 (pathlib would be one more import in every jail)
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, place)
        _call(_ADD, ctypes.c_int(ruleset), ctypes.c_int(_PATH_BENEATH), rule, ctypes.c_uint32(0))
    finally:
        os.close(place)


def _call(number: int, *arguments: object) -> int:
    result: int = _libc().syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock (system call {number}): {os.strerror(code)}")
    return result


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)

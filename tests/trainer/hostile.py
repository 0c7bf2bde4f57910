"""Hostile programs, a stage with something to lose, and what stopped each.

    PYTHONPATH=operator:trainer_image:. python -m tests.trainer.hostile --document     writes the table of docs/sandbox.md
    ... python -m tests.trainer.hostile --json [--as-in-a-pod] [--no-landlock]        the same for the test

A program that comes to its end, or after which the stage has lost something, has had its effect. Standard library only, so
that it also runs as another user than the tests' own.
"""

import errno
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from finetune_trainer.evaluation.jail import seccomp
from finetune_trainer.evaluation.sandbox import Limits, Protection, Sandbox, base_python, find_protection

SECRET = "hf_secretsecretsecret"
SHM = Path(f"/dev/shm/finetune-hostile-{os.getpid()}")
LIMITS = Limits(cpu_seconds=1, wall_seconds=60.0)
SLEEPER = replace(LIMITS, wall_seconds=0.5)
"""A busy machine must not decide which limit is met first."""
SECCOMP, LANDLOCK, RLIMIT, WATCH, EMPTY = "seccomp", "Landlock", "resource limit", "supervisor", "nothing is there"


@dataclass(frozen=True)
class Hostile:
    """One program. `@NAME@` in its text becomes something of the stage."""

    name: str
    program: str
    stopped_by: str
    says: str
    """A part of the verdict's reason: the mechanism's own words."""
    control: bool = True
    """Whether it is harmless enough to show that without a sandbox it does have its effect."""
    without_landlock: str = ""
    """What it says where the kernel has no Landlock; empty: the same."""


def _ctypes(body: str) -> str:
    return (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(*a):\n"
        "    r = libc.syscall(*[ctypes.c_long(x) if isinstance(x, int) else x for x in a])\n"
        "    if r < 0: raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))\n"
        "    return r\n" + body
    )


DENIED, NO_FILES = "Permission denied", "Operation not permitted"
"""EACCES is what Landlock answers, EPERM is what the filter answers."""


def _file(name: str, program: str, control: bool = True) -> Hostile:
    return Hostile(name, program, LANDLOCK, DENIED, control, NO_FILES)


def _call(name: str, program: str, control: bool = True, without_landlock: str = "") -> Hostile:
    return Hostile(name, program, SECCOMP, NO_FILES, control, without_landlock)


HOSTILE = [
    _call("fork bomb", "import os\nwhile True: os.fork()", control=False),
    _call("fork bomb through raw system calls", _ctypes("while True: call(@fork@, 17, 0, 0, 0, 0)"), control=False),
    _call(
        "daemon (double fork, setsid)",
        "import os, time\nif os.fork() == 0:\n os.setsid()\n if os.fork() == 0: time.sleep(60)",
        control=False,
    ),
    Hostile(
        "thread bomb",
        "import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()",
        SECCOMP,
        "can't start new thread",
    ),
    _call(
        "a shell through subprocess",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', ':'], check=True)",
        without_landlock="PermissionError",
    ),
    _call("a shell through posix_spawn", "import os\nos.posix_spawn('/bin/sh', ['sh', '-c', ':'], {})"),
    _call("exec", "import os\nos.execv('/bin/true', ['true'])"),
    Hostile("memory bomb", "x = []\nwhile True: x.append(bytearray(2**28))", RLIMIT, "MemoryError", control=False),
    Hostile(
        "memory bomb through mmap",
        "import mmap\nx = []\nwhile True: x.append(mmap.mmap(-1, 2**26))",
        RLIMIT,
        "Cannot allocate memory",
        control=False,
        without_landlock="No module named 'mmap'|Cannot allocate memory|not permitted",
    ),
    _call("memory outside of the address space (memfd)", "import os\nos.write(os.memfd_create('x'), bytes(2**20))"),
    _call("shared memory (System V)", _ctypes("call(@shmget@, 0, 4096, 0o1600)"), control=False),
    Hostile("endless loop", "while True: pass", RLIMIT, "of CPU time", control=False),
    Hostile(
        "endless loop that ignores signals",
        "import signal\nfor n in range(1, 32):\n try: signal.signal(n, signal.SIG_IGN)\n except OSError: pass\nwhile True: pass",
        RLIMIT,
        "of CPU time",
        control=False,
    ),
    Hostile("sleeping for ever", "import time\ntime.sleep(10**6)", WATCH, "ran for more than", control=False),
    Hostile("busy output", "while True: print('x' * 65536)", WATCH, "of output", control=False),
    Hostile(
        "deep recursion",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        RLIMIT,
        "MemoryError|SIGSEGV|of CPU time",
        control=False,
    ),
    Hostile(
        "raising its own limits",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = bytearray(2**33)",
        RLIMIT,
        "not allowed to raise",
        control=False,
        without_landlock="not allowed to raise|No module",
    ),
    _call(
        "network: TCP",
        "import socket\nsocket.create_connection(('127.0.0.1', @PORT@)).sendall(b'x')",
        without_landlock="PermissionError|No module|gaierror|not permitted",
    ),
    _call("network: UDP", "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', @PORT@))"),
    Hostile(
        "network: DNS",
        "import socket\nsocket.getaddrinfo('localhost', 80)",
        f"{SECCOMP} and {LANDLOCK}",
        "gaierror",
        without_landlock="gaierror|not permitted",
    ),
    _call(
        "network: Unix socket",
        "import socket\ns = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)\ns.sendto(b'x', '@UNIX@')",
    ),
    _call(
        "network: an allowed pair of sockets turned outwards",
        "import socket\na, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)\na.sendto(b'x', '@UNIX@')",
    ),
    Hostile("its own environment", "import os\nos.environ['SECRET_TOKEN']", EMPTY, "KeyError"),
    _file("its own environment through /proc", "assert b'@SECRET@' in open('/proc/self/environ', 'rb').read()"),
    _file(
        "the parent's environment",
        "import os\nassert b'PATH' in open(f'/proc/{os.getppid()}/environ', 'rb').read()",
        control=False,
    ),
    _file("another process's environment", "assert b'@SECRET@' in open('/proc/@VICTIM@/environ', 'rb').read()"),
    _file("another process's memory", "open('/proc/@VICTIM@/mem', 'rb')"),
    _file("another process's memory map", "open('/proc/@VICTIM@/maps').read()"),
    _call("process_vm_readv", _ctypes("call(@process_vm_readv@, @VICTIM@, 0, 0, 0, 0, 0)")),
    _call(
        "ptrace",
        _ctypes(
            "call(@ptrace@, 16, @VICTIM@, 0, 0)\nos.waitpid(@VICTIM@, 0x40000000)\ncall(@ptrace@, 17, @VICTIM@, 0, 0)"
        ),
    ),
    _file("a secret's file", "open('@FOLDER@/token').read()"),
    _file("a secret's file by a relative path", "import os\nopen(os.path.relpath('@FOLDER@/token')).read()"),
    _file(
        "a secret's file through O_PATH and /proc/self/fd",
        "import os\nn = os.open('@FOLDER@/token', os.O_PATH)\nopen(f'/proc/self/fd/{n}').read()",
    ),
    _call("a symbolic link to it", "import os\nos.symlink('@FOLDER@/token', 'mine')\nopen('mine').read()"),
    _call("a hard link to it", "import os\nos.link('@FOLDER@/token', '@FOLDER@/mine')"),
    Hostile(
        "moving it into its own folder",
        "import os\nos.rename('@FOLDER@/loose', 'loose')",
        LANDLOCK,
        "cross-device link|Permission denied",
        control=False,
        without_landlock=NO_FILES,
    ),
    _file("listing a folder", "import os\nassert os.listdir('@FOLDER@')"),
    _file("the pod's service account and passwd", "open('/etc/passwd').read()"),
    _file("writing outside", "open('@FOLDER@/new', 'w').write('x')"),
    _file("overwriting a file", "open('@FOLDER@/loose', 'w').write('x')"),
    _file("appending to a file", "open('@FOLDER@/loose', 'a').write('x')"),
    _file("truncating through a read-only open", "import os\nos.open('@FOLDER@/loose', os.O_RDONLY | os.O_TRUNC)"),
    _call("truncating by path", "import os\nos.truncate('@FOLDER@/loose', 0)"),
    _file("deleting a file", "import os\nos.unlink('@FOLDER@/loose')"),
    _file("deleting a folder", "import shutil\nshutil.rmtree('@FOLDER@/tree')"),
    _call("changing a file's mode", "import os\nos.chmod('@FOLDER@/loose', 0)"),
    _call("changing a file's times", "import os\nos.utime('@FOLDER@/loose', (0, 0))"),
    _call("changing its own folder's mode", "import os\nos.chmod('.', 0)"),
    _file("writing to /dev/shm", f"open('{SHM}', 'w').write('x')"),
    _file("a terminal", "open('/dev/tty', 'w')", control=False),
    Hostile(
        "a huge file",
        "f = open('x', 'wb')\nwhile True: f.write(bytes(2**20))",
        RLIMIT,
        "File too large",
        control=False,
        without_landlock=NO_FILES,
    ),
    Hostile(
        "many files",
        "for n in range(10**6): open(f'x{n}', 'w').close()\nwhile True: pass",
        WATCH,
        "wrote more than",
        control=False,
        without_landlock=NO_FILES,
    ),
    Hostile(
        "many open files",
        "x = []\nwhile True: x.append(open('/dev/null'))",
        RLIMIT,
        "Too many open files",
        control=False,
        without_landlock=NO_FILES,
    ),
    _call("a deep tree of folders", "import os\nwhile True:\n os.mkdir('x')\n os.chdir('x')", control=False),
    _call("a signal to its parent", "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)", control=False),
    _call("a signal to another process", "import os, signal\nos.kill(@VICTIM@, signal.SIGKILL)"),
    _call("a signal to all processes", "import os, signal\nos.kill(-1, signal.SIGKILL)", control=False),
    _call(
        "a signal through a process descriptor",
        "import os, signal\nsignal.pidfd_send_signal(os.pidfd_open(@VICTIM@), signal.SIGKILL)",
    ),
    _call(
        "a signal through rt_sigqueueinfo",
        _ctypes("call(@rt_sigqueueinfo@, @VICTIM@, 9, ctypes.create_string_buffer(128))"),
        control=False,
    ),
    _call(
        "a signal through asynchronous input and F_SETOWN",
        "import fcntl, os, socket\na, b = socket.socketpair()\nfcntl.fcntl(a, fcntl.F_SETOWN, @VICTIM@)\nfcntl.fcntl(a, 10, 9)\n"
        "fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC)\nb.send(b'x')",
        without_landlock=NO_FILES + "|No module",
    ),
    _call(
        "another process's limits",
        "import resource\nresource.prlimit(@VICTIM@, resource.RLIMIT_NOFILE, (8, 8))",
        without_landlock=NO_FILES + "|No module",
    ),
    _call("another process's priority", "import os\nos.setpriority(os.PRIO_PROCESS, @VICTIM@, 19)"),
    _call(
        "kernel interfaces (bpf, io_uring, perf, keyctl, mount, unshare, userfaultfd)",
        _ctypes(
            "n = 0\nfor nr in (@kernel@):\n try:\n  call(nr, 0, 0, 0, 0, 0)\n  n += 1\n except PermissionError: pass\n"
            " except OSError: n += 1\nif n == 0: raise PermissionError(1, 'Operation not permitted')"
        ),
        control=False,
    ),
    Hostile("leaving early to look successful", "import os\nos._exit(0)", WATCH, "left with exit code 0"),
    Hostile(
        "writing a success to every descriptor",
        "import os\nfor n in range(1, 9):\n try: os.write(n, b'passed')\n except OSError: pass\nos._exit(0)",
        WATCH,
        "left with exit code 0",
        False,
    ),
]
if os.uname().machine == "x86_64":
    HOSTILE.append(
        Hostile(
            "32-bit system calls",
            "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex('b814000000cd80c3'))\n"
            "ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()",
            SECCOMP,
            "killed by SIGSYS",
            control=False,
            without_landlock="SIGSYS|No module|not permitted",
        )
    )

NUMBERS: dict[str, tuple[str, str]] = {
    "@fork@": ("56", "220"),
    "@shmget@": ("29", "194"),
    "@process_vm_readv@": ("310", "270"),
    "@ptrace@": ("101", "117"),
    "@rt_sigqueueinfo@": ("129", "138"),
    "@kernel@": ("321, 425, 298, 250, 165, 272, 323", "280, 425, 241, 219, 40, 97, 282"),
}
"""System calls on x86-64 and arm64."""


@dataclass
class Row:
    """How one program ended."""

    name: str
    stopped_by: str
    passed: bool
    reason: str
    damage: list[str] = field(default_factory=list)
    """What the stage has lost."""
    seconds: float = 0.0


class Stage:
    """Files, sockets and a process that hostile programs would harm."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.victim: subprocess.Popen[bytes] | None = None
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.port = self.tcp.getsockname()[1]
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", self.port))
        self.unix = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.unix_path = folder.with_suffix(".sock")
        self.unix.bind(str(self.unix_path))
        for listener in (self.tcp, self.udp, self.unix):
            listener.setblocking(False)

    def set_up(self) -> None:
        """As new."""
        self.folder.parent.chmod(0o755)
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "tree" / "inner").mkdir(parents=True)
        (self.folder / "token").write_text(SECRET)
        (self.folder / "loose").write_text("something to lose")
        SHM.unlink(missing_ok=True)
        self.damage_of_sockets()
        if self.victim is None or self.victim.poll() is not None:
            command = [base_python(), "-S", "-c", "import time; time.sleep(600)"]
            self.victim = subprocess.Popen(command, env={"SECRET_TOKEN": SECRET}, start_new_session=True)
            while SECRET not in Path(f"/proc/{self.victim.pid}/environ").read_text():
                time.sleep(0.001)

    def program(self, text: str) -> str:
        """A program with the stage's names in it."""
        assert self.victim is not None
        for name, value in {
            "@FOLDER@": str(self.folder),
            "@SECRET@": SECRET,
            "@VICTIM@": str(self.victim.pid),
            "@PORT@": str(self.port),
            "@UNIX@": str(self.unix_path),
            **{name: both[os.uname().machine == "aarch64"] for name, both in NUMBERS.items()},
        }.items():
            text = text.replace(name, value)
        return text

    def damage(self) -> list[str]:
        """What is not as it was."""
        assert self.victim is not None
        folder, found = self.folder, self.damage_of_sockets()
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
        if names != ["loose", "token", "tree", "tree/inner"]:
            found.append(f"files {names}")
        else:
            loose = (folder / "loose").stat()
            if loose.st_size != 17 or loose.st_mode & 0o777 == 0 or loose.st_mtime < 1000:
                found.append(f"file changed {loose}")
        if SHM.exists():
            found.append("shared memory")
        time.sleep(0.002)
        status = self.victim.poll()
        if status is not None:
            found.append(f"the victim ended: {status}")
        else:
            limits = Path(f"/proc/{self.victim.pid}/limits").read_text()
            files = next(line for line in limits.splitlines() if line.startswith("Max open files"))
            if files.split()[3] == "8" or os.getpriority(os.PRIO_PROCESS, self.victim.pid) == 19:
                found.append("the victim's limits or priority")
                self.victim.kill()
                self.victim.wait()
        return found

    def damage_of_sockets(self) -> list[str]:
        """What has come in; it is read away."""
        found = []
        for name, listener in (("TCP", self.tcp), ("UDP", self.udp), ("Unix", self.unix)):
            try:
                if listener is self.tcp:
                    listener.accept()[0].close()
                else:
                    listener.recv(100)
                found.append(f"a message by {name}")
            except BlockingIOError:
                continue
        return found

    def close(self) -> None:
        if self.victim is not None:
            self.victim.kill()
            self.victim.wait()
        for listener in (self.tcp, self.udp, self.unix):
            listener.close()
        SHM.unlink(missing_ok=True)


def run_all(folder: Path, protection: Protection) -> list[Row]:
    """Every program in a sandbox (without Landlock, those for which that makes a difference); what it left is damage too."""
    stage, rows = Stage(folder / "stage"), []
    jails = folder / "jails"
    jails.mkdir()
    sandbox = Sandbox(jails, protection)
    os.environ["SECRET_TOKEN"] = SECRET
    try:
        for hostile in HOSTILE:
            if not protection.landlock and not hostile.without_landlock:
                continue
            stage.set_up()
            limits = SLEEPER if "sleep(" in hostile.program else LIMITS
            verdict = sandbox.run(stage.program(hostile.program), limits)
            damage = stage.damage()
            if left := [path.name for path in jails.iterdir()]:
                damage.append(f"left behind {left}")
            if verdict.strays:
                damage.append(f"{verdict.strays} strays")
            rows.append(
                Row(hostile.name, hostile.stopped_by, verdict.passed, verdict.reason, damage, verdict.wall_seconds)
            )
    finally:
        stage.close()
    return rows


def run_controls(folder: Path) -> dict[str, bool]:
    """The harmless ones among them without a sandbox: whether they have their effect."""
    stage, effects = Stage(folder / "stage"), {}
    environment = {"SECRET_TOKEN": SECRET}
    try:
        for hostile in HOSTILE:
            if hostile.control:
                stage.set_up()
                command = [base_python(), "-S", "-c", stage.program(hostile.program)]
                done = subprocess.run(command, env=environment, capture_output=True, check=False, cwd=folder)
                effects[hostile.name] = done.returncode == 0 or bool(stage.damage())
    finally:
        stage.close()
    return effects


def markdown(rows: list[Row], protection: Protection) -> str:
    """docs/sandbox.md's table."""
    lines = ["| program | stopped by | what it got |", "| --- | --- | --- |"]
    lines += [f"| {row.name} | {row.stopped_by} | {_shown(row.reason)} |" for row in rows]
    return f"Here with {protection.describe()}.\n\n" + "\n".join(lines)


def _shown(reason: str) -> str:
    """Without what differs from run to run."""
    return re.sub(r"/tmp/[^/']+/", "…/", re.sub(r"/proc/\d+/", "/proc/N/", reason)).replace("|", "/")


def forbid_namespaces() -> None:
    """As container runtimes' default filter does to a pod without CAP_SYS_ADMIN: `unshare` answers EPERM."""
    unshare = 97 if os.uname().machine == "aarch64" else 272
    code = [(0x20, 0, 0, 0), (0x15, 0, 1, unshare), (0x06, 0, 0, 0x50000 | errno.EPERM), (0x06, 0, 0, 0x7FFF0000)]
    seccomp.no_new_privileges()
    seccomp.install(b"".join(struct.pack("=HBBI", *line) for line in code))


def main() -> None:
    """Prints the rows for the test, or the document's table."""
    if "--as-in-a-pod" in sys.argv:
        forbid_namespaces()
    protection = find_protection()
    if "--no-landlock" in sys.argv:
        protection = replace(protection, landlock=0)
    with tempfile.TemporaryDirectory(prefix="finetune-hostile-") as folder:
        if "--controls" in sys.argv:
            print(json.dumps(run_controls(Path(folder))))
            return
        rows = run_all(Path(folder), protection)
    if "--json" in sys.argv:
        print(json.dumps({"uid": os.getuid(), "protection": asdict(protection), "rows": [asdict(row) for row in rows]}))
    else:
        document = Path(__file__).parents[2] / "docs" / "sandbox.md"
        text = document.read_text(encoding="utf-8")
        document.write_text(text.partition("Here with ")[0] + markdown(rows, protection) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

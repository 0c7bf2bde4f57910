"""`finetune run`: a job on this machine, without Kubernetes. Reads the manifest, shows the run, says what came out."""

import argparse
import errno
import importlib.util
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from finetune_api.job import FineTuneJob
from finetune_api.status import State
from finetune_api.words import say_ranks
from finetune_cli import manifest
from finetune_cli.display import open_display
from finetune_cli.errors import CliError
from finetune_operator.core.conditions import is_finished
from finetune_operator.local import machine, process
from finetune_operator.local.folder import Folder
from finetune_operator.local.run import LocalRun

TICK_SECONDS = 0.2
INTERRUPTED = 130
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunError(CliError):
    """The job cannot be run; the message says why."""


def main(options: argparse.Namespace, start: process.Start = process.start_process) -> int:
    """Runs the job until it has finished, or until it is interrupted and has saved.

    Args:
        options: of the command line.
        start: starts a trainer's supervisor; tests have a cheaper way.

    Returns:
        0 for Complete, 1 for Failed, 130 for interrupted.

    Raises:
        RunError: it cannot be run as it is; nothing was started.
    """
    if importlib.util.find_spec("torch") is None:
        raise RunError("training needs torch and its friends: pip install 'finetune-operator[trainer]'")
    try:
        return _run(options, start)
    except (manifest.ManifestError, machine.LocalError) as error:
        lines = str(error).splitlines()
        raise RunError(
            lines[0] if len(lines) == 1 else "\n  ".join([f"{options.file} cannot be run:", *lines])
        ) from error


def _run(options: argparse.Namespace, start: process.Start) -> int:
    document = manifest.read(options.file)
    admitted = document.admit()
    written = FineTuneJob.from_object(admitted)
    places = machine.Places(
        volumes={claim: Path(folder) for claim, folder in _pairs("--volume", options.volume)},
        secrets={_secret_key(name): Path(file) for name, file in _pairs("--secret", options.secret)},
        cache=Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune",
    )
    gpus = 0 if options.device == "cpu" else process.num_gpus(os.environ)
    machine.check(written, places, gpus)
    root = machine.checkpoints_root(written, places.volumes)
    folder = Folder.open(root, written.metadata.namespace, written.metadata.name)
    try:
        earlier = folder.record.get("uid")
        if options.fresh:
            folder.forget()
        job = folder.take(_unchanged(document, admitted, folder.manifest))
        if is_finished(job.status):
            return _finished_before(job, places)
        _print_notes(document, written, folder, gpus, fresh_after=earlier if options.fresh else None)
        run = _local_run(job, written, places, folder, start, use_gpus=gpus > 0)
        return _watch(run, options, places)
    finally:
        folder.close()


def _pairs(option: str, values: list[str]) -> Iterator[tuple[str, str]]:
    for value in values:
        name, equals, path = value.partition("=")
        if not (name and equals and path):
            raise RunError(f"{option}: must be `NAME=PATH`, got `{value}`")
        yield name, str(Path(path).expanduser().absolute())


def _secret_key(name: str) -> machine.SecretKey:
    secret, _, key = name.partition("/")
    return secret, key or "token"


def _unchanged(document: manifest.Manifest, admitted: dict[str, Any], old: dict[str, Any] | None) -> dict[str, Any]:
    """The manifest, which may differ from that of the run that it goes on with only where a suspended job in a cluster may."""
    if old is None:
        return admitted
    try:
        # No process of the old run is left, since its folder's lock is held.
        return document.admit({**old, "spec": {**old["spec"], "suspend": True}})
    except manifest.ManifestError as error:
        raise manifest.ManifestError(
            f"{error}\nhere: go on with the file as it was, or begin anew with `--fresh`"
        ) from error


def _local_run(
    job: FineTuneJob,
    written: FineTuneJob,
    places: machine.Places,
    folder: Folder,
    start: process.Start,
    *,
    use_gpus: bool,
) -> LocalRun:
    environment = process.child_environment(machine.variables(written, places), use_gpus=use_gpus)

    def start_attempt(launch: dict[str, Any], body: dict[str, Any]) -> process.Trainer:
        spec = machine.launch_here(launch, body, places, written, process.free_ports())
        trainer = process.Trainer(spec, folder.path)
        trainer.start(environment, folder.lock, start)
        return trainer

    return LocalRun(machine.as_one_node(job), places.config(), start_attempt, folder.save)


def _watch(run: LocalRun, options: argparse.Namespace, places: machine.Places) -> int:
    name = run.job.metadata.name
    interrupts: list[int] = []
    with _signals(interrupts), open_display(name) as display:
        asked = 0
        while True:
            if asked < len(interrupts):  # one at a time: two may have come since the last look
                _interrupt(run, first=asked == 0)
                asked += 1
            run.tick()
            with _seen_or_not():
                display.show(run.job, run.progress())
            if run.ended:
                run.tick()  # what the trainer said at the very end
                break
            time.sleep(TICK_SECONDS)
    return _outcome(run.job, options, places)


def _interrupt(run: LocalRun, *, first: bool) -> None:
    if first:
        run.suspend()
        grace = run.config.termination_grace_seconds
        with suppress(OSError):  # the terminal may be gone
            print(
                f"\nsaving a checkpoint and leaving, within {grace} s (again: at once, without saving)", file=sys.stderr
            )
    else:
        run.kill()


@contextmanager
def _seen_or_not() -> Iterator[None]:
    """What is shown may reach nobody (a pipe or a terminal that is gone, a full disk); the run goes on all the same."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EPIPE, errno.EIO):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _signals(received: list[int]) -> Iterator[None]:
    """Collects signals that ask to stop, instead of ending this process."""
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    old = {number: signal.signal(number, lambda n, _frame: received.append(n)) for number in heeded}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _print_notes(
    document: manifest.Manifest, written: FineTuneJob, folder: Folder, gpus: int, fresh_after: str | None
) -> None:
    trainer = written.spec.trainer
    count = say_ranks(trainer.num_nodes * trainer.num_proc_per_node)
    print(
        f"{written.metadata.name} on this machine: {count} on {'GPUs' if gpus else 'the CPU'}, log: {folder.path}/attempt-*.log"
    )
    if fresh_after is not None:
        print(f"note: begun anew; checkpoints of the earlier run are kept ({written.metadata.name}-{fresh_after[:8]})")
    if document.skipped:
        print(f"note: not for this machine, left out: {', '.join(document.skipped)}")
    if names := machine.ignored(written):
        print(f"note: without meaning here: {', '.join(names)}")


def _finished_before(job: FineTuneJob, places: machine.Places) -> int:
    complete = job.status.state is State.COMPLETE
    print(f"{job.metadata.name} is {job.status.state} already: {job.status.message}")
    if complete:
        print(f"output: {machine.path_of(job.spec.output.uri, places.volumes)}")
    print("`--fresh` begins anew; the output is then replaced when the new run has finished")
    return 0 if complete else 1


def _outcome(job: FineTuneJob, options: argparse.Namespace, places: machine.Places) -> int:
    status = job.status
    if status.state is State.SUSPENDED:
        step = status.last_checkpoint.step if status.last_checkpoint else None
        if step is None:
            print("interrupted, nothing was saved; the same command starts at step 0")
        else:
            print(f"interrupted, saved at step {step}; the same command goes on from there")
        return INTERRUPTED
    if status.state is not State.COMPLETE:
        print("failed; correct the cause and begin anew with `--fresh`", file=sys.stderr)
        return 1
    print(f"output: {machine.path_of(job.spec.output.uri, places.volumes)}")
    if options.file != "-":
        print(f"the same on a cluster: kubectl apply -f {shlex.quote(options.file)}")
    return 0

"""One rank, from launch file to exported result: `python -m finetune_trainer.rank LAUNCH_FILE SCRATCH_FOLDER`.

Started by the supervisor, which has put this process's place into the environment. `run` is the trainer's table of contents.
"""

import ctypes
import faulthandler
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from finetune_api.launch import LaunchSpec
from finetune_api.reasons import FAILURES
from finetune_api.reports import TRACEBACK_LIMIT, Activity
from finetune_trainer.config import read_launch
from finetune_trainer.errors import TerminatedError, classify, short_traceback
from finetune_trainer.hang import stack_path
from finetune_trainer.logs import setup_logging
from finetune_trainer.startup import Startup, wake_device
from finetune_trainer.state import StateWriter

PR_SET_PDEATHSIG = 1
log = logging.getLogger("finetune_trainer")


def run(
    spec: LaunchSpec,
    scratch: Path,
    status: StateWriter,
    stop_requested: Callable[[], bool],
    at_end: list[Callable[[bool], None]],
) -> None:
    """config → distributed → data → model → engine → checkpoint → loop → export; all ranks go the same way.

    Args:
        spec: the launch.
        scratch: a folder of the supervisor's.
        status: tells the supervisor.
        stop_requested: whether this pod was asked to leave.
        at_end: gets what is to be called, with whether all went well, when the outcome has been recorded.
    """
    started = time.perf_counter()
    startup = Startup(status)
    from finetune_trainer import distributed

    startup.took("imports")
    world = distributed.connect(spec)
    startup.took("gang")

    from finetune_trainer import setup

    claim = setup.claim(spec, world)
    sources = setup.locate(spec, world)
    status.beat(model_revision=sources.model_revision)
    startup.took("sources")

    data = setup.load_data(spec, sources, world, scratch, status.beat, startup.took)
    startup.took("data")

    engine = setup.build_engine(spec, sources, world, startup.took)
    startup.took("engine")

    training = setup.prepare_training(spec, sources, data, engine, world, claim, status, stop_requested, startup)

    at_end.append(training.tracking.finish)
    world.wait_for_all("loaded")
    startup.took("resume")
    training.run()

    status.beat(Activity.EXPORTING)
    setup.export(spec, training, data, sources, started)
    status.beat(Activity.DONE)
    world.leave_together()


def main(arguments: list[str]) -> int:
    """Runs this process's rank and returns its exit code; every error is recorded for the supervisor."""
    launch_file, scratch = map(Path, arguments)
    rank = int(os.environ["RANK"])
    stops: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stops.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stack_path(scratch, rank).open("a"), all_threads=True)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no rank outlives its supervisor
    setup_logging(rank)
    spec = read_launch(launch_file, warn=False)  # the supervisor has
    status = StateWriter(scratch, rank, spec.attempt)
    status.beat()
    gc.disable()  # until `import_libraries` is through
    if os.environ.get("DS_ACCELERATOR") != "cpu":
        wake_device(int(os.environ["LOCAL_RANK"]))
    code, at_end = 0, list[Callable[[bool], None]]()
    try:
        run(spec, scratch, status, lambda: bool(stops), at_end)
    except BaseException as error:
        reason, message = classify(error)
        asked = isinstance(error, TerminatedError)  # no failure, so no traceback
        try:
            status.fail(reason, message, "" if asked else short_traceback(error, TRACEBACK_LIMIT))
        except OSError as unwritten:  # the exit code tells the reason
            log.error("%s: the failure cannot be recorded: %s", scratch, unwritten)
        if not asked:
            log.exception("this rank ends: %s", reason)
        code = FAILURES[reason].exit_code or 1
    status.flush()
    for finish in at_end:
        finish(code == 0)
    return code


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no destructors: communication threads would wait for peers that are gone

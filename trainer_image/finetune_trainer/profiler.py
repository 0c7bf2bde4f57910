"""A trace of a few steps by PyTorch's profiler, one file for each rank. A profiler that fails never stops training."""

import logging
from pathlib import Path
from typing import Any

from torch.profiler import profile, schedule

from finetune_api.launch import LaunchProfiler

log = logging.getLogger("finetune_trainer")


class StepProfiler:
    """Watches the steps that `tracking.profiler` names, counted from the start of this attempt."""

    def __init__(self, wanted: LaunchProfiler | None, attempt: int, rank: int) -> None:
        self._running: profile | None = None
        if wanted is None:
            return
        self._file = Path(wanted.dir) / f"attempt-{attempt}" / f"rank-{rank:05d}.json.gz"
        self._left = wanted.wait + wanted.warmup + wanted.active
        phases = schedule(wait=wanted.wait, warmup=wanted.warmup, active=wanted.active, repeat=1)
        self._running = profile(schedule=phases, on_trace_ready=self._write)
        self._running.start()

    def step(self) -> None:
        """To be called after each step."""
        if self._running is None:
            return
        self._running.step()
        self._left -= 1
        if self._left == 0:
            self.finish()

    def finish(self) -> None:
        """Ends it; what was recorded until then is kept."""
        if self._running is not None:
            self._running.stop()
            self._running = None

    def _write(self, found: Any) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            found.export_chrome_trace(str(self._file))
        except (OSError, RuntimeError) as error:
            log.warning("tracking.profiler: %s cannot be written: %s", self._file, error)
        else:
            log.info("tracking.profiler: the trace is in %s", self._file)

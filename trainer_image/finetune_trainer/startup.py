"""A rank's start: what is imported, and how long everything took, from its pod's supervisor to the end of the first step.

Imports torch only when told to.
"""

import contextlib
import ctypes
import gc
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finetune_trainer.state import StateWriter

log = logging.getLogger("finetune_trainer")


class Startup:
    """Gives the time since the last call to a phase, beginning with the supervisor's start; the phases add up to the whole."""

    def __init__(self, status: StateWriter) -> None:
        self._status = status
        self._last = _started(os.getppid())
        self._done = False
        self.took("supervisor", _started(os.getpid()))

    def took(self, phase: str, now: float | None = None) -> None:
        """What happened since the last call was `phase`; a phase may come in several pieces."""
        now = _now() if now is None else now
        seconds = now - self._last
        self._last = now
        self._add(phase, seconds)
        log.info("start-up: %s took %.1f s", phase, seconds)

    def stepped(self) -> None:
        """A step is done; the first one ends the start."""
        if self._done:
            return
        self._done = True
        self.took("first_step")
        compiling, graphs = _compilation()
        self._add("compile", compiling)
        self._add("first_step", -compiling)
        log.info("start-up: %.1f s to the end of the first step", sum(self._status.state.startup.values()))
        if graphs:
            log.info("compile: %.1f s of the first step; %s", compiling, graphs)
        # What is there now stays; with a compiler's objects one look at all of them holds a step up for up to 0.4 s.
        gc.collect()
        gc.freeze()

    def _add(self, phase: str, seconds: float) -> None:
        times = self._status.state.startup
        self._status.beat(startup={**times, phase: round(times.get(phase, 0.0) + seconds, 3)})


def import_libraries() -> None:
    """Imports what ranks need to train, most of a small job's start.

    The garbage collector would go through millions of new objects again and again, and find nothing: 10 % of the time. `main`
    switches it off, and what is there now is never looked at again.
    """
    from finetune_trainer.quirks import tame_deepspeed

    tame_deepspeed()
    import peft
    import transformers.generation

    import finetune_trainer.checkpoint
    import finetune_trainer.kernels
    import finetune_trainer.loop

    assert all((peft, transformers, finetune_trainer))
    gc.enable()
    gc.freeze()


@contextlib.contextmanager
def compiler_imported(wanted: bool) -> Iterator[None]:
    """Imports torch's compiler beside what is done meanwhile, such as reading weights, instead of in the first step."""
    thread = threading.Thread(target=import_compiler, name="import compiler", daemon=True)
    if wanted:
        thread.start()
    yield
    if wanted:
        thread.join()


def import_compiler() -> None:
    """Imports what the first compilation would."""
    import torch._inductor.compile_fx
    from torch._inductor.codecache import torch_key

    assert torch
    torch_key()  # a hash of torch's own code, which is part of every key of the cache


def wake_device(local_rank: int) -> None:
    """Makes CUDA's context of this rank's device in a thread, while Python imports: a second and more, on nodes of many GPUs.

    Errors are torch's to tell, which meets them again.
    """

    def wake() -> None:
        try:
            cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), local_rank) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    threading.Thread(target=wake, name="wake device", daemon=True).start()


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _started(pid: int) -> float:
    """When a process was started, on the clock of `_now`."""
    after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
    return int(after_name.split()[19]) / os.sysconf("SC_CLK_TCK")


def _compilation() -> tuple[float, str]:
    """Seconds that `torch.compile` took in this process, and what became of its graphs; nothing where there are none."""
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0.0, ""
    counters = dynamo.counters["aot_autograd"]
    kinds = {"from the cache": "hit", "compiled": "miss", "that cannot be cached": "bypass"}
    counts = {text: counters[f"autograd_cache_{kind}"] for text, kind in kinds.items()}
    seconds: float = dynamo.calculate_time_spent()["total_wall_time"]
    return seconds, ", ".join(f"{count} graphs {text}" for text, count in counts.items() if count)

"""What the profiler's traces say about communication: how long it takes, how much of that nothing else hides, and idle time."""

import gzip
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Span = tuple[float, float]
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Communication:
    """Of one rank, in seconds for each step that was kept."""

    seconds: float
    """In which a collective ran, waiting for other ranks included."""
    exposed_seconds: float
    """In which nothing else ran on the device. On a CPU, where a collective is a call that waits: all of it."""
    idle_seconds: float | None
    """In which nothing ran on the device. None on a CPU, where there is no telling."""
    step_seconds: float


def read(file: Path) -> Communication:
    """The communication in a trace.

    A collective on a GPU is a kernel with `nccl` in its name; exposed is the time in which only such kernels ran. On a CPU it
    is an operator of gloo's.
    """
    with gzip.open(file) as stream:
        events: list[dict[str, Any]] = json.load(stream)["traceEvents"]
    whole = [event for event in events if event.get("ph") == "X"]
    # The CPU's side of a step: on the device's timeline there is another event of the same name.
    marks = {e["name"]: e["dur"] / 1e6 for e in whole if e["name"].startswith("ProfilerStep") and "gpu" not in e["cat"]}
    total, steps = sum(marks.values()), len(marks)
    kernels = [event for event in whole if event.get("cat") in DEVICE_WORK]
    if kernels:
        collectives = _union(_span(e) for e in kernels if "nccl" in e["name"].lower())
        others = _union(_span(e) for e in kernels if "nccl" not in e["name"].lower())
        busy = _length(_union([*collectives, *others]))
        hidden, idle = _length(collectives) + _length(others) - busy, (total - busy) / steps
    else:
        collectives, hidden, idle = _union(_span(e) for e in whole if e["name"].startswith("gloo:")), 0.0, None
    seconds = _length(collectives)
    return Communication(seconds / steps, (seconds - hidden) / steps, idle, total / steps)


def _span(event: dict[str, Any]) -> Span:
    """In seconds."""
    return event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same time as spans that do not overlap, in order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def _length(spans: list[Span]) -> float:
    return sum(end - start for start, end in spans)

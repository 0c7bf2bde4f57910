"""What a profiler's trace says about communication."""

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.traces import Communication, read


def event(name: str, cat: str, start: float, seconds: float) -> dict[str, Any]:
    """An event as the profiler writes it, in microseconds."""
    return {"ph": "X", "name": name, "cat": cat, "ts": start * 1e6, "dur": seconds * 1e6}


def trace(file: Path, *events: dict[str, Any]) -> Path:
    with gzip.open(file, "wt") as stream:
        json.dump({"traceEvents": [{"ph": "M", "name": "process_name"}, *events]}, stream)
    return file


def test_what_other_kernels_hide_is_not_exposed(tmp_path: Path) -> None:
    steps = [event(f"ProfilerStep#{n}", "user_annotation", 10 * n, 10) for n in range(2)]
    on_device = event("ProfilerStep#0", "gpu_user_annotation", 1, 10)
    collectives = [
        event("ncclDevKernel_AllReduce", "kernel", 2, 4),  # 3..4 and 5..6 are alone
        event("ncclDevKernel_AllGather", "kernel", 5, 1),  # at the same time as the first
        event("ncclDevKernel_AllReduce", "kernel", 12, 2),  # hidden
    ]
    others = [
        event("gemm", "kernel", 1, 2),
        event("Memcpy HtoD", "gpu_memcpy", 4, 1),
        event("gemm", "kernel", 11, 4),
        event("aten::mm", "cpu_op", 0, 20),
    ]
    found = read(trace(tmp_path / "t.json.gz", *steps, on_device, *collectives, *others))
    assert found == Communication(seconds=3.0, exposed_seconds=1.0, idle_seconds=5.5, step_seconds=10.0)


def test_a_collective_on_a_cpu_is_exposed(tmp_path: Path) -> None:
    events = [
        event("ProfilerStep#3", "user_annotation", 0, 8),
        event("gloo:all_reduce", "user_annotation", 1, 2),
        event("aten::mm", "cpu_op", 2, 3),
    ]
    assert read(trace(tmp_path / "t.json.gz", *events)) == Communication(2.0, 2.0, None, 8.0)

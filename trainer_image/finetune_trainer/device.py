"""Memory and utilisation of the device that this rank computes on."""

import logging
import resource
import time
from pathlib import Path
from typing import Any

import torch

from finetune_api.spec import Precision

log = logging.getLogger("finetune_trainer")
PAGE_BYTES = resource.getpagesize()
NVML_INTERVAL_SECONDS = 1.0
"""NVML's own window is no shorter, and between two steps the device waits for the answer."""


def warn_of_slow_precision(device: torch.device, precision: Precision) -> None:
    """Says so where bf16 has to be emulated: 6.5 times slower than float32 on a CPU with AVX2 only."""
    if device.type == "cpu" and precision is not Precision.FP32:
        flags = Path("/proc/cpuinfo").read_text().split()
        if "avx512_bf16" not in flags and "amx_bf16" not in flags:
            log.warning("this CPU has no bf16 arithmetic: `training.precision: FP32` is several times faster here")


class DeviceFacts:
    """Reads facts as keyword arguments for the rank's state."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._nvml = _nvml_handle(device) if device.type == "cuda" else None
        self._asked, self._utilization = 0.0, 0.0

    def read(self) -> dict[str, Any]:
        """The facts now; utilisation is over the time since the last call (on CUDA, NVML's own window)."""
        return self._cuda() if self._device.type == "cuda" else self._cpu_facts()

    def _cuda(self) -> dict[str, Any]:
        if self._nvml is not None and time.monotonic() - self._asked >= NVML_INTERVAL_SECONDS:
            import pynvml

            self._utilization = pynvml.nvmlDeviceGetUtilizationRates(self._nvml).gpu / 100
            self._asked = time.monotonic()
        stats = torch.cuda.memory_stats(self._device)
        return {
            "device": str(self._device),
            "device_utilization": self._utilization,
            "memory_used_bytes": stats.get("allocated_bytes.all.current", 0),
            "memory_reserved_bytes": stats.get("reserved_bytes.all.current", 0),
            "memory_peak_bytes": stats.get("allocated_bytes.all.peak", 0),
        }

    def _cpu_facts(self) -> dict[str, Any]:
        wall, cpu = time.monotonic(), time.process_time()
        elapsed = max(1e-6, wall - self._wall) * torch.get_num_threads()
        busy = min(1.0, (cpu - self._cpu) / elapsed)
        self._wall, self._cpu = wall, cpu
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES
        return {
            "device": "cpu",
            "device_utilization": round(busy, 4),
            "memory_used_bytes": resident,
            "memory_reserved_bytes": resident,
            "memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _nvml_handle(device: torch.device) -> Any:
    """By UUID: NVML counts all of the machine's GPUs, torch only the container's."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None  # a driver without NVML in the container: utilisation stays 0

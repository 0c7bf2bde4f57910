"""The ranks of one pod as operating-system processes: their environment, their start and their end.

Owns processes and nothing about what they compute. Must not import torch.
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.launch import HubSource, LaunchSpec
from finetune_trainer.versions import code_digest

NVIDIA_CONTROL = Path("/dev/nvidiactl")
"""There wherever the container runtime gives the container a GPU; far cheaper to ask than CUDA."""


FIXED_ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic cuBLAS
    "PYTHONUNBUFFERED": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # a lost peer is told in one sentence, not with a stack of C++
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
start_process = subprocess.Popen
"""Tests put something cheaper here."""


def has_cuda() -> bool:
    """Whether this container was given an NVIDIA GPU."""
    return NVIDIA_CONTROL.exists()


def rank_environment(spec: LaunchSpec, node_rank: int, local_rank: int, scratch: Path) -> dict[str, str]:
    """The whole environment of one rank.

    The container's root file system is read-only and its user has no passwd entry: every cache gets a folder under
    `scratch`, and USER is set because `getpass.getuser` would raise.
    """
    rank = node_rank * spec.num_proc_per_node + local_rank
    threads = str(spec.threads_per_process)
    cache = scratch / "cache"
    ours = {
        **FIXED_ENVIRONMENT,
        "RANK": str(rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_SIZE": str(spec.num_proc_per_node),  # else DeepSpeed asks numactl, a process for every ZeRO-3 bucket
        "LOCAL_WORLD_SIZE": str(spec.num_proc_per_node),
        "MASTER_ADDR": spec.rendezvous.host,
        "MASTER_PORT": str(spec.rendezvous.port),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "RAYON_NUM_THREADS": threads,
        "HF_HOME": str(cache / "huggingface"),
        # Beside the downloads, on a volume if the job has one for them: compiled code outlives the pod.
        "TRITON_CACHE_DIR": str(Path(spec.cache_dir) / "compiled" / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(Path(spec.cache_dir) / "compiled" / "inductor"),
        "TORCH_COMPILE_CACHE_KEY_TAG": code_digest(),
        "TORCHINDUCTOR_COMPILE_THREADS": threads,  # else up to 32 processes a rank, whatever CPUs the pod has
        "TORCH_EXTENSIONS_DIR": str(cache / "torch_extensions"),
        "XDG_CACHE_HOME": str(cache),
    }
    sources = [spec.model.source, *(data.source for data in (*spec.train, *spec.evaluation))]
    sources += [benchmark.source for benchmark in spec.benchmarks]
    if not any(isinstance(source, HubSource) for source in sources):
        ours["HF_HUB_OFFLINE"] = "1"
    defaults = {"USER": "trainer", "LOGNAME": "trainer"}
    for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        defaults[name] = str(cache / "wandb")  # for offline runs the user names a volume
    if not has_cuda():
        ours["DS_ACCELERATOR"] = "cpu"
    if spec.num_nodes == 1:
        # gloo looks up the host's own name otherwise, which need not resolve on a laptop.
        defaults["GLOO_SOCKET_IFNAME"] = "lo"
    home = os.environ.get("HOME", "")
    if not home or not os.access(home, os.W_OK):
        ours["HOME"] = str(scratch)
    return {**defaults, **os.environ, **ours}


@dataclass
class Gang:
    """The running ranks of this pod, by global rank."""

    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @classmethod
    def start(cls, spec: LaunchSpec, launch_file: Path, node_rank: int, scratch: Path) -> "Gang":
        """Starts every rank, each in a session of its own (a terminal's Ctrl-C reaches the supervisor only)."""
        gang = cls()
        for local_rank in range(spec.num_proc_per_node):
            command = [sys.executable, "-m", "finetune_trainer.rank", str(launch_file), str(scratch)]
            environment = rank_environment(spec, node_rank, local_rank, scratch)
            rank = int(environment["RANK"])
            gang.processes[rank] = start_process(command, env=environment, start_new_session=True)
        return gang

    def exits(self) -> dict[int, int]:
        """Return codes of the ranks that have ended; negative: killed by that signal."""
        return {rank: code for rank, p in self.processes.items() if (code := p.poll()) is not None}

    def signal(self, number: int) -> None:
        """Sends a signal to every rank that still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(number)

    def kill(self) -> None:
        """Ends all ranks and what they started, at once."""
        for process in self.processes.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        deadline = time.monotonic() + 2
        for process in self.processes.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                continue  # in uninterruptible sleep on a dead volume; the kernel ends it with the container

"""Ranks, their device, and the few collectives of our own beside DeepSpeed's.

Waiting for a slow start (an image pulled late, a model downloaded by one) goes through the key-value store, which has no time
limit of its own; the limit `communication_timeout_seconds` holds for collectives, that is, from the first step on.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch._inductor.config  # `use_deterministic_algorithms` imports it anyway; here it counts as an import
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch._C._distributed_c10d import PrefixStore, TCPStore

from finetune_api.launch import LaunchSpec
from finetune_trainer.errors import ConfigError, classify, error_of

START_TIMEOUT = timedelta(days=1)
"""A gang's pods may start hours apart (queues, image pulls); deadlines are the operator's matter."""
POLL_SECONDS = 0.02
LEAVE_SECONDS = 30.0
"""The result is written: a rank that has died since is no reason to wait longer."""
T = TypeVar("T")
log = logging.getLogger("finetune_trainer")


@dataclass(frozen=True)
class World:
    """This rank's place in the gang."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    store: Any
    control: Any
    """A gloo group for small host-side messages; on CUDA beside NCCL."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_node(self) -> bool:
        return self.local_rank == 0

    def wait_for_all(self, name: str) -> None:
        """A barrier without a time limit; `name` is used once."""
        self.store.add(name, 1)
        while self.store.add(name, 0) < self.size:
            time.sleep(POLL_SECONDS)

    def wait_for_node(self, name: str, arrived: bool) -> None:
        """Waits until the first rank of this node has arrived at `name`, without a time limit."""
        key = f"{name}/{self.rank - self.local_rank}"
        if arrived:
            self.store.set(key, "1")
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)

    def leave_together(self) -> None:
        """The last thing before the end: rank 0 holds the store, so it goes last, and nobody goes before it has come here."""
        if self.is_first:
            self.store.set("finished", "1")
            deadline = time.monotonic() + LEAVE_SECONDS
            while self.store.add("left", 0) < self.size - 1 and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            return
        while not self.store.check(["finished"]):
            time.sleep(POLL_SECONDS)
        self.store.add("left", 1)

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, work: Callable[[], T]) -> list[T]:
        """Runs a piece of work on every rank and gathers the results; if it fails anywhere, every rank raises.

        Without this a rank that cannot write would leave the others waiting in a collective.
        """
        error: Exception | None = None
        result: Any = None
        try:
            result = work()
        except Exception as caught:
            error = caught
        outcomes = self.gather((result, None if error is None else classify(error)))
        if error is not None:
            raise error
        for rank, (_, failure) in enumerate(outcomes):
            if failure is not None:
                raise error_of(failure[0], f"rank {rank}: {failure[1]}")
        return [value for value, _ in outcomes]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks in float64, the same bits on every rank."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        result: list[float] = tensor.tolist()
        return result


def connect(spec: LaunchSpec) -> World:
    """Joins the gang: finds rank 0, waits for everyone, and sets the process up for reproducible arithmetic.

    The environment names only this process's place, which the supervisor has set.

    Raises:
        ConfigError: a GPU was expected on this node and is not usable.
    """
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = _device(local_rank)
    torch.set_num_threads(spec.threads_per_process)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that would cost a write of every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    _wait_for_name(spec.rendezvous.host)
    store = TCPStore(
        spec.rendezvous.host,
        spec.rendezvous.port,
        spec.world_size,
        is_master=rank == 0,
        timeout=START_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=_listen_here(spec.rendezvous.port) if rank == 0 and spec.num_nodes == 1 else None,
    )
    store.add("joined", 1)
    while store.add("joined", 0) < spec.world_size:
        time.sleep(POLL_SECONDS)
    timeout = timedelta(seconds=spec.communication_timeout_seconds)
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore("default", store),
        rank=rank,
        world_size=spec.world_size,
        timeout=timeout,
    )
    control = dist.new_group(backend="gloo", timeout=timeout) if device.type == "cuda" else dist.group.WORLD
    log.info("%d rank(s) on %d node(s), device %s", spec.world_size, spec.num_nodes, device)
    return World(
        rank=rank,
        local_rank=local_rank,
        size=spec.world_size,
        local_size=spec.num_proc_per_node,
        device=device,
        store=PrefixStore("ours", store),
        control=control,
    )


def _listen_here(port: int) -> int:
    """A listening socket that only this machine reaches: the store knows no password, and by itself listens everywhere."""
    return socket.create_server(("127.0.0.1", port), backlog=512).detach()


def limit_waits(spec: LaunchSpec) -> None:
    """Makes the job's limit hold in all groups: DeepSpeed makes some of its own, with torch's default of 10 or 30 minutes."""
    set_timeout = getattr(dist, "set_timeout", None) or c10d._set_pg_timeout  # its older name
    for group in list(c10d._world.pg_map):
        set_timeout(timedelta(seconds=spec.communication_timeout_seconds), group)


def _device(local_rank: int) -> torch.device:
    """The supervisor has decided between CUDA and CPU; CUDA that then does not work is an error, never a silent CPU run."""
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "trainer.resourcesPerNode: the container has an NVIDIA device but CUDA does not start; check the node's driver "
            "against the image's CUDA version"
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"trainer.numProcPerNode: rank {local_rank} of this node has no GPU; {torch.cuda.device_count()} visible"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _wait_for_name(host: str) -> None:
    """Waits for rank 0's DNS name, which exists only once its pod has started."""
    said = False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if not said:
                log.warning("waiting for %s to have an address (%s)", host, error)
                said = True
            time.sleep(0.2)

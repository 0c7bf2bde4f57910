"""Brings a model's weights into the page cache while the ranks still import: loading them then waits for no disk.

One reader a node, first of all in the supervisor, which has nothing else to do. Nothing depends on it. Must not import torch.
"""

import contextlib
import threading
from pathlib import Path

from finetune_trainer.container import memory_limit
from finetune_trainer.weights import weight_files

BLOCK_BYTES = 1 << 25
NUM_THREADS = 4
"""A network volume answers several requests at once."""
SHARE_OF_MEMORY = 0.5
"""Of what is free. More would push out other pages, perhaps these very ones before they are used."""


def read_ahead(folder: Path) -> list[threading.Thread]:
    """Starts to read a model's weights, if they fit into memory, and returns the threads that do it."""
    try:
        sizes = {file: file.stat().st_size for file in weight_files(folder)}
        fit = sum(sizes.values()) < SHARE_OF_MEMORY * _free_memory()
    except Exception:  # an index that is none, too: what is wrong is told when the model is checked
        return []
    blocks = [(file, at) for file, size in sizes.items() for at in range(0, size, BLOCK_BYTES)] if fit else []
    threads = [
        threading.Thread(target=_read, args=(blocks[first::NUM_THREADS],), name="read ahead", daemon=True)
        for first in range(min(NUM_THREADS, len(blocks)))
    ]
    for thread in threads:
        thread.start()
    return threads


def _read(blocks: list[tuple[Path, int]]) -> None:
    buffer = bytearray(BLOCK_BYTES)
    with contextlib.suppress(OSError):
        for file, at in blocks:
            with file.open("rb", buffering=0) as stream:
                stream.seek(at)
                stream.readinto(buffer)


def _free_memory() -> int:
    """Bytes that this container could use beside what is used for good; of a cgroup the whole limit is taken."""
    values = dict(line.split(":") for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines())
    free = int(values["MemAvailable"].split()[0]) * 1024
    return min(free, memory_limit() or free)

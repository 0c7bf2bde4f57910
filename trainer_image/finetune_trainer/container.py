"""What the kernel says of the container that this process is in. Must not import torch."""

from pathlib import Path

_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Of cgroup v2, and of v1."""


def memory_limit() -> int | None:
    """Bytes of memory that the container may use; None where nothing limits it."""
    limits = []
    for name in _LIMIT_FILES:
        try:
            text = Path(name).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        limits += [int(text)] if text.isdigit() else []  # `max`: no limit
    return min(limits, default=None)

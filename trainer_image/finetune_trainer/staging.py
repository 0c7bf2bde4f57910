"""Copies of the training state in host memory, taken while training stands still and written while it goes on.

The buffers are kept from one checkpoint to the next: allocating and pinning them costs more than the copy. They hold the
state's size once more for as long as training lasts, also where offloading keeps the state itself in host memory.
"""

import contextlib
import logging
import weakref
from typing import Any

import torch

log = logging.getLogger("finetune_trainer")


class Staging:
    """Host buffers by name. What `hold` returns is valid until the next `hold` of that name."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def hold(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Starts the copy of a tensor; it is complete after `settle`."""
        tensor = tensor.detach()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = _host_buffer(tensor)
        buffer.copy_(tensor, non_blocking=tensor.is_cuda)
        return buffer


def settle(device: torch.device) -> None:
    """Waits for everything that the device was told: before a copy, so that no stream still writes; after it, for the copy."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _host_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """Memory of exactly the tensor's size, page-locked for copies from a GPU.

    torch's own pinned allocator rounds up to a power of two, which would be up to half of the state wasted.
    """
    buffer = torch.empty(tensor.shape, dtype=tensor.dtype)
    if tensor.is_cuda and buffer.nbytes:
        cuda: Any = torch.cuda
        runtime, address = cuda.cudart(), buffer.data_ptr()
        if code := int(runtime.cudaHostRegister(address, buffer.nbytes, 0)):
            log.warning("host memory for checkpoints cannot be page-locked (CUDA error %d): copies are slower", code)
            with contextlib.suppress(RuntimeError):  # the runtime keeps the code, and tells it to whoever asks next
                torch.zeros(1, device=tensor.device)
        else:
            weakref.finalize(buffer, runtime.cudaHostUnregister, address)
    return buffer

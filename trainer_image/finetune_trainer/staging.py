"""Copies of the training state in host memory, taken while training stands still and written while it goes on.

The buffers are kept from one checkpoint to the next: allocating and pinning them costs more than the copy. They hold the
state's size once more for as long as training lasts, also where offloading keeps the state itself in host memory.
"""

import logging

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
        result = torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)  # type: ignore[no-untyped-call]
        if int(result) != 0:
            log.warning("host memory for checkpoints cannot be page-locked (CUDA error %s): copies are slower", result)
    return buffer

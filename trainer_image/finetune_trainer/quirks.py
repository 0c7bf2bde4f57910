"""What DeepSpeed 0.19.8, or torch for it, does that a trainer does not want. Each is undone here, with its reason and its cost.

Nothing here changes a number that is computed.
"""

import contextlib
from typing import Any
from unittest import mock

import torch


def _plain(function: Any = None, **_options: Any) -> Any:
    """`torch.compile` that compiles nothing."""
    return function if function is not None else _plain


def tame_deepspeed() -> None:
    """Imports DeepSpeed without its costs; to be called before anything else imports it."""
    _bitsandbytes_without_inductor()
    _muon_without_inductor()
    _no_shared_memory_collectives()
    _no_memory_reports()
    _no_broadcast_to_nobody()
    _no_ranges_for_profilers()
    _no_search_for_the_device()


def _muon_without_inductor() -> None:
    """The engine imports its Muon optimizer to compare types, and that module decorates functions with `torch.compile`.

    This loads torch's inductor: 6 s of CPU time, more than all other imports together. The functions are never called here.
    """
    with mock.patch.object(torch, "compile", _plain):
        import deepspeed.runtime.zero.muon.original_muon

    assert deepspeed


def _bitsandbytes_without_inductor() -> None:
    """Where it is installed peft imports it, and it decorates its CPU functions with `torch.compile`.

    The decorator loads torch's inductor in every job, and the first call compiles for 5 s.
    """
    with mock.patch.object(torch, "compile", _plain), contextlib.suppress(ImportError):
        import bitsandbytes

        assert bitsandbytes


def _no_shared_memory_collectives() -> None:
    """On CPU a collective for inference maps 69 MB of /dev/shm a rank, which nothing here uses.

    A container has 64 MB of it by default (the process would end with SIGBUS), and a killed rank leaves it behind.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _no_memory_reports() -> None:
    """The bf16 optimizer prints memory figures unasked, with a garbage collection of half a second before each."""
    import deepspeed.runtime.bf16_optimizer

    deepspeed.runtime.bf16_optimizer.see_memory_usage = lambda *_args, **_kwargs: None


def _no_broadcast_to_nobody() -> None:
    """A single rank sends itself each parameter, one after the other, through a communicator that is made for it."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    broadcast = DeepSpeedEngine._broadcast_model
    if broadcast.__name__ != "unless_alone":

        def unless_alone(self: Any) -> None:
            if torch.distributed.get_world_size() > 1:
                broadcast(self)

        DeepSpeedEngine._broadcast_model = unless_alone


def _no_ranges_for_profilers() -> None:
    """Every function of ZeRO-3 opens and closes a range for NVIDIA's profiler, thousands in a step."""
    import deepspeed.utils.nvtx

    deepspeed.utils.nvtx.enable_nvtx = False


def _no_search_for_the_device() -> None:
    """At each use of a stream torch asks which kinds of device are there; ZeRO uses them thousands of times in a step."""
    searched = torch._utils._get_current_device_index
    if searched.__name__ != "current":

        def current() -> Any:
            here = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
            return torch.cuda.current_device() if here else searched()  # type: ignore[no-untyped-call]

        torch._utils._get_current_device_index = current

"""ZeRO-3's work on the host, which DeepSpeed does for each parameter and each rank, done together for a decoder layer.

It took longer than a layer computes: no rank was ever ahead of its device, and any delay of one rank delayed all of them. Nothing
here changes what is computed, only how copies are made and when the host waits. Import it after `quirks.tame_deepspeed`.
"""

from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

import torch
from deepspeed.runtime.comm.coalesced_collectives import _torch_reduce_scatter_fn
from deepspeed.runtime.compiler import lazy_disable
from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator, stage3
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus, free_param
from deepspeed.utils import z3_leaf_module

LAYERS_AHEAD = 2
"""Of those that were released, how many may still be computing when the host asks for the next: as FSDP's `limit_all_gathers`.

Weights of so many layers more are in memory at the worst, since none is reused before its layer has been computed.
"""
theirs_wait = AllGatherCoalescedHandle.wait
theirs_parameters = partitioned_param_coordinator.iter_params
_parameters: WeakKeyDictionary[torch.nn.Module, tuple[Any, ...]] = WeakKeyDictionary()
Coordinator = partitioned_param_coordinator.PartitionedParameterCoordinator
(_releasable,) = (
    cell.cell_contents
    for cell in Coordinator._PartitionedParameterCoordinator__params_to_release.__closure__
    if hasattr(cell.cell_contents, "cache_clear")
)
"""What the coordinator remembers of each place of a pass: which parameters may be released there."""


class PartitionedParameterCoordinator(Coordinator):  # type: ignore[misc,valid-type]
    """Waits once for what a module needs. It has its base's name, so that private attributes are the base's too."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._computed: deque[torch.cuda.Event] = deque()

    def _fetch_sub_module_impl(self, module: Any, forward: bool, is_leaf: bool) -> None:
        while len(self._computed) > LAYERS_AHEAD:
            self._computed.popleft().synchronize()
        if is_leaf:
            self._fetch_together(parameters_of(module, recurse=True), forward)
        super()._fetch_sub_module_impl(module, forward, is_leaf)  # finds that all is there, and gathers in advance

    def _fetch_together(self, parameters: tuple[Any, ...], forward: bool) -> None:
        if missing := {p for p in parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE}:
            self.__all_gather_params(missing, forward)
        handles = [self.__inflight_param_registry.pop(p) for p in parameters if p in self.__inflight_param_registry]
        with torch.cuda.stream(self.__allgather_stream):
            for handle in dict.fromkeys(handles):
                handle.wait()

    def release_sub_module(self, module: Any, forward: bool = False) -> None:
        super().release_sub_module(module, forward)
        if self.__allgather_stream is not None and z3_leaf_module(module):
            # Blocking: the host sleeps, instead of asking all the time.
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
            self._computed.append(event)

    def _invalidate_trace(self) -> None:
        """Also forgets what may be released, which theirs keeps when it has noticed that passes are others.

        The first one here has no backward pass (a trial, an evaluation). From then on every weight was released that the
        backward pass begins with, and head and last layers were gathered twice in each step.
        """
        super()._invalidate_trace()
        _releasable.cache_clear()

    @lazy_disable  # type: ignore[untyped-decorator]
    def __release_param(self, parameter: Any, free_data: bool = True) -> None:
        """Theirs describes the parameter in words four times, for messages that nobody gets."""
        if parameter.ds_status != ZeroParamStatus.AVAILABLE or parameter.ds_active_sub_modules:
            return
        if parameter.ds_persist:
            _record_stream(parameter.data)  # it stays until it is gathered again, by a stream that is ahead of this one
            parameter.ds_status = ZeroParamStatus.NOT_AVAILABLE
        else:
            free_param(parameter)
        self.__n_available_params -= parameter.ds_numel


def wait(handle: Any, handle_dependency: bool = True) -> None:
    """Of `AllGatherCoalescedHandle`: one operation takes apart what was gathered, not one for each parameter and rank."""
    if handle.complete or handle.quantization or handle.use_secondary_tensor:
        theirs_wait(handle, handle_dependency)
        return
    handle.allgather_handle.wait()
    ranks, first = handle.world_size, handle.partitions[0]
    gathered = first.as_strided((ranks, first.numel()), (first.numel(), 1))  # all: they are parts of one tensor
    sizes = [p.ds_tensor.ds_numel for p in handle.params]
    whole = [first.new_empty((ranks, size)) for size in sizes]
    torch.split_with_sizes_copy(gathered, sizes, dim=1, out=whole)
    _record_stream(gathered)
    for parameter, data in zip(handle.params, whole, strict=True):
        data = data.view(-1)[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.data = data.to(parameter.ds_tensor.dtype)
        parameter.ds_status = ZeroParamStatus.AVAILABLE
    handle.complete = True
    handle.partitions, handle.allgather_handle = [], None  # what was gathered: the next layer's may have its memory


def parameters_of(module: torch.nn.Module, recurse: bool = False) -> tuple[Any, ...]:
    """Of a module, or of all within; the latter are looked up once, as they stay the same once the engine is there."""
    if not recurse:
        return tuple(theirs_parameters(module))
    if module not in _parameters:
        _parameters[module] = tuple(theirs_parameters(module, recurse=True))
    return _parameters[module]


class DeepSpeedZeroOptimizer_Stage3(stage3.DeepSpeedZeroOptimizer_Stage3):  # type: ignore[misc]  # noqa: N801
    """Handles a bucket's gradients, and parameters that stay whole, together. Named as its base, for private attributes."""

    def partition_grads(self, parameters: list[Any], partitions: list[torch.Tensor]) -> Any:
        """Puts this rank's parts of gradients where they are added up; the last rank may have none of a small one."""
        if self.offload_optimizer:
            return super().partition_grads(parameters, partitions)
        _record_stream(*(parameter.grad for parameter in parameters))
        places = []
        for parameter, partition in zip(parameters, partitions, strict=True):
            place = self.__param_id_to_grad_partition[parameter.ds_id]
            places.append(place.narrow(0, 0, partition.numel()))
            parameter.grad = None
        if self.micro_step_id == 0:
            torch._foreach_copy_(places, partitions)
        else:
            torch._foreach_add_(places, [partition.to(self.gradient_accumulation_dtype) for partition in partitions])
        return places

    def _post_step(self, timer_names: list[str]) -> None:
        """Theirs gathers by a collective for each."""
        if missing := [p for p in self.persistent_parameters if p.ds_status == ZeroParamStatus.NOT_AVAILABLE]:
            missing[0].all_gather_coalesced(missing).wait()
        super()._post_step(timer_names)


def reduce_scatter(tensors: list[torch.Tensor], group: Any = None) -> list[torch.Tensor]:
    """As `reduce_scatter_coalesced`: one operation puts gradients in the order of ranks, not a slice for each and each rank.

    Args:
        tensors: gradients, whole. One that is alone (an embedding, a head) and divides by ranks is overwritten.
        group: of ranks.

    Returns:
        This rank's part of each, the mean over ranks; empty where it has none.
    """
    rank, ranks = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    sizes = [-(-tensor.numel() // ranks) for tensor in tensors]
    flat = [tensor.reshape(-1) for tensor in tensors]
    in_order = len(flat) == 1 and len(flat[0]) % ranks == 0
    by_rank = flat[0].view(ranks, -1) if in_order else torch._chunk_cat(flat, dim=0, num_chunks=ranks)
    by_rank.div_(ranks)
    _torch_reduce_scatter_fn(by_rank.view(-1), by_rank[rank], group=group)
    parts = torch.split(by_rank[rank], sizes)
    ends = (max(0, min(size, t.numel() - rank * size)) for size, t in zip(sizes, tensors, strict=True))
    return [part[:end] for part, end in zip(parts, ends, strict=True)]


def _record_stream(*tensors: torch.Tensor) -> None:
    """What the current stream has yet to do may read them after the host let go of them: their memory is not reused before.

    All of one device; to ask for its stream takes as long as the rest.
    """
    if tensors[0].is_cuda:
        stream = torch.cuda.current_stream()
        for tensor in tensors:
            tensor.record_stream(stream)


def install() -> None:
    """To be called before the engine is built."""
    parameter_offload.PartitionedParameterCoordinator = PartitionedParameterCoordinator
    partitioned_param_coordinator.iter_params = parameter_offload.iter_params = parameters_of
    AllGatherCoalescedHandle.wait = wait
    stage3.DeepSpeedZeroOptimizer_Stage3 = DeepSpeedZeroOptimizer_Stage3
    stage3.reduce_scatter_coalesced = reduce_scatter

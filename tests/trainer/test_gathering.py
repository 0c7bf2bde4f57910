"""What ZeRO-3 gathered is taken apart, and gradients are put together, as DeepSpeed does it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.runtime.comm import coalesced_collectives
from deepspeed.runtime.zero.partition_parameters import AllGatherCoalescedHandle, ZeroParamStatus

from finetune_trainer import gathering
from finetune_trainer.gathering import reduce_scatter, theirs_wait, wait


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("gathered_as", [torch.bfloat16, torch.float32])
def test_each_parameter_gets_its_parts_of_all_ranks_without_padding(ranks: int, gathered_as: torch.dtype) -> None:
    shapes = [(4, 6), (7,), (1,), (5, 3)]  # of 24, 7, 1 and 15 elements: most do not divide by the ranks
    parts = [-(-torch.Size(shape).numel() // ranks) for shape in shapes]
    flat = torch.randn(ranks * sum(parts)).to(gathered_as)
    whole = [taken_apart(flat, shapes, parts, ranks, by) for by in (wait, theirs_wait)]
    for ours, theirs in zip(*whole, strict=True):
        assert ours.data.dtype == torch.bfloat16 and torch.equal(ours.data, theirs.data)
        assert ours.ds_status == ZeroParamStatus.AVAILABLE


def taken_apart(flat: torch.Tensor, shapes: list[Any], parts: list[int], ranks: int, by: Any) -> list[Any]:
    parameters = [
        SimpleNamespace(
            ds_status=ZeroParamStatus.INFLIGHT,
            ds_shape=torch.Size(shape),
            ds_numel=torch.Size(shape).numel(),
            ds_tensor=SimpleNamespace(ds_numel=part, dtype=torch.bfloat16),
        )
        for shape, part in zip(shapes, parts, strict=True)
    ]
    partitions = list(flat.clone().chunk(ranks))
    by(AllGatherCoalescedHandle(SimpleNamespace(wait=lambda: None), parameters, partitions, ranks))
    return parameters


@pytest.mark.parametrize("shapes", [((4, 6), (7,), (1,), (5, 3)), ((7,),), ((4, 6),)], ids=["several", "one", "even"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_gradients_are_put_in_the_order_of_ranks(
    rank: int, shapes: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients = [torch.randn(shape) for shape in shapes]
    same = [gradient.clone() for gradient in gradients]
    if len(same) > 1:
        same[-1] = same[-1].t().contiguous().t()
    sent: list[torch.Tensor] = []

    def collective(everything: torch.Tensor, own: torch.Tensor, **_options: Any) -> None:
        sent.append(everything)
        assert torch.equal(everything.chunk(3)[rank], own)

    for module in (torch.distributed, coalesced_collectives.dist):
        monkeypatch.setattr(module, "get_rank", lambda _group=None: rank)
        monkeypatch.setattr(module, "get_world_size", lambda _group=None: 3)
    for module in (gathering, coalesced_collectives):
        monkeypatch.setattr(module, "_torch_reduce_scatter_fn", collective)
    ours, theirs = reduce_scatter(same), coalesced_collectives.reduce_scatter_coalesced(gradients)
    assert all(map(torch.equal, ours, theirs)) and len(ours) == len(shapes)
    assert sent[0].shape == sent[1].shape
    assert (sent[0].data_ptr() == same[0].data_ptr()) is (shapes == ((4, 6),)), "one that divides is not copied"

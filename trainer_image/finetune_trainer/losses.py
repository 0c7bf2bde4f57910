"""Cross-entropy of the head's outputs without all logits in memory at once.

The head's own module computes it: while targets are set, its forward pass returns the sum of token losses in place of logits.
Everything around the head stays as it is: ZeRO-3 gathers its weight as for any module, and a frozen or tied head is no
special case. Models that do something to the logits afterwards (soft cap, scale) are found out by a trial and take the plain
path.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from finetune_trainer.trial import trial

IGNORE = -100
CHUNK_BYTES = 256 * 2**20
"""float32 logits at once. A batch below this is computed in one piece by PyTorch's own functions."""
TILE = 128
"""Rows that a GPU's matrix product takes at a time; chunks of more are a multiple of it."""
log = logging.getLogger("finetune_trainer")


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunk_bytes: int = CHUNK_BYTES
) -> torch.Tensor:
    """Sum of cross-entropies of `hidden @ weight.T`, a float32 scalar.

    Args:
        hidden: (rows, positions, hidden size).
        weight: (vocabulary, hidden size).
        targets: (rows, positions); -100 is left out.
        chunk_bytes: float32 logits that may be in memory at once.
    """
    num_tokens, row_bytes = targets.numel(), 4 * weight.shape[0]
    if num_tokens * row_bytes <= chunk_bytes:
        return cross_entropy_sum(F.linear(hidden, weight), targets)
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    chunk = max(1, chunk_bytes // row_bytes)
    chunk -= chunk % TILE if chunk > TILE else 0
    loss: torch.Tensor = _Chunked.apply(hidden.flatten(0, 1), weight, targets.flatten(), chunk, differentiate)
    return loss


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum of cross-entropies in float32. `logits` has one more dimension than `targets`."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")


def measure(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of cross-entropies, and the number of targets that have the highest logit; no token has the one left out."""
    return cross_entropy_sum(logits, targets), (logits.argmax(dim=-1) == targets).sum()


class _Chunked(torch.autograd.Function):
    """Computes loss and gradients chunk by chunk in the forward pass, where the logits are; the backward pass only scales.

    The method of Liger's kernel (Hsu et al. 2024, arXiv:2410.10989) with PyTorch's operations, and without its wait for the
    device.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int, differentiate: bool
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_grad = torch.empty_like(hidden) if differentiate and ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight) if differentiate and ctx.needs_input_grad[1] else None
        for at in range(0, len(targets), chunk):
            part, labels = hidden[at : at + chunk], targets[at : at + chunk]
            scores = F.log_softmax((part @ weight.t()).float(), dim=-1)
            total += F.nll_loss(scores, labels, ignore_index=IGNORE, reduction="sum")
            if hidden_grad is None and weight_grad is None:
                continue
            learned = (labels != IGNORE).unsqueeze(1)
            at_label = labels.clamp(min=0).unsqueeze(1)
            gradient = scores.exp_()
            gradient.scatter_(1, at_label, gradient.gather(1, at_label) - 1.0).mul_(learned)
            gradient = gradient.to(hidden.dtype)
            if hidden_grad is not None:
                torch.mm(gradient, weight, out=hidden_grad[at : at + chunk])
            if weight_grad is not None:
                weight_grad.addmm_(gradient.t(), part)
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grad_outputs
        hidden_grad, weight_grad = ctx.saved_tensors
        # In place: nothing else holds them, and the head's gradient is as large as the head.
        scaled = [None if grad is None else grad.mul_(scale.to(grad.dtype)) for grad in (hidden_grad, weight_grad)]
        return scaled[0], scaled[1], None, None, None


class FusedHead:
    """Lets a head compute losses. `install` makes one where the model allows it."""

    def __init__(self, head: torch.nn.Linear, *, liger: bool, chunk_bytes: int = CHUNK_BYTES) -> None:
        self._head, self._liger, self._chunk_bytes = head, liger, chunk_bytes
        self._targets: torch.Tensor | None = None
        self.measured: tuple[torch.Tensor, torch.Tensor]
        """Without gradients: what `measure` says of the last forward pass."""
        head.forward = self._forward  # type: ignore[method-assign,assignment]

    def remove(self) -> None:
        """Makes the head an ordinary one again."""
        del self._head.forward

    def by_liger(self, tensor: torch.Tensor) -> bool:
        """Whether Liger's kernel computes losses where a tensor is.

        Not under a head that is trained: Liger adds to its gradient for every few rows, with a vocabulary of 128,256 32 times a
        step, 6 % of a step of 8B.
        """
        return self._liger and tensor.is_cuda and not self._head.weight.requires_grad

    @contextmanager
    def computing(self, targets: torch.Tensor) -> Iterator["FusedHead"]:
        """Within it the head returns the sum of losses, shaped (1, 1, 1), in place of logits."""
        self._targets = targets
        try:
            yield self
        finally:
            self._targets = None

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._targets is None:
            return F.linear(hidden, self._head.weight)
        if not torch.is_grad_enabled():
            self.measured = self._measure(hidden.flatten(0, 1), self._targets.flatten())
            return self.measured[0].view(1, 1, 1)
        if self.by_liger(hidden):
            from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

            loss = liger_fused_linear_cross_entropy(
                hidden.flatten(0, 1), self._head.weight, self._targets.flatten(), reduction="sum"
            )
        else:
            weight, chunk_bytes = self._head.weight, self._chunk_bytes
            if weight.requires_grad:  # each chunk reads and writes its whole gradient
                chunk_bytes = max(chunk_bytes, weight.nbytes)
            loss = linear_cross_entropy(hidden, weight, self._targets, chunk_bytes=chunk_bytes)
        shaped: torch.Tensor = loss.view(1, 1, 1)
        return shaped

    def _measure(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In chunks, so that an evaluation needs no more memory than a step."""
        chunk = max(1, self._chunk_bytes // (4 * self._head.weight.shape[0]))
        parts = [
            measure(F.linear(hidden[None, at : at + chunk], self._head.weight), targets[None, at : at + chunk])
            for at in range(0, len(targets), chunk)
        ]
        losses, counts = zip(*parts, strict=True)
        return torch.stack(losses).sum(), torch.stack(counts).sum()


def install(
    engine: Any, causal_lm: Any, arguments: dict[str, Any], targets: torch.Tensor, *, liger: bool
) -> FusedHead | None:
    """Makes the model's head compute losses; all ranks call it.

    Args:
        engine: what is called, the model or a wrapper of it.
        causal_lm: the causal language model of transformers in it.
        arguments: of the engine, for a small batch.
        targets: of that batch.
        liger: whether to use Liger's kernel on CUDA.

    Returns:
        None, said in the log, where the loss has to be computed from the model's logits.
    """
    head = causal_lm.get_output_embeddings()
    if type(head) is not torch.nn.Linear or head.bias is not None:
        log.info("cross-entropy: from all logits (the head, %s, is no plain linear layer)", type(head).__name__)
        return None
    fused = FusedHead(head, liger=liger)
    if not _returns_what_the_head_returns(engine, fused, arguments, targets):
        fused.remove()
        log.info("cross-entropy: from all logits (%s changes them after its head)", type(causal_lm).__name__)
        return None
    log.info("cross-entropy: %s", "Liger's fused kernel" if fused.by_liger(targets) else "fused with the head")
    return fused


def _returns_what_the_head_returns(
    engine: Any, fused: FusedHead, arguments: dict[str, Any], targets: torch.Tensor
) -> bool:
    """Whether nothing happens to the head's output before the model hands it on."""
    try:
        with trial(engine), fused.computing(targets):
            output = engine(**arguments).logits
    except torch.OutOfMemoryError:
        raise
    except (IndexError, RuntimeError, ValueError) as error:
        log.info("cross-entropy: a loss in place of logits does not pass through the model (%s)", error)
        return False
    return output.numel() == 1 and bool(output.item() == fused.measured[0].item())

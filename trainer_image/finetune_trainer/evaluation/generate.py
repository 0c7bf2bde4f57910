"""Generation with the model that is being trained: batched, with a key-value cache, greedy or sampled.

Draws no number from torch's generators: a sample's choice at a position comes from a hash of (seed, step, problem, sample,
position), so that training goes on as if nothing had been generated, and a resumed run generates the same.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.adapters import unwrap
from finetune_trainer.data.order import hash64
from finetune_trainer.evaluation.cache import give_room

TAIL_TOKENS = 16
"""So many tokens are decoded to look for a stop: each is at least a byte, and no stop is longer."""
KEPT_SHARE = 0.75
"""Ended texts leave the batch once no more than this share of its rows is unfinished: a row costs as much as another one."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float
    """0: the likeliest token."""
    top_p: float
    """Only the likeliest tokens that together have this probability; 1: all."""
    max_new_tokens: int


@dataclass(frozen=True)
class Prompt:
    """One text to continue."""

    ids: Sequence[int]
    stops: tuple[str, ...]
    seed: tuple[int, ...]
    """Tells this sample from all others: (seed, step, problem, sample)."""
    complete: Callable[[str], bool] = lambda text: True
    """Whether a text with a stop near its end needs no more."""


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Prompt],
    tokenizer: Any,
    sampling: Sampling,
    *,
    device: torch.device,
    end_ids: frozenset[int],
    go_on: Callable[[bool], bool],
) -> list[str]:
    """Continues a batch of prompts.

    Args:
        model: the DeepSpeed engine, or a plain model, in eval mode.
        prompts: padded on their left to the longest.
        tokenizer: decodes, and finds stops.
        sampling: how.
        device: the model's.
        end_ids: tokens that end a text.
        go_on: called after each token with whether texts are unfinished; whether to make another one. On several ranks it
            lets them take the same number of forward passes, which parameters that are spread over the ranks need.

    Returns:
        The new text of each, without the token that ended it; a stop, and what follows in the same token, is still there.
    """
    width = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
        mask[row, width - len(prompt.ids) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    texts: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # of the batch; ended texts leave it
    unfinished = set(rows)
    keyword = _cache_keyword(model)
    cache: Any = None
    for number in range(sampling.max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{keyword: cache},
        )
        cache = getattr(output, keyword)
        if number == 0:
            give_room(cache)
        chosen = choose(output.logits[:, -1], [(*prompts[row].seed, number) for row in rows], sampling)
        for row, token in zip(rows, chosen, strict=True):
            if row in unfinished and _ends(prompts[row], texts[row], token, tokenizer, end_ids):
                unfinished.discard(row)
        if not go_on(bool(unfinished)):
            break
        ids = torch.tensor(chosen, device=device)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if 0 < len(unfinished) <= KEPT_SHARE * len(rows) and hasattr(cache, "batch_select_indices"):
            kept = torch.tensor([at for at, row in enumerate(rows) if row in unfinished], device=device)
            cache.batch_select_indices(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]
            rows = sorted(unfinished)
    return [tokenizer.decode(text, skip_special_tokens=True) for text in texts]


def _ends(prompt: Prompt, text: list[int], token: int, tokenizer: Any, end_ids: frozenset[int]) -> bool:
    """Adds a token to its text. Returns whether it was the last one."""
    if token in end_ids:
        return True
    text.append(token)
    if not prompt.stops:
        return False
    tail = tokenizer.decode(text[-TAIL_TOKENS:])
    return any(stop in tail for stop in prompt.stops) and prompt.complete(tokenizer.decode(text))


def _cache_keyword(model: Any) -> str:
    """transformers 5 renames `past_key_values` to `cache`, model by model."""
    return "cache" if "cache" in inspect.signature(unwrap(model).forward).parameters else "past_key_values"


def choose(logits: torch.Tensor, seeds: Sequence[tuple[int, ...]], sampling: Sampling) -> list[int]:
    """The next token of each row.

    Args:
        logits: shape (rows, vocabulary).
        seeds: of each row.
        sampling: how.
    """
    if sampling.temperature == 0:
        best: list[int] = logits.argmax(dim=-1).tolist()
        return best
    # On the host: a cumulative sum has no deterministic order on CUDA, and one bit decides a token.
    probabilities = torch.softmax(logits.float().cpu().double() / sampling.temperature, dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
    sums = ordered.cumsum(dim=-1)
    kept = torch.where(sums - ordered < sampling.top_p, ordered, 0.0).cumsum(dim=-1)
    draws = torch.tensor([hash64(*seed) / 2**64 for seed in seeds], dtype=torch.float64)
    at = torch.searchsorted(kept, (draws * kept[:, -1])[:, None], right=True).clamp(max=logits.shape[-1] - 1)
    drawn: list[int] = tokens.gather(1, at).flatten().tolist()
    return drawn

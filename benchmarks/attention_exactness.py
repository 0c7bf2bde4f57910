"""Is attention exact? The loss of packed and padded rows with every implementation that this machine has.

    python benchmarks/attention_exactness.py [--dtype float32|bfloat16] [--samples 24] [--hidden 256] [--json out.json]

For each implementation, and for the plain loss, the one fused with the head and Liger's: the largest relative difference of a
row's loss from the sum of the losses of its samples, each alone (packed), and of a batch's loss from transformers' own loss with
an attention mask and unshifted labels (padded). The random Llama has grouped heads. Rounding of bfloat16 is about 4e-3; samples
that see each other show as more than 1e-2.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "operator"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "trainer_image"))

import numpy as np
import torch

from finetune_api.spec import Attention
from finetune_trainer import losses
from finetune_trainer.attention import Choice, use
from finetune_trainer.attention.choose import IMPLEMENTATIONS, why_not
from finetune_trainer.data.batches import Rows
from finetune_trainer.data.packing import pack_rows, single_rows
from finetune_trainer.data.store import TokenStore
from finetune_trainer.kernels import FLEX_BLOCK, Kernels
from finetune_trainer.step import loss_sum

VOCABULARY = 1024


def main() -> int:
    """Prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    store = make_store(options.samples)
    table: list[dict[str, Any]] = []
    print(
        f"{device}, {dtype}, torch {torch.__version__}\n| attention | loss | packed | padded |\n| --- | --- | --- | --- |"
    )
    for name in IMPLEMENTATIONS:
        obstacle = why_not(name, make_model(options.hidden, dtype, torch.device("cpu")), device, dtype)
        if name is Attention.FLEX and device.type == "cpu":
            obstacle = "trains on GPUs only"
        if obstacle is not None:
            print(f"| {name} | not run: {obstacle} | | |", flush=True)
            table.append({"attention": str(name), "not_run": obstacle})
            continue
        for way in ("plain", "fused", *(["liger"] if device.type == "cuda" else [])):
            model = make_model(options.hidden, dtype, device)
            row = {"attention": str(name), "loss": way, **differences(model, name, way, store, device)}
            table.append(row)
            print(f"| {name} | {way} | {row['packed']:.1e} | {row['padded']:.1e} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"device": str(device), "dtype": str(dtype), "rows": table}, indent=1))
    return 0


def make_model(hidden: int, dtype: torch.dtype, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=3,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        initializer_range=0.2,
        use_cache=False,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()


def make_store(count: int) -> TokenStore:
    """Samples of 5 to 200 random tokens; the first third of each is no target."""
    random = np.random.default_rng(0)
    lengths = random.integers(5, 200, size=count)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    targets = np.ones(int(offsets[-1]), dtype=bool)
    for start, length in zip(offsets, lengths, strict=False):
        targets[start : start + max(1, length // 3)] = False
    return TokenStore(random.integers(1, VOCABULARY, size=int(offsets[-1]), dtype=np.int32), targets, offsets)


@torch.no_grad()
def differences(model: Any, name: Attention, way: str, store: TokenStore, device: torch.device) -> dict[str, float]:
    """Largest relative differences of one implementation, see the top."""
    width = FLEX_BLOCK if name is Attention.FLEX else 1
    singles = Rows(store, single_rows(len(store)), packed=False, pad_to=width)
    padded = [list(range(at, min(at + 4, len(store)))) for at in range(0, len(store), 4)]
    theirs = [transformers_loss(model, singles, group, device) for group in padded]  # with its own attention, SDPA
    choice = Choice(name, "")
    use(model, choice)
    head = None
    if way != "plain":
        head = losses.FusedHead(model.get_output_embeddings(), liger=way == "liger", chunk_bytes=64 * VOCABULARY * 4)
    model.finetune_kernels = Kernels(choice, head)
    packed = Rows(store, pack_rows(store.lengths, 512), packed=True, pad_to=width)
    alone = [loss_sum(model, singles.batch([sample]), device).item() for sample in range(len(store))]
    together = [loss_sum(model, packed.batch([row]), device).item() for row in range(len(packed))]
    separate = [sum(alone[int(s)] for s in samples) for samples in packed.samples]
    ours = [loss_sum(model, singles.batch(group), device).item() for group in padded]
    return {"packed": _largest(together, separate), "padded": _largest(ours, theirs)}


def transformers_loss(model: Any, rows: Rows, group: list[int], device: torch.device) -> float:
    """Sum of losses as transformers computes it, from a mask and labels that are not shifted."""
    store, batch = rows.store, rows.batch(group)
    labels, mask = torch.full_like(batch.input_ids, losses.IGNORE), torch.zeros_like(batch.input_ids)
    for line, sample in enumerate(group):
        part = slice(int(store.offsets[sample]), int(store.offsets[sample + 1]))
        length = part.stop - part.start
        mask[line, :length] = 1
        labels[line, :length] = torch.where(
            torch.from_numpy(store.targets[part]), batch.input_ids[line, :length], losses.IGNORE
        )
    inputs = {"input_ids": batch.input_ids, "attention_mask": mask, "labels": labels}
    loss = model(**{key: value.to(device) for key, value in inputs.items()}).loss
    return float(loss.item()) * batch.num_targets


def _largest(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    sys.exit(main())

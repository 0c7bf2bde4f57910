"""Writes the result in Hugging Face layout: the adapter, or the whole model.

The weights are the ones that were evaluated, in their own precision, in an order that depends on nothing: the same weights
give the same bytes. The folder is written beside its place and renamed into it; where that cannot be (the root of a volume,
or a folder that also holds the checkpoints) files are moved in one by one and the result file comes last.
"""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from finetune_api.launch import LaunchSpec, PathSource
from finetune_trainer.claims import OUTPUT_FILE, output_claim
from finetune_trainer.files import fsync_path, write_json

RESULT_FILE = "train_result.json"
FILE_MODE, DIRECTORY_MODE = 0o644, 0o755
"""safetensors writes its files for their owner alone; a result is for others to read."""
log = logging.getLogger("finetune_trainer")


def gather_weights(engine: Any, spec: LaunchSpec, *, first: bool) -> dict[str, torch.Tensor]:
    """The result's weights on the host of rank 0; all ranks call it.

    Under ZeRO-3 one parameter after the other is put together, so that no GPU needs room for all.

    Args:
        engine: the DeepSpeed engine.
        spec: the launch; with an adapter only the trainable weights are taken.
        first: whether this is rank 0; the others get an empty dict.
    """
    weights = {}
    for name, parameter in engine.module.named_parameters():
        if spec.adapter is not None and not parameter.requires_grad:
            continue
        with _whole(parameter):
            if first:
                weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return weights


@contextlib.contextmanager
def _whole(parameter: Any) -> Iterator[None]:
    if hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield
    else:
        yield


def write_output(
    engine: Any, tokenizer: Any, weights: dict[str, torch.Tensor], spec: LaunchSpec, result: dict[str, Any]
) -> None:
    """Writes the output folder; rank 0 only.

    Args:
        engine: the DeepSpeed engine, for the model's configuration.
        tokenizer: is saved beside the weights, with the chat template that was trained on.
        weights: from `gather_weights`.
        spec: the launch.
        result: the content of train_result.json.
    """
    final = Path(spec.output_dir)
    in_place = final.is_mount() or Path(spec.checkpoint.dir).is_relative_to(final)
    parent = final if in_place else final.parent
    temporary = parent / f".{final.name or 'output'}.tmp-{spec.job.uid}-{spec.attempt}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if spec.adapter is not None:
        _write_adapter(engine.module, weights, spec, result["model_revision"], temporary)
    else:
        engine.module.save_pretrained(str(temporary), state_dict=weights, is_main_process=True)
    tokenizer.save_pretrained(str(temporary))
    write_json(temporary / OUTPUT_FILE, output_claim(spec.job))
    write_json(temporary / RESULT_FILE, result)
    for path in temporary.rglob("*"):
        path.chmod(DIRECTORY_MODE if path.is_dir() else FILE_MODE)
        fsync_path(path)
    fsync_path(temporary)
    if in_place:
        _move_files(temporary, final)
    else:
        _replace(temporary, final)
    log.info("exported to %s", final)


def _write_adapter(
    model: Any, weights: dict[str, torch.Tensor], spec: LaunchSpec, revision: str | None, folder: Path
) -> None:
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.inference_mode = True
    source = spec.model.source  # peft has put the local path of a hub's model here
    config.base_model_name_or_path = source.path if isinstance(source, PathSource) else source.repo_id
    config.revision = revision
    config.target_modules = sorted(config.target_modules)  # a set has no order
    # `save_embedding_layers="auto"` would ask the hub about the base model.
    tensors = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    save_file(dict(sorted(tensors.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _replace(temporary: Path, final: Path) -> None:
    """Swaps folders; the old output is gone only when the new one is in place."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    fsync_path(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _move_files(temporary: Path, final: Path) -> None:
    """Fills the root of a volume: the old result file goes first, the new one comes last."""
    (final / RESULT_FILE).unlink(missing_ok=True)
    names = sorted((p.name for p in temporary.iterdir()), key=lambda name: (name == RESULT_FILE, name))
    for name in names:
        target = final / name
        if target.is_dir():
            shutil.rmtree(target)
        (temporary / name).replace(target)
    for path in final.glob("*.safetensors*"):  # of an earlier run with more files; anything else is left alone
        if path.name not in names:
            path.unlink()
    temporary.rmdir()
    fsync_path(final)

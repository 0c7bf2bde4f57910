"""Writes the result in Hugging Face layout: the adapter (and, if the job wants it, the merged model), or the whole model.

The weights are the ones that were evaluated, in their own precision, in an order that depends on nothing: the same weights
give the same bytes. The folder is written beside its place and renamed into it; where that cannot be (the root of a volume, a
folder that also holds the checkpoints, or one in a folder that is closed to the trainer) files are moved in one by one and the
result file comes last.
"""

import logging
import os
import shutil
from glob import escape
from pathlib import Path
from typing import Any

import torch

from finetune_api.launch import LaunchSpec, PathSource
from finetune_api.spec import CHAT_TEMPLATES
from finetune_trainer.adapters import unwrap
from finetune_trainer.claims import OUTPUT_FILE, AttemptClaim, output_claim
from finetune_trainer.data.chat_templates import end_ids
from finetune_trainer.files import fsync_path, write_json
from finetune_trainer.shards import whole, write_model
from finetune_trainer.tensor_file import write_tensors
from finetune_trainer.vision import PROCESSOR_FILES, PROJECTOR, TOWER, part_of

RESULT_FILE = "train_result.json"
ADAPTER_CONFIG = "adapter_config.json"
MERGED_FOLDER = "merged"
FILE_MODE, DIRECTORY_MODE = 0o644, 0o755
"""transformers and peft write some files for their owner alone; a result is for others to read."""
log = logging.getLogger("finetune_trainer")


def write_output(
    engine: Any, tokenizer: Any, model: Path, spec: LaunchSpec, result: dict[str, Any], claim: AttemptClaim | None
) -> None:
    """Writes the output folder; all ranks call it and help to put weights together, rank 0 writes.

    An attempt that was cut off in the middle has left its files beside the folder; the next one begins with removing them.

    Args:
        engine: the DeepSpeed engine.
        tokenizer: is saved beside the weights, with the chat template that was trained on.
        model: the folder that was trained from; the files of its image processor are copied.
        spec: the launch.
        result: the content of train_result.json.
        claim: rank 0's; None on the others.

    Raises:
        SupersededError: a newer attempt owns the job; the output is as it was.
    """
    final = Path(spec.output_dir)
    in_place = (
        final.is_mount() or Path(spec.checkpoint.dir).is_relative_to(final) or not os.access(final.parent, os.W_OK)
    )
    parent = final if in_place else final.parent
    ours = f".{final.name or 'output'}.tmp-{spec.job.uid}-"
    temporary = parent / f"{ours}{spec.attempt}"
    if claim is not None:
        claim.check()
        for left in parent.glob(f"{escape(ours)}*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir(parents=True)
    _write_weights(engine.module, spec, result["model_revision"], temporary, first=claim is not None)
    if claim is None:
        return
    merged = temporary / MERGED_FOLDER
    for folder in (temporary, *([merged] if merged.is_dir() else [])):
        tokenizer.save_pretrained(str(folder))
        for name in PROCESSOR_FILES:
            if (model / name).is_file():
                shutil.copyfile(model / name, folder / name)
        write_json(folder / OUTPUT_FILE, output_claim(spec.job))
        write_json(folder / RESULT_FILE, result)
    for path in temporary.rglob("*"):
        path.chmod(DIRECTORY_MODE if path.is_dir() else FILE_MODE)
        fsync_path(path)
    fsync_path(temporary)
    claim.check()  # a large model takes its time
    if in_place:
        _move_files(temporary, final)
    else:
        _replace(temporary, final)
    log.info("exported to %s", final)


def set_ends(model: Any, tokenizer: Any, spec: LaunchSpec, end: str | None) -> None:
    """Makes generation with the result stop where the answers that it has learned end.

    Args:
        model: its generation configuration is changed.
        tokenizer: its end of text is changed if the job named the template.
        spec: the launch.
        end: the token that ends an answer; None: nothing is changed.
    """
    if end is None:
        return
    if spec.model.chat_template in CHAT_TEMPLATES:
        tokenizer.eos_token = end
    config = getattr(unwrap(model), "generation_config", None)
    new = tokenizer.convert_tokens_to_ids(end)
    if config is not None and new not in (ids := end_ids(config)):
        config.eos_token_id = [*ids, new]


def _write_weights(model: Any, spec: LaunchSpec, revision: str | None, folder: Path, *, first: bool) -> None:
    if not hasattr(model, "peft_config"):
        if first:
            _write_config(model, folder)
        write_model(model, folder, spec.output.max_shard_bytes, first=first)
        return
    adapter = _gather_adapter(model, first=first)
    if spec.output.merge_adapter:
        if first:
            (folder / MERGED_FOLDER).mkdir()
            _write_config(model.get_base_model(), folder / MERGED_FOLDER)
        write_model(model, folder / MERGED_FOLDER, spec.output.max_shard_bytes, first=first)
    if first:
        _write_adapter(model, adapter, spec, revision, folder)


def _gather_adapter(model: Any, *, first: bool) -> dict[str, torch.Tensor]:
    """The trained weights on the host of rank 0; the others get an empty dict. Adapters are small, and so are a vision tower and
    a projector: they go into one file."""
    weights = {}
    parts = {part_of(name) for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or part_of(name) in parts - {None}:
            with whole([parameter]):
                if first:
                    weights[name] = parameter.detach().to("cpu", copy=True).contiguous()
    return weights


def _write_config(model: Any, folder: Path) -> None:
    """What `save_pretrained` writes beside the weights."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(str(folder))
    if model.can_generate():
        model.generation_config.save_pretrained(str(folder))


def _write_adapter(
    model: Any, weights: dict[str, torch.Tensor], spec: LaunchSpec, revision: str | None, folder: Path
) -> None:
    from peft import get_peft_model_state_dict

    config = model.peft_config["default"]
    config.inference_mode = True
    source = spec.model.source  # peft has put the local path of a hub's model here
    config.base_model_name_or_path = source.path if isinstance(source, PathSource) else source.repo_id
    config.revision = revision
    config.target_modules = sorted(config.target_modules)  # a set has no order
    # A tower or projector that was trained whole is what peft calls a module to save: it takes the place of the base model's.
    beside = {name: tensor for name, tensor in weights.items() if part_of(name) and ".lora_" not in name}
    config.modules_to_save = [
        part for part in (TOWER, PROJECTOR) if any(part_of(name) == part for name in beside)
    ] or None
    # `save_embedding_layers="auto"` would ask the hub about the base model.
    tensors = get_peft_model_state_dict(model, state_dict=weights, save_embedding_layers=False)
    write_tensors(folder / "adapter_model.safetensors", {**tensors, **beside})
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
    """Fills a folder that cannot be replaced: the old result file goes first, the new one comes last."""
    (final / RESULT_FILE).unlink(missing_ok=True)
    names = sorted((p.name for p in temporary.iterdir()), key=lambda name: (name == RESULT_FILE, name))
    for name in names:
        target = final / name
        if target.is_dir():
            shutil.rmtree(target)
        (temporary / name).replace(target)
    if MERGED_FOLDER not in names and (final / MERGED_FOLDER / OUTPUT_FILE).is_file():  # of an earlier run
        shutil.rmtree(final / MERGED_FOLDER)
    # Of an earlier run with more files, or with an adapter, which would be put on the new model. Anything else is left alone.
    for path in (*final.glob("*.safetensors*"), final / ADAPTER_CONFIG):
        if path.name not in names:
            path.unlink(missing_ok=True)
    temporary.rmdir()
    fsync_path(final)

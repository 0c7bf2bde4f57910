"""Imported by a test's ranks (`TEST_HOOK`): writes down what the rank computes with, into $TEST_FACTS/rank-N.json at its end.

Reads the engine and counts; changes nothing.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

import finetune_trainer.engine as ds
import finetune_trainer.setup as setup

build_engine, set_learning_rate, export = ds.build_engine, ds.set_learning_rate, setup.export
facts: dict[str, Any] = {"batches": [], "rates": [], "layer_calls": 0, "dropped": 0, "dropout_inputs": 0}


def build(model: Any, spec: Any, config: dict[str, Any]) -> Any:
    from finetune_trainer.optimizer_state import masters

    engine = build_engine(model, spec, config)
    base = engine.module.get_base_model() if hasattr(engine.module, "get_base_model") else engine.module
    optimizer, modules = ds.base_optimizer(engine), dict(engine.module.named_modules())
    parameters = dict(engine.module.named_parameters())
    offload = engine.zero_offload_optimizer()
    facts.update(
        optimizer=type(optimizer).__name__,
        weight_decay=[group["weight_decay"] for group in optimizer.param_groups],
        zero_stage=engine.zero_optimization_stage(),
        offloaded_to=str(offload.device) if offload else None,
        masters=[[str(master.dtype), master.device.type, master.numel()] for master in masters(engine)],
        whole={name: getattr(p, "ds_numel", p.numel()) for name, p in parameters.items()},
        held={name: getattr(p, "ds_tensor", p).numel() for name, p in parameters.items()},
        dtypes=sorted({str(p.dtype) for p in parameters.values()}),
        trained=[name for name, p in parameters.items() if p.requires_grad],
        attention=base.config._attn_implementation,
        scaling=sorted({m.scaling["default"] for m in modules.values() if hasattr(m, "lora_A")}),
    )
    engine.module.register_forward_pre_hook(_note_batch, with_kwargs=True)
    next(m for name, m in modules.items() if name.endswith("layers.0.mlp")).register_forward_pre_hook(_note_layer)
    for name, module in modules.items():
        if name.endswith("layers.0.mlp.up_proj.lora_dropout.default"):
            module.register_forward_hook(_note_dropout)
    return engine


def _training(module: Any) -> bool:
    return bool(module.training and facts["rates"])  # not the trial of the head before the first step


def _note_batch(module: Any, _arguments: Any, keywords: dict[str, Any]) -> None:
    if _training(module):
        facts["batches"].append(list(keywords["input_ids"].shape))


def _note_layer(module: Any, _arguments: Any) -> None:
    facts["layer_calls"] += _training(module)


def _note_dropout(module: Any, arguments: Any, output: Any) -> None:
    if _training(module):
        facts["dropped"] += int(((output == 0) & (arguments[0] != 0)).sum())
        facts["dropout_inputs"] += int((arguments[0] != 0).sum())


def set_rate(engine: Any, rate: float) -> None:
    set_learning_rate(engine, rate)
    facts["rates"] += sorted({group["lr"] for group in ds.base_optimizer(engine).param_groups})


def finish(spec: Any, training: Any, *arguments: Any) -> None:
    state = ds.base_optimizer(training.engine).state
    facts["moments"] = sorted({str(values["exp_avg"].dtype) for values in state.values() if "exp_avg" in values})
    facts["loader_workers"] = training.batches.workers
    facts["linear"] = torch.nn.functional.linear.__name__
    (Path(os.environ["TEST_FACTS"]) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(facts))
    export(spec, training, *arguments)


ds.build_engine, ds.set_learning_rate, setup.export = build, set_rate, finish

"""Where the result goes, how often is saved, and where the course of training is shown."""

from typing import Any

from finetune_cli.convert.conversion import Conversion
from finetune_cli.convert.rules.evaluation import whole_steps
from finetune_cli.convert.rules.model import secret
from finetune_cli.convert.uris import ON_THIS_MACHINE, join

KEEP_ALL = 100
"""The most checkpoints that are kept."""
_TRACKERS = ("wandb", "tensorboard")


def place(c: Conversion) -> None:
    """`output.uri`."""
    folder = c.config["output_dir"]
    if folder is None:
        c.refuse("output_dir", "where the result goes is missing", "`output_dir: saves/NAME`, below `--output-uri`")
        return
    if not c.options.output_uri:
        c.refuse(
            "output_dir",
            ON_THIS_MACHINE,
            "`--output-uri pvc://CLAIM[/FOLDER]` for a volume of the cluster, or `--output-uri file:///FOLDER` for"
            " `finetune run`",
            "overwrite_output_dir",
        )
        return
    uri = join(c.options.output_uri, folder)
    if uri is None:
        c.refuse("output_dir", "leaves the folder of `--output-uri`", "a path without `..`", "overwrite_output_dir")
        return
    c.put("output.uri", uri, "output_dir")
    if "overwrite_output_dir" in c.config:
        c.note("overwrite_output_dir", "no effect here: a job replaces its own earlier result, and never another job's")


def saving(c: Conversion) -> None:
    """`checkpoint`: checkpoints serve recovery, so they are written whatever `save_strategy` says."""
    strategy = c.config["save_strategy"]
    c.settle("checkpoint.everySteps", "save_strategy")
    steps = whole_steps(c, "save_steps")
    if steps:
        c.put("checkpoint.everySteps", steps, "save_steps")
    if strategy != "steps":
        c.note(
            "save_strategy",
            f"checkpoints serve recovery and are written every {steps} steps; the result does not depend on it",
        )
    limit = c.config["save_total_limit"]
    if limit is not None and 1 <= limit <= KEEP_ALL:
        c.put("checkpoint.keep", limit, "save_total_limit")
        return
    c.put("checkpoint.keep", KEEP_ALL, "save_total_limit")
    c.note(
        "save_total_limit",
        f"LLaMA-Factory would keep all checkpoints, here {KEEP_ALL} are the most. Each holds the optimizer's state: of a large"
        " model set a small number, 2 are enough to recover",
    )


def tracking(c: Conversion) -> None:
    """`tracking`: Weights & Biases and TensorBoard."""
    names = [name for name in c.config["report_to"] or [] if name != "none"]
    unknown = [name for name in names if name not in _TRACKERS]
    if unknown:
        instead = "`report_to: wandb`, `report_to: tensorboard`, or both as a list"
        c.refuse("report_to", f"`{unknown[0]}` is not supported", instead)
    wandb, board = "wandb" in names or c.config["use_wandb"], "tensorboard" in names
    c.settle("tracking", "report_to", "use_wandb")
    if c.config["use_wandb"]:
        c.note("use_wandb", "LLaMA-Factory has no such key (`report_to: wandb` is its own); taken as that")
    elif "use_wandb" in c.config and wandb:
        c.note("use_wandb", "no effect: `report_to` has wandb")
    if wandb:
        _wandb(c)
    else:
        _unused(c, ("wandb_project", "wandb_run_name", "wandb_entity", "run_name", "project"), "`report_to: wandb`")
    if board:
        _tensor_board(c)
    else:
        _unused(c, ("logging_dir",), "`report_to: tensorboard`")


def _wandb(c: Conversion) -> None:
    project = c.config["wandb_project"] or c.config["project"]
    c.put("tracking.wandb.project", project, "wandb_project" if "wandb_project" in c.config else "project")
    if "project" in c.config:
        text = (
            "no effect: `wandb_project` decides"
            if "wandb_project" in c.config
            else "transformers: for Trackio; here W&B's"
        )
        c.note("project", text)
    run = c.config["wandb_run_name"] or c.config["run_name"]
    if run:
        c.put("tracking.wandb.runName", run, "wandb_run_name" if "wandb_run_name" in c.config else "run_name")
    if "wandb_run_name" in c.config and "run_name" in c.config:
        c.note("run_name", "no effect: `wandb_run_name` decides")
    if "wandb_entity" in c.config:
        c.put("tracking.wandb.entity", c.config["wandb_entity"], "wandb_entity")
    if c.options.wandb_secret:
        c.put("tracking.wandb.credentialsRef", secret(c.options.wandb_secret))
    else:
        key = "use_wandb" if c.config["use_wandb"] else "report_to"
        c.note(key, "without `--wandb-secret NAME` (or NAME/KEY) the run has no API key and can only be an offline one")


def _tensor_board(c: Conversion) -> None:
    if not c.options.output_uri:
        c.settle("tracking.tensorBoard.uri", "logging_dir")
        return  # `place` has already said that it is missing
    folder: Any = c.config["logging_dir"] or "tensorboard"
    uri = join(c.options.output_uri, folder)
    result = str(c.spec.get("output", {}).get("uri", ""))
    if uri is None or (result and f"{uri}/".startswith(f"{result}/")):
        c.note(
            "logging_dir",
            "lies inside or outside what can be written there; `tensorboard` below `--output-uri` is used",
        )
        uri = join(c.options.output_uri, "tensorboard")
    c.put("tracking.tensorBoard.uri", uri, "logging_dir", "report_to")


def _unused(c: Conversion, keys: tuple[str, ...], needs: str) -> None:
    for key in keys:
        if key in c.config:
            c.note(key, f"no effect without {needs}")

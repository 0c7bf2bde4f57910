"""When is evaluated, which checkpoint is the best, and how text is generated for benchmarks."""

from typing import Any

from finetune_cli.convert.conversion import Conversion, decimal

_METRICS = {
    "loss": "EvalLoss",
    "eval_loss": "EvalLoss",
    "accuracy": "TokenAccuracy",
    "eval_accuracy": "TokenAccuracy",
    "humaneval": "HumanEvalPassAt1",
    "mbpp": "MBPPPassAt1",
}
_PASS = {"HumanEval": "HumanEvalPassAt1", "MBPP": "MBPPPassAt1"}


def schedule(c: Conversion) -> None:
    """`training.evalEverySteps`."""
    key = (
        "eval_strategy"
        if "eval_strategy" in c.config or "evaluation_strategy" not in c.config
        else "evaluation_strategy"
    )
    if "evaluation_strategy" in c.config:
        wins = "" if key == "evaluation_strategy" else ", which stands here too and decides"
        c.note("evaluation_strategy", f"an old name: `eval_strategy` is today's{wins}")
    strategy = c.config[key]
    has_sets = bool(c.spec.get("datasets", {}).get("evaluation"))
    if "do_eval" in c.config:
        c.note("do_eval", "evaluation sets are evaluated before the first step and at the end in any case")
    if not c.config["eval_dataset"] and strategy != "no":
        c.refuse(key, "there is nothing to evaluate on", "`eval_dataset`", "eval_steps", "logging_steps")
    elif strategy == "epoch":
        c.refuse(key, "evaluation is timed in steps", "`eval_strategy: steps` with `eval_steps`", "eval_steps")
    elif strategy == "steps":
        timer = "eval_steps" if c.config["eval_steps"] else "logging_steps"
        c.settle("training.evalEverySteps", key)
        steps = whole_steps(c, timer)
        if steps and has_sets:
            c.put("training.evalEverySteps", steps, timer)
    else:
        c.settle("training.evalEverySteps", key)
        if c.config["eval_dataset"] and not c.config["do_eval"]:
            c.note(
                "eval_dataset",
                "evaluated before the first step and at the end; LLaMA-Factory would not, without `do_eval`",
            )
    if "eval_steps" in c.config and "eval_steps" not in c.accounted:
        c.note("eval_steps", "no effect without `eval_strategy: steps`")
    if "logging_steps" in c.config and "logging_steps" not in c.accounted:
        c.note("logging_steps", "no effect here: how often a line is logged is the trainer's own matter")


def whole_steps(c: Conversion, key: str) -> int | None:
    """A number of steps; a share of all steps needs `max_steps`, since nothing else says how many there will be."""
    value, total = c.config[key], c.config["max_steps"]
    if value >= 1:
        return int(value)
    if value > 0 and total > 0:
        return max(1, -int(-value * total // 1))
    c.refuse(key, "a share of all steps is not supported without `max_steps`", "a number of steps")
    return None


def best(c: Conversion) -> None:
    """`evaluation`: the metric of the best checkpoint, what is exported, early stopping."""
    name, patience = c.config["metric_for_best_model"], c.config["early_stopping_steps"]
    keys = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
    if not c.config["load_best_model_at_end"] and patience is None:
        for key in keys:
            if key in c.config:
                off = key == "load_best_model_at_end"
                c.note(key, "the last state is exported" if off else "no effect without `load_best_model_at_end: true`")
        return
    if not c.config["eval_dataset"]:
        key = "early_stopping_steps" if patience is not None else keys[0]
        c.refuse(key, "there is nothing to evaluate on", "`eval_dataset`", *keys, "early_stopping_steps")
        return
    sets = c.spec.get("datasets", {}).get("evaluation", [])
    metric = _METRICS.get(name.lower()) if name else _default_metric(c, sets)
    if metric is None:
        known = ", ".join(f"`{m}`" for m in _METRICS)
        c.refuse("metric_for_best_model", f"not measured here; there are {known}", "one of them", *keys)
    else:
        _metric(c, name or "loss", metric, sets)
    c.put("evaluation.exportBest", c.config["load_best_model_at_end"], "load_best_model_at_end")
    if patience is not None:
        c.put("evaluation.earlyStoppingPatience", patience, "early_stopping_steps")


def _metric(c: Conversion, name: str, metric: str, sets: list[dict[str, Any]]) -> None:
    """`evaluation.metric`, which something in `eval_dataset` has to measure."""
    needed = next((benchmark for benchmark, ours in _PASS.items() if ours == metric), None)
    if sets and all(entry.get("benchmark") != needed for entry in sets):
        c.refuse(
            "metric_for_best_model",
            f"nothing in `eval_dataset` measures `{name}`",
            f"{f'`{needed.lower()}`' if needed else 'a held-out set'} in `eval_dataset`",
        )
    c.put("evaluation.metric", metric, "metric_for_best_model")
    greater, rises = c.config["greater_is_better"], metric != "EvalLoss"
    if greater is not None and greater != rises:
        c.refuse("greater_is_better", f"the best {name} is the {'greatest' if rises else 'least'}", "remove the line")
    c.settle("evaluation.metric", "greater_is_better")


def _default_metric(c: Conversion, sets: list[dict[str, Any]]) -> str:
    """The loss, as in transformers; where only benchmarks are evaluated, the first one's pass@1."""
    if not sets or any("benchmark" not in entry for entry in sets):
        return "EvalLoss"
    metric = _PASS[sets[0]["benchmark"]]
    c.note("metric_for_best_model", f"no held-out data, so no loss: the best checkpoint is that of {metric}")
    return metric


def generation(c: Conversion) -> None:
    """`evaluation.generation`: only benchmarks generate text."""
    keys = ("do_sample", "temperature", "top_p", "max_new_tokens")
    if not any("benchmark" in entry for entry in c.spec.get("datasets", {}).get("evaluation", [])):
        for key in keys:
            if key in c.config:
                c.note(key, "no effect: text is generated only for humaneval and mbpp in `eval_dataset`")
        return
    if not c.config["do_sample"]:
        c.put("evaluation.generation.temperature", "0", "do_sample")
        if "temperature" in c.config:
            c.note("temperature", "no effect with `do_sample: false`")
    elif "temperature" in c.config:
        c.put("evaluation.generation.temperature", decimal(c.config["temperature"]), "temperature", "do_sample")
    if "do_sample" in c.config and "do_sample" not in c.accounted:
        c.note("do_sample", "no effect without `temperature`: the benchmark's default is used")
    if "top_p" in c.config:
        c.put("evaluation.generation.topP", decimal(c.config["top_p"]), "top_p")
    if "max_new_tokens" in c.config:
        c.put("evaluation.generation.maxNewTokens", c.config["max_new_tokens"], "max_new_tokens")

"""Data sets: names in `dataset_info.json` become entries with URI, format, columns and tags."""

from pathlib import Path
from typing import Any

from finetune_cli.convert.config import Problem, is_number
from finetune_cli.convert.conversion import Conversion, decimal
from finetune_cli.convert.dataset_info import HUB_NAME, EntryReader
from finetune_cli.convert.files import find
from finetune_cli.convert.rules.model import secret
from finetune_cli.convert.source import Source, SourceError, read_source

INFO = "dataset_info.json"
BENCHMARKS = {"humaneval": ("HumanEval", "openai/openai_humaneval"), "mbpp": ("MBPP", "google-research-datasets/mbpp")}
"""What people write in `eval_dataset` for a benchmark, our name, and where Hugging Face has its problems."""


def resolve(c: Conversion) -> None:
    """`datasets`: all of `dataset` and `eval_dataset`."""
    names = _once(c, "dataset")
    info = _info(c)
    if not names:
        c.refuse("dataset", "the data set is missing", "`dataset: NAME`, with NAME in dataset_info.json")
    train = [entry for name in names if (entry := _entry(c, "dataset", name, info)) is not None]
    c.put("datasets.train", _mixed(c, train, names), "dataset", "dataset_dir", "max_samples")
    found = [entry for name in _once(c, "eval_dataset") if (entry := _evaluation(c, name, info)) is not None]
    if found:
        c.put("datasets.evaluation", found, "eval_dataset")
    elif "eval_dataset" in c.config:
        c.settle("datasets.evaluation", "eval_dataset")
    media = c.config["media_dir"]
    if media is not None and media != c.config["dataset_dir"]:
        c.refuse(
            "media_dir", "images lie in the folder of their records", "one folder for both, or full paths in the data"
        )
    c.settle("datasets", "media_dir")


def _once(c: Conversion, key: str) -> list[str]:
    """The names under a key, each once."""
    given = c.config[key] or []
    names = list(dict.fromkeys(given))
    if len(names) < len(given):
        c.note(key, "a name that stands there again does not count again, in LLaMA-Factory neither")
    return names


def _info(c: Conversion) -> Source | None:
    """The file that names data sets; None, and refused, if it is needed and cannot be read."""
    folder = c.config["dataset_dir"]
    if isinstance(folder, dict):
        lines = {place[1:]: line for place, line in c.config.source.lines.items() if place[:1] == ("dataset_dir",)}
        return Source(c.config.source.name, c.config.source.folder, folder, lines)
    if folder == "ONLINE":
        return None
    held_out = [name for name in c.config["eval_dataset"] or [] if name.lower() not in BENCHMARKS]
    names = [*(c.config["dataset"] or []), *held_out]
    if str(folder).startswith("REMOTE:"):
        c.refuse("dataset_dir", f"a {INFO} on a hub is not read", f"a folder with a copy of that {INFO}")
        return None
    path, looked = find(c, str(Path(str(folder)) / INFO))
    if path is None:
        if names:
            key = "dataset_dir" if "dataset_dir" in c.config else "dataset"
            c.refuse(
                key,
                f"there is no {INFO} to look up `{names[0]}`; looked for {looked}",
                "`dataset_dir` with the folder that has it",
            )
        return None
    try:
        source = read_source(path, str(Path(str(folder)) / INFO))
    except SourceError as error:
        c.problems.append(Problem(c.config.source.at("dataset_dir"), str(error)))
        return None
    if not isinstance(source.data, dict):
        c.problems.append(Problem(source.name, "must be a mapping of names to data sets"))
        return None
    return source


def _entry(c: Conversion, key: str, name: str, info: Source | None) -> dict[str, Any] | None:
    """One data set; None if it was refused."""
    if c.config["dataset_dir"] == "ONLINE":
        if not HUB_NAME.match(name):
            c.refuse(key, f"`{name}` is no data set of a hub", "`org/name`, the repository's full name")
            return None
        info = Source(c.config.source.name, c.config.source.folder, {name: {"hf_hub_url": name}}, {})
    if info is None:
        return None
    if name not in info.data:
        c.refuse(key, f"`{name}` is not in {info.name}", f"one of {', '.join(f'`{n}`' for n in list(info.data)[:12])}")
        return None
    reader = EntryReader(c, info, name)
    entry = reader.read()
    return _common(c, entry) if entry is not None else None


def _common(c: Conversion, entry: dict[str, Any]) -> dict[str, Any]:
    limits = [n for n in (c.config["max_samples"], entry.get("maxSamples")) if n is not None]
    if limits:
        entry["maxSamples"] = min(limits)
    if c.options.hub_secret and entry["uri"].startswith("hf://"):
        entry["credentialsRef"] = secret(c.options.hub_secret)
    return entry


def _evaluation(c: Conversion, name: str, info: Source | None) -> dict[str, Any] | None:
    if name.lower() not in BENCHMARKS or (info is not None and name in info.data):
        return _entry(c, "eval_dataset", name, info)
    ours, hub = BENCHMARKS[name.lower()]
    given = c.options.benchmark_uri
    uri = f"{given.rstrip('/')}/{name.lower()}.jsonl" if given else f"hf://datasets/{hub}"
    c.note(
        "eval_dataset",
        f"`{name}` is no data set in LLaMA-Factory; here it is the benchmark {ours}, with problems from {uri}",
    )
    return _common(c, {"uri": uri, "benchmark": ours})


def _mixed(c: Conversion, entries: list[dict[str, Any]], names: list[str]) -> list[dict[str, Any]]:
    """Adds weights where `mix_strategy` asks for them."""
    strategy, given = c.config["mix_strategy"], c.config["interleave_probs"]
    if strategy == "concat":
        if given is not None:
            c.refuse("interleave_probs", "it is for an interleaving `mix_strategy`", "`mix_strategy: interleave_under`")
        c.settle("datasets.train", "mix_strategy")
        return entries
    if strategy == "interleave_once":
        instead = "`mix_strategy: concat`, which has every record once too"
        c.refuse("mix_strategy", "taking turns until each is used up is not supported", instead, "interleave_probs")
        return entries
    try:
        weights = [float(p) for p in given] if given is not None else [1.0] * len(names)
    except ValueError:
        weights = []
    c.settle("datasets.train", "mix_strategy", "interleave_probs")
    if len(weights) != len(names) or not all(is_number(w) and w > 0 for w in weights):
        c.refuse(
            "interleave_probs", f"must be {len(names)} numbers above 0, one for each of `dataset`", "such as `0.7,0.3`"
        )
        return entries
    if len(names) < 2:
        for key in ("mix_strategy", "interleave_probs"):
            if key in c.config:
                c.note(key, "no effect: there is one data set, in LLaMA-Factory too")
        return entries
    if len(entries) == len(names):
        c.note(
            "mix_strategy",
            "an epoch has as many rows as all data sets together; LLaMA-Factory's ends with the first or last set",
        )
        return [{**entry, "weight": decimal(w)} for entry, w in zip(entries, weights, strict=True)]
    return entries

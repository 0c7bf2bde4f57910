"""Data sets: names in `dataset_info.json` become entries with URI, format, columns and tags."""

import re
from pathlib import Path
from typing import Any

from finetune_cli.convert.config import Problem, show
from finetune_cli.convert.conversion import Conversion, decimal
from finetune_cli.convert.files import find
from finetune_cli.convert.rules.model import secret
from finetune_cli.convert.source import Source, SourceError, read_source
from finetune_cli.convert.uris import join

INFO = "dataset_info.json"
BENCHMARKS = {"humaneval": ("HumanEval", "openai/openai_humaneval"), "mbpp": ("MBPP", "google-research-datasets/mbpp")}
"""What people write in `eval_dataset` for a benchmark, our name, and where Hugging Face has its problems."""
_FORMATS = {"alpaca": "Alpaca", "sharegpt": "ShareGPT", "openai": "Messages"}
_COLUMNS = {
    "Alpaca": ("prompt", "query", "response", "history", "system", "tools", "images"),
    "Text": ("prompt",),
}
_TURNS = ("messages", "system", "tools", "images")
_ALL_COLUMNS = {"prompt", "query", "response", "history", "messages", "system", "tools", "images", "videos", "audios"}
_ALL_COLUMNS |= {"chosen", "rejected", "kto_tag"}
_PREFERENCES = ("chosen", "rejected", "kto_tag")
_TAGS = {
    "role_tag": "roleTag",
    "content_tag": "contentTag",
    "user_tag": "userTag",
    "assistant_tag": "assistantTag",
    "observation_tag": "observationTag",
    "function_tag": "functionTag",
    "system_tag": "systemTag",
}
_OPENAI_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
"""LLaMA-Factory's defaults, which are ShareGPT's also for `formatting: openai`."""
_ATTRIBUTES = {"hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "file_name"}
_ATTRIBUTES |= {"formatting", "ranking", "subset", "split", "folder", "num_samples", "columns", "tags"}
_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".arrow")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*$")


def resolve(c: Conversion) -> None:
    """`datasets`: all of `dataset` and `eval_dataset`."""
    names = c.config["dataset"]
    info = _info(c)
    if not names:
        c.refuse("dataset", "the data set is missing", "`dataset: NAME`, with NAME in dataset_info.json")
    train = [entry for name in names or [] if (entry := _entry(c, "dataset", name, info)) is not None]
    c.put("datasets.train", _mixed(c, train, names or []), "dataset", "dataset_dir", "max_samples")
    found = [entry for name in c.config["eval_dataset"] or [] if (entry := _evaluation(c, name, info)) is not None]
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
        if not _HUB_NAME.match(name):
            c.refuse(key, f"`{name}` is no data set of a hub", "`org/name`, the repository's full name")
            return None
        info = Source(c.config.source.name, c.config.source.folder, {name: {"hf_hub_url": name}}, {})
    if info is None:
        return None
    if name not in info.data:
        c.refuse(key, f"`{name}` is not in {info.name}", f"one of {', '.join(f'`{n}`' for n in list(info.data)[:12])}")
        return None
    reader = _Reader(c, info, name)
    entry = reader.read()
    return _common(c, entry) if entry is not None else None


def _common(c: Conversion, entry: dict[str, Any]) -> dict[str, Any]:
    limits = [n for n in (c.config["max_samples"], entry.get("maxSamples")) if n is not None]
    if limits:
        entry["maxSamples"] = min(limits)
    if c.options.hub_secret and entry["uri"].startswith("hf://"):
        entry["credentialsRef"] = secret(c.options.hub_secret)
    return entry


def _format(c: Conversion, formatting: str) -> str:
    return "Text" if c.config["stage"] == "pt" else _FORMATS[formatting]


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
    if len(weights) != len(names) or any(w <= 0 for w in weights):
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


class _Reader:
    """Reads one entry of `dataset_info.json`."""

    def __init__(self, c: Conversion, info: Source, name: str) -> None:
        self.c, self.info, self.name = c, info, name
        self.data: Any = info.data[name]
        self.failed = False

    def read(self) -> dict[str, Any] | None:
        """The entry for `datasets`; None if it was refused."""
        if not isinstance(self.data, dict):
            self._refuse("", "must be a mapping", "")
            return None
        for attribute in self.data:
            if attribute not in _ATTRIBUTES:
                self._refuse(attribute, f"`{attribute}` is no attribute of a data set", "remove the line")
        formatting = self.data.get("formatting") or "alpaca"
        if formatting not in _FORMATS:
            self._refuse(
                "formatting", f"must be one of {', '.join(_FORMATS)}, got `{formatting}`", "alpaca or sharegpt"
            )
            return None
        if self.data.get("ranking"):
            self._refuse(
                "ranking", "pairs of answers are for preference training", "a data set of the answers that are wanted"
            )
        if self.c.config["stage"] == "pt" and formatting != "alpaca":
            self._refuse(
                "formatting", "`stage: pt` reads one text of a record", "alpaca with `columns: {prompt: text}`"
            )
        entry: dict[str, Any] = {"uri": self._uri(), "format": _format(self.c, formatting)}
        columns = self._columns(entry["format"])
        tags = self._tags(entry["format"])
        entry |= {"columns": columns} if columns else {}
        entry |= {"tags": tags} if tags else {}
        entry |= self._selection()
        return None if self.failed else entry

    def _uri(self) -> str:
        data = self.data
        if hub := data.get("hf_hub_url"):
            if not _HUB_NAME.match(str(hub)):
                self._refuse("hf_hub_url", f"must be `org/name`, got `{hub}`", "the repository's full name")
            folder = f"/{str(data['folder']).strip('/')}" if data.get("folder") else ""
            return f"hf://datasets/{hub}{folder}"
        for attribute, what in (
            ("ms_hub_url", "ModelScope is not supported"),
            ("om_hub_url", "Modelers is not supported"),
            ("script_url", "a data set is never a program"),
            ("cloud_file_name", "object stores are not read"),
        ):
            if attribute in data:
                self._refuse(attribute, what, "`hf_hub_url`, or a file on a volume as `file_name`")
                return ""
        if not isinstance(data.get("file_name"), str):
            self._refuse("file_name", "says neither `file_name` nor `hf_hub_url`", "one of them")
            return ""
        return self._file(data["file_name"])

    def _file(self, name: str) -> str:
        ending = Path(name).suffix.lower()
        if ending and ending not in _ENDINGS:
            self._refuse("file_name", f"`{ending}` files are not read", f"one of {', '.join(_ENDINGS)}")
        if not self.c.options.data_uri:
            self._refuse(
                "file_name",
                "a file is only known on this machine",
                "`--data-uri pvc://CLAIM[/FOLDER]` for the volume's folder that holds what `dataset_dir` holds, or"
                " `--data-uri file:///FOLDER` for `finetune run`",
            )
            return ""
        uri = join(self.c.options.data_uri, name)
        if uri is None:
            self._refuse("file_name", "leaves the folder of the data", "a path without `..`")
        return uri or ""

    def _columns(self, form: str) -> dict[str, str]:
        columns = self.data.get("columns")
        if columns is None:
            return {"Text": {"text": "instruction"}, "Messages": {"messages": "conversations"}}.get(form, {})
        allowed = _COLUMNS.get(form, _TURNS)
        result: dict[str, str] = {}
        for column, theirs in columns.items():
            if column not in _ALL_COLUMNS:
                self._refuse(
                    ("columns", column), f"`{column}` is no column of a data set", f"one of {', '.join(allowed)}"
                )
            elif theirs is None:
                continue
            elif column in _PREFERENCES:
                self._refuse(
                    ("columns", column), "it is for preference training", "a data set of the answers that are wanted"
                )
            elif column in ("videos", "audios"):
                self._refuse(("columns", column), f"{column} are not supported", "a data set of images and text")
            elif column not in allowed:
                self._note(("columns", column), f"no effect: format {form} has no `{column}`")
            else:
                result["text" if form == "Text" else column] = str(theirs)
        if form == "Alpaca":
            for column, own in (("query", "input"), ("prompt", "instruction"), ("response", "output")):
                if column not in result:
                    text = f"LLaMA-Factory then has none; here a record's `{own}` counts, if there is one"
                    self._note("columns", f"`columns` leaves out `{column}`: {text}")
        return result

    def _tags(self, form: str) -> dict[str, str]:
        tags = self.data.get("tags") or (_OPENAI_TAGS if form == "Messages" else {})
        if not tags:
            return {}
        if form not in ("ShareGPT", "Messages"):
            self._note("tags", f"no effect: format {form} has no turns")
            return {}
        result = {}
        for tag, theirs in tags.items():
            if tag not in _TAGS:
                self._refuse(("tags", tag), f"`{tag}` is no tag", f"one of {', '.join(_TAGS)}")
            elif theirs is not None:
                result[_TAGS[tag]] = str(theirs)
        return result

    def _selection(self) -> dict[str, Any]:
        """Split, subset and number of records."""
        result: dict[str, Any] = {}
        split, hub = self.data.get("split"), "hf_hub_url" in self.data
        if hub:
            result["split"] = str(split or "train")
        elif split not in (None, "train"):
            self._refuse("split", f"a file has no split `{split}`", "a file of its own for each split")
        if self.data.get("subset"):
            self._refuse(
                "subset", "subsets of a hub's data set are not chosen by name", "`folder` with the subset's folder"
            )
        if not hub and self.data.get("folder"):
            self._note("folder", "no effect: it is for data sets of a hub")
        number = self.data.get("num_samples")
        if number is not None:
            if not isinstance(number, int) or number < 1:
                self._refuse("num_samples", f"must be a whole number above 0, got `{show(number)}`", "")
            else:
                result["maxSamples"] = number
                self._note(
                    "num_samples",
                    "the first so many records; LLaMA-Factory takes them at random, and repeats them if there are fewer",
                )
        return result

    def _refuse(self, attribute: str | tuple[str, ...], what: str, instead: str) -> None:
        self.failed = True
        self.c.problems.append(Problem(self._at(attribute), f"data set `{self.name}`: {what}", instead))

    def _note(self, attribute: str | tuple[str, ...], text: str) -> None:
        self.c.say(self._at(attribute), f"data set `{self.name}`: {text}")

    def _at(self, attribute: str | tuple[str, ...]) -> str:
        return self.info.at(self.name, *((attribute,) if isinstance(attribute, str) else attribute))

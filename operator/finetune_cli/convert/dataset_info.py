"""One entry of `dataset_info.json`: LLaMA-Factory's attributes of a data set as ours."""

import re
from pathlib import Path
from typing import Any

from finetune_cli.convert.config import Problem, show
from finetune_cli.convert.conversion import Conversion
from finetune_cli.convert.source import Source
from finetune_cli.convert.templates import WITHOUT_FUNCTIONS
from finetune_cli.convert.uris import ON_THIS_MACHINE, join

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
HUB_NAME = re.compile(r"^[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*$")


class EntryReader:
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
        for attribute in ("columns", "tags"):
            if not isinstance(self.data.get(attribute) or {}, dict):
                self._refuse(attribute, f"`{attribute}` must be a mapping", f"`{attribute}: {{OURS: THEIRS}}`")
                return None
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
            if not HUB_NAME.match(str(hub)):
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
                f"its file {ON_THIS_MACHINE}",
                "`--data-uri pvc://CLAIM[/FOLDER]` for the volume's folder that holds what `dataset_dir` holds, or"
                " `--data-uri file:///FOLDER` for `finetune run`",
            )
            return ""
        here = name.startswith("/")
        if here and not self.c.options.data_uri.startswith("file://"):
            self._refuse(
                "file_name",
                f"the absolute path {ON_THIS_MACHINE}",
                "a path below `dataset_dir`, and its file below `--data-uri`",
            )
            return ""
        uri = join("file:///" if here else self.c.options.data_uri, name)
        if uri is None:
            self._refuse("file_name", "leaves the folder of the data", "a path without `..`")
        return uri or ""

    def _columns(self, form: str) -> dict[str, str]:
        columns = self.data.get("columns")
        if not columns:
            if form == "Text":
                self._note(
                    "", "a record's `input` is left out; LLaMA-Factory puts it behind `instruction` and a line break"
                )
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
            elif form == "Text" and column == "query":
                self._refuse(
                    ("columns", column),
                    "LLaMA-Factory trains `prompt`, a line break and `query`; here a text is one column",
                    "a column with both, as `prompt`",
                )
            elif column not in allowed:
                self._note(("columns", column), f"no effect: format {form} has no `{column}`")
            else:
                result["text" if form == "Text" else column] = str(theirs)
        if "tools" in result and (template := _named_template(self.c)) in WITHOUT_FUNCTIONS:
            self._refuse(
                ("columns", "tools"),
                f"the template `{template}` has no form for functions",
                "`template: llama3`, chatml or qwen, or `--chat-template FILE` with a template that has one",
            )
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
        if hub and "[" in str(split):
            self._refuse(
                "split", "a part of a split is not read", "the whole split, with `num_samples` for its first records"
            )
        elif hub:
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


def _named_template(c: Conversion) -> str | None:
    """The name of the template that will be used, or the text of one that was given."""
    return c.options.chat_template or c.config["template"]


def _format(c: Conversion, formatting: str) -> str:
    return "Text" if c.config["stage"] == "pt" else _FORMATS[formatting]

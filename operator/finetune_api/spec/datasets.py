"""`spec.datasets`: what is trained and evaluated on."""

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, DatasetUri, Weight, rules
from finetune_api.spec.common import HUB_ONLY, SecretKeyRef, Short


class DatasetFormat(StrEnum):
    AUTO = "Auto"
    ALPACA = "Alpaca"
    SHARE_GPT = "ShareGPT"
    MESSAGES = "Messages"
    TEXT = "Text"


class BenchmarkName(StrEnum):
    HUMAN_EVAL = "HumanEval"
    MBPP = "MBPP"


class ColumnsSpec(ApiModel):
    """What a data set calls the columns that its format needs; absent: the format's own names."""

    prompt: Short | None = None
    """Alpaca's `instruction`."""
    query: Short | None = None
    """Alpaca's `input`."""
    response: Short | None = None
    """Alpaca's `output`."""
    history: Short | None = None
    """Alpaca's `history`: pairs of earlier questions and answers."""
    messages: Short | None = None
    """The list of turns: ShareGPT's `conversations`, Messages' `messages`."""
    system: Short | None = None
    """`system`: the system turn's text."""
    tools: Short | None = None
    """`tools`: the functions that the assistant may call, a list or its JSON text."""
    images: Short | None = None
    """`images`: for each `<image>` in the turns, in their order, a path that begins at the data file's folder, or the bytes of
    an image file (Parquet and Arrow, also as {bytes, path}). For models that see."""
    text: Short | None = None
    """Text's `text`."""


class TagsSpec(ApiModel):
    """How the turns of ShareGPT and Messages are written; absent: the format's own names."""

    role_tag: Short | None = None
    """Key of a turn's role: ShareGPT's `from`, Messages' `role`."""
    content_tag: Short | None = None
    """Key of a turn's text: ShareGPT's `value`, Messages' `content`."""
    user_tag: Short | None = None
    """The user's role: ShareGPT's `human` (or `user`), Messages' `user`."""
    assistant_tag: Short | None = None
    """The assistant's role: ShareGPT's `gpt` (or `assistant`), Messages' `assistant`."""
    observation_tag: Short | None = None
    """The role of a function's result: ShareGPT's `observation` (or `tool`), Messages' `tool`."""
    function_tag: Short | None = None
    """The role of a turn in which the assistant calls functions, its text being JSON: ShareGPT's `function_call`. Messages
    has `tool_calls` in the assistant's turn instead."""
    system_tag: Short | None = None
    """The system turn's role: `system`."""


_NOT_HERE = "which `format: {}` does not have"


_DATASET_RULES = (
    ("!has(self.revision) || self.uri.startsWith('hf://')", f"`revision` {HUB_ONLY}"),
    ("!has(self.credentialsRef) || self.uri.startsWith('hf://')", f"`credentialsRef` {HUB_ONLY}"),
    (
        "!has(self.tags) || self.format in ['ShareGPT', 'Messages']",
        "`tags` needs `format: ShareGPT` or `format: Messages`",
    ),
    (
        "!has(self.columns) || self.format != 'Alpaca' || !(has(self.columns.messages) || has(self.columns.text))",
        f"`columns` names `messages` or `text`, {_NOT_HERE.format('Alpaca')}",
    ),
    (
        "!has(self.columns) || !(self.format in ['ShareGPT', 'Messages']) || !(has(self.columns.prompt)"
        " || has(self.columns.query) || has(self.columns.response) || has(self.columns.history)"
        " || has(self.columns.text))",
        "`columns` names `prompt`, `query`, `response`, `history` or `text`, "
        "which `format: ShareGPT` and `format: Messages` do not have",
    ),
    (
        "!has(self.columns) || self.format != 'Text' || !(has(self.columns.prompt) || has(self.columns.query)"
        " || has(self.columns.response) || has(self.columns.history) || has(self.columns.messages)"
        " || has(self.columns.system) || has(self.columns.tools) || has(self.columns.images))",
        f"`columns` names more than `text`, {_NOT_HERE.format('Text')}",
    ),
)
"""Of train and evaluation data; pydantic does not join a subclass's rules with its parent's."""


class DatasetSpec(ApiModel):
    model_config = {"json_schema_extra": rules(*_DATASET_RULES)}

    uri: DatasetUri
    """A .jsonl, .json, .csv, .parquet or .arrow file, a folder of them, or a folder written by Hugging Face's `save_to_disk`:
    `hf://datasets/org/name[/path]`, `pvc://claim/path` or `file:///path`."""
    format: DatasetFormat = DatasetFormat.AUTO
    """Layout of one record. Auto tells it from the first record's keys."""
    max_samples: Annotated[int, Field(ge=1)] | None = None
    """Use only so many records, from the start."""
    revision: Short | None = None
    """Branch, tag or commit of an `hf://` data set."""
    credentials_ref: SecretKeyRef | None = None
    """Token for an `hf://` data set that is private or gated."""
    split: Short | None = None
    """Of a saved `DatasetDict`: the split to read. Of a folder of files: only those whose name it is, as
    `train_sft-00000-of-00003.parquet`, else those that have it as a word."""
    columns: ColumnsSpec | None = None
    """What this data set calls the columns of its format."""
    tags: TagsSpec | None = None
    """How this data set writes turns and roles."""
    weight: Weight | None = None
    """Relative share of this data set in the rows of an epoch, a decimal in quotes; an epoch has as many rows as all data
    sets together, and a data set with too few of them repeats, one with too many takes turns. With `packing` a row holds
    samples of one data set only. Absent: every record once an epoch."""


class EvaluationDatasetSpec(DatasetSpec):
    model_config = {
        "json_schema_extra": rules(
            *_DATASET_RULES,
            (
                "!has(self.benchmark) || (self.format == 'Auto' && !has(self.columns) && !has(self.split))",
                "`format`, `columns` and `split` are for held-out data; remove them: a `benchmark`'s problems have a layout of"
                " their own",
            ),
        )
    }

    benchmark: BenchmarkName | None = None
    """The records are this benchmark's problems: the model writes programs, which are run in a sandbox, and pass@k is
    measured (see `evaluation.generation`). Absent: held-out data."""


class DatasetsSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            (
                "self.train.all(d, has(d.weight)) || !self.train.exists(d, has(d.weight))",
                "set `weight` on every data set in `train`, or on none",
            ),
            (
                "!has(self.evaluation) || !self.evaluation.exists(d, has(d.weight))",
                "`weight` is only for data sets in `train`; remove it from `evaluation`",
            ),
            (
                "!has(self.evaluation) || ['HumanEval', 'MBPP'].all(name,"
                " self.evaluation.filter(e, has(e.benchmark) && e.benchmark == name).size() <= 1)",
                "each `benchmark` may stand in `evaluation` once",
            ),
        )
    }

    train: Annotated[list[DatasetSpec], Field(min_length=1, max_length=16)]
    """Data sets to train on, mixed record by record."""
    evaluation: Annotated[list[EvaluationDatasetSpec], Field(max_length=16)] = []
    """Held-out data sets, whose loss is measured, and benchmarks, whose programs are run: before the first step, every
    `training.evalEverySteps` and at the end."""

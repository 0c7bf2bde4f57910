"""Files and formats: the same conversation in every container, and what each format's names and tools become."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec import ColumnsSpec, DatasetFormat, TagsSpec
from finetune_trainer.data.formats import Sample, detect, to_sample
from finetune_trainer.data.layout import layout_of
from finetune_trainer.data.records import Record, read_records
from finetune_trainer.data.sources import data_files
from finetune_trainer.errors import ConfigError, DataError, StorageError, TrainerError
from tests.trainer import tiny

ROWS = [{"instruction": f"say {n}", "input": "", "output": 'the, "cat"\nsleeps' if n else "a"} for n in range(2500)]


def write(folder: Path, kind: str) -> Path:
    """ROWS as one data set."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    table = pa.Table.from_pylist(ROWS)
    if kind == "csv":
        import csv

        with (folder / "a.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["instruction", "input", "output"])
            writer.writeheader()
            writer.writerows(ROWS)
        return folder / "a.csv"
    if kind == "parquet":
        pq.write_table(table, folder / "a.parquet")
        return folder / "a.parquet"
    if kind in ("file", "stream"):
        make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with make(folder / "a.arrow", table.schema) as sink:
            sink.write_table(table, max_chunksize=1800)
        return folder / "a.arrow"
    saved = folder / "saved"
    _save(saved / "train", table)
    (saved / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    return saved / "train" if kind == "saved" else saved


def _save(folder: Path, table: Any) -> None:
    """What `datasets.Dataset.save_to_disk` writes (datasets 5.2), with the shards named against their order."""
    import pyarrow as pa

    folder.mkdir(parents=True)
    for name, part in (("b.arrow", table.slice(0, 1000)), ("a.arrow", table.slice(1000))):
        with pa.ipc.new_stream(folder / name, part.schema) as sink:
            sink.write_table(part)
    state = {"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


@pytest.mark.parametrize("kind", ["csv", "parquet", "file", "stream", "saved", "dict"])
def test_every_container_gives_the_same_records_with_their_places(tmp_path: Path, kind: str) -> None:
    records = list(read_records(write(tmp_path, kind), "x", "train" if kind == "dict" else None))
    assert [record.value for record in records] == ROWS
    place = {"saved": "a.arrow: row 1500", "dict": "a.arrow: row 1500"}.get(kind, "row 2500")
    assert records[-1].place.endswith(place)


def test_a_split_of_a_folder_goes_by_names(tmp_path: Path) -> None:
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000", "trained", "test/a"):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "dataset_infos.json").write_text("{}")
    texts = {split: [r.value["text"] for r in read_records(tmp_path, "x", split)] for split in ("train", "test")}
    assert texts["train"] == ["data/train-00000-of-00002", "data/train-00001-of-00002"]
    assert texts["test"] == ["data/test-00000", "test/a"]
    assert len(list(read_records(tmp_path, "x"))) == 5


SFT = [f"data/{name}-00000-of-00001.parquet" for name in ("test_gen", "test_sft", "train_gen", "train_sft")]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (SFT, "train_sft", SFT[3:]),
        (["train-sft-00000-of-00001.parquet", "train-gen-00000-of-00001.parquet"], "train-sft", [0]),
        (["train-00000-of-00001-0a1b.parquet", "train_gen-00000-of-00001.parquet"], "train", [0]),
        (["train.jsonl", "train_gen.jsonl"], "train", [0]),
        (["train_sft/a.jsonl", "test_sft/a.jsonl"], "train_sft", [0]),
        (["alpaca_train.jsonl", "dolly_train.jsonl", "dolly_test.jsonl"], "train", [0, 1]),
        (["dolly_train-00000-of-00002.csv", "dolly_train-00001-of-00002.csv"], "train", [0, 1]),
        (["train_data/a-00000-of-00001.csv", "train_data/b-00000-of-00001.csv"], "train", [0, 1]),
        (["train1.csv", "train2.csv", "trained.csv"], "train", [0, 1]),
        (["v1.csv", "v12.csv"], "v1", [0]),
        (["dev.json", "training.json"], "validation", [0]),
        (["dev.json", "training.json"], "train", [1]),
        (["alpaca_data_zh_51k.json", "more.json"], "train", [0, 1]),
        (SFT, "sft", "`sft` fits several splits of x: `test_sft`, `train_sft`; set `split` to one of them"),
        (SFT, "train", "`train_gen`, `train_sft`"),
        (["train_sft.jsonl", "test_sft.jsonl"], "sft", "`test_sft`, `train_sft`"),
        (["en/train.jsonl", "en/test.jsonl"], "en", "`test`, `train`"),
        (["train/sft.jsonl", "test/sft.jsonl"], "sft", "`test`, `train`"),
        (["a.json", "dev.json"], "train", "no file of x has `train` in its name; there are `a.json`, `dev.json`"),
        (["a.json"], "json", "no file of x has `json` in its name"),
    ],
)  # fmt: skip
def test_a_split_has_the_files_that_say_so(tmp_path: Path, names: list[str], split: str, chosen: Any) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    if isinstance(chosen, str):
        with pytest.raises(ConfigError) as caught:
            data_files(tmp_path, "x", split)
        assert chosen in str(caught.value)
    else:
        wanted = [name if isinstance(name, str) else names[name] for name in chosen]
        assert data_files(tmp_path, "x", split) == [tmp_path / name for name in wanted]


def _break(folder: Path, kind: str) -> tuple[Path, str | None]:
    if kind == "two-splits":
        return write(folder, "dict"), None
    if kind == "no-such-split":
        return write(folder, "dict"), "validation"
    if kind == "missing-shard":
        (write(folder, "saved") / "a.arrow").unlink()
        return folder / "saved" / "train", None
    if kind == "split-of-a-file":
        return tiny.write_jsonl(folder / "a.jsonl", [{}]), "train"
    if kind == "no-file-of-split":
        tiny.write_jsonl(folder / "d" / "a.jsonl", [{}])
        return folder / "d", "test"
    texts = {
        "short-row": b"a,b\n1,2\n3\n",
        "open-quote": b'a,b\n1,2\n"3,4\n',
        "twice": b"a,a\n1,2\n",
        "latin1": b"a,b\n1,\xe9\n",
    }
    if kind in texts:
        (folder / "a.csv").write_bytes(texts[kind])
        return folder / "a.csv", None
    whole = write(folder, kind.split("-")[1])
    content = whole.read_bytes()
    whole.write_bytes(content[: len(content) * 9 // 10] if kind.startswith("cut") else b"no arrow at all" * 10)
    return whole, None


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("two-splits", "datasets.split: x has the splits `train`, `test`"),
        ("no-such-split", "no split `validation`; it has `train`, `test`"),
        ("missing-shard", "missing: a.arrow"),
        ("split-of-a-file", "datasets.split: x is one file"),
        ("no-file-of-split", "no file of x has `test` in its name; there are `a.jsonl`"),
        ("short-row", "a.csv: row 2 has 1 fields and the first line names 2"),
        ("open-quote", "a.csv: row 2: broken CSV"),
        ("twice", "names a column twice"),
        ("latin1", "a.csv: not UTF-8"),
        ("cut-file", "a.arrow"),
        ("cut-stream", "a.arrow"),
        ("other-stream", "a.arrow: broken Arrow"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, kind: str, says: str) -> None:
    path, split = _break(tmp_path, kind)
    with pytest.raises((DataError, ConfigError)) as caught:
        list(read_records(path, "x", split))
    assert says in str(caught.value)


def sample(record: dict[str, Any], form: str = "Auto", columns: Any = None, tags: Any = None) -> Sample:
    names = ColumnsSpec.model_validate(columns) if columns else None
    own = TagsSpec.model_validate(tags) if tags else None
    place = Record(record, "a.jsonl:1")
    layout = detect(place, names) if form == "Auto" else layout_of(DatasetFormat(form), names, own)
    return to_sample(place, layout)


CALL = {"name": "weather", "arguments": {"city": "Rome"}}
CALLS = [{"type": "function", "function": CALL}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
CHAT = [
    {"role": "system", "content": "be red"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "", "tool_calls": CALLS},
    {"role": "tool", "content": "12"},
    {"role": "assistant", "content": "the cat"},
]
SHARE = [
    {"from": "human", "value": "hi"},
    {"from": "function_call", "value": json.dumps(CALL)},
    {"from": "observation", "value": "12"},
    {"from": "gpt", "value": "the cat"},
]
AS_STRING = {"id": "c1", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}
TAGGED = [
    {"who": "sys", "says": "be red"},
    {"who": "me", "says": "hi"},
    {"who": "call", "says": json.dumps([CALL])},
    {"who": "result", "says": "12"},
    {"who": "bot", "says": "the cat"},
]
TAGS = {
    "roleTag": "who", "contentTag": "says", "userTag": "me", "assistantTag": "bot", "systemTag": "sys",
    "functionTag": "call", "observationTag": "result",
}  # fmt: skip


@pytest.mark.parametrize(
    ("record", "form", "columns", "tags"),
    [
        ({"messages": CHAT, "tools": TOOLS}, "Auto", None, None),
        ({"conversations": SHARE, "system": "be red", "tools": json.dumps([TOOLS[0]["function"]])}, "Auto", None, None),
        (
            {"chat": SHARE, "sys": "be red", "fn": TOOLS},
            "Auto",
            {"messages": "chat", "system": "sys", "tools": "fn"},
            None,
        ),
        ({"chat": CHAT, "fn": json.dumps(TOOLS)}, "Auto", {"messages": "chat", "tools": "fn"}, None),
        ({"messages": TAGGED, "tools": TOOLS}, "ShareGPT", {"messages": "messages"}, TAGS),
        (
            {"messages": json.dumps(CHAT[1:]), "system": "be red", "tools": TOOLS},
            "Messages",
            {"system": "system"},
            None,
        ),
    ],
    ids=["messages", "sharegpt", "sharegpt-columns", "messages-columns", "tags", "json-text-and-system-column"],
)
def test_tools_calls_and_names_become_one_conversation(record: Any, form: str, columns: Any, tags: Any) -> None:
    made = sample(record, form, columns, tags)
    assert made.messages is not None
    assert [message.as_turn() for message in made.messages] == CHAT
    assert made.tools == TOOLS


def test_calls_with_text_arguments_and_null_content() -> None:
    turns = [
        CHAT[1],
        {"role": "assistant", "content": None, "tool_calls": [AS_STRING]},
        {**CHAT[3], "tool_call_id": "c1"},
    ]
    made = sample({"messages": turns}).messages
    assert made is not None
    assert made[1].tool_calls == [{**CALLS[0], "id": "c1"}]
    assert made[2].as_turn() == {"role": "tool", "content": "12", "tool_call_id": "c1"}


@pytest.mark.parametrize("kind", ["parquet", "arrow", "jsonl"])
def test_a_table_gives_calls_and_functions_no_keys_of_other_rows(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def record(key: str) -> dict[str, Any]:
        call = {"name": "f", "arguments": {key: "Rome", "near": [{key: 1}]}}
        schema = {"type": "object", "properties": {key: {"type": "string", "enum": ["Rome", None]}}}
        turns = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}]
        return {"messages": turns, "functions": [{"name": "f", "parameters": schema}]}

    records = [record("city"), record("zone")]
    table = pa.Table.from_pylist(records)
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    elif kind == "arrow":
        with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as sink:
            sink.write_table(table)
    else:
        tiny.write_jsonl(tmp_path / "a.jsonl", records)
    layout = layout_of(DatasetFormat.MESSAGES, ColumnsSpec(tools="functions"))
    for made, wanted in zip(map(to_sample, read_records(tmp_path, "x"), [layout] * 2), records, strict=True):
        assert made.tools == [{"type": "function", "function": wanted["functions"][0]}]
        assert made.messages is not None
        assert made.messages[1].tool_calls == wanted["messages"][1]["tool_calls"]


def test_nulls_that_were_written_stay(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    call = {"type": "function", "function": {"name": "f", "arguments": {"zone": None}}}
    turns = [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    pq.write_table(pa.Table.from_pylist([{"messages": json.dumps(turns)}]), tmp_path / "a.parquet")
    tiny.write_jsonl(tmp_path / "b.jsonl", [{"messages": turns}])
    for record in read_records(tmp_path, "x"):
        made = to_sample(record, layout_of(DatasetFormat.MESSAGES)).messages
        assert made is not None
        assert made[1].tool_calls == [call]


@pytest.mark.parametrize(
    ("record", "question"),
    [
        ({"instruction": "say", "input": "cat"}, "say\n\ncat"),
        ({"instruction": "", "input": "cat"}, "cat"),
        ({"instruction": "say", "input": ""}, "say"),
        ({"instruction": "say", "input": None}, "say"),
        ({"instruction": "", "input": ""}, ""),
    ],
)
def test_alpaca_joins_the_parts_that_there_are(record: dict[str, Any], question: str) -> None:
    made = sample({**record, "output": "a"}).messages
    assert made is not None
    assert [message.content for message in made] == [question, "a"]


@pytest.mark.parametrize(
    ("record", "form", "columns"),
    [
        ({"conversations": [{"from": "system", "value": "be red"}, *SHARE], "system": "be blue"}, "Auto", None),
        ({"messages": CHAT, "system": "be blue"}, "Messages", {"system": "system"}),
    ],
    ids=["sharegpt", "messages"],
)
def test_a_system_turn_counts_before_the_column(record: Any, form: str, columns: Any) -> None:
    made = sample(record, form, columns).messages
    assert made is not None
    assert [message.content for message in made if message.role == "system"] == ["be red"]


def test_alpaca_and_text_by_columns() -> None:
    record = {"q": "hi", "more": "now", "a": "the cat", "old": '[["x", "y"]]'}
    columns = {"prompt": "q", "query": "more", "response": "a", "history": "old"}
    made = sample(record, columns=columns)
    assert made.messages is not None
    assert [m.content for m in made.messages] == ["x", "y", "hi\n\nnow", "the cat"]
    assert sample({"body": "red"}, columns={"text": "body"}).text == "red"


@pytest.mark.parametrize(
    ("record", "form", "columns", "tags", "says"),
    [
        ({"conversations": [{"from": "function_call", "value": "{x"}]}, "Auto", None, None, "0].value` must be JSON"),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "Auto", None, None, "a call with `name`"),
        ({"messages": CHAT, "tools": [{"description": "x"}]}, "Auto", None, None, "`tools[0]` must be a function with a `name`"),
        ({"messages": CHAT, "tools": "weather"}, "Auto", None, None, "`tools` must be JSON"),
        ({"conversations": TAGGED}, "ShareGPT", None, {**TAGS, "userTag": "you"}, "must be one of `"),
        ({"conversations": SHARE}, "ShareGPT", None, {"userTag": "me"}, "`conversations[0].from` must be one of"),
        ({"messages": CHAT}, "Messages", {"prompt": "q"}, None, "datasets.columns.prompt: the format Messages has no such"),
        ({"text": "a"}, "Text", None, {"userTag": "me"}, "datasets.tags: the format Text has no turns"),
        ({"messages": "[{"}, "Messages", None, None, "a list of turns or its JSON text"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(record: Any, form: str, columns: Any, tags: Any, says: str) -> None:
    with pytest.raises(TrainerError) as caught:
        sample(record, form, columns, tags)
    assert says in str(caught.value)


CUT = "red \ud83d"
CUT_JSON = json.dumps({"city": CUT})


@pytest.mark.parametrize(
    ("record", "at"),
    [
        ({"text": CUT}, "text"),
        ({"instruction": CUT, "output": "a"}, "instruction"),
        ({"instruction": "a", "output": CUT}, "output"),
        ({"instruction": "a", "output": "b", "system": CUT}, "system"),
        ({"instruction": "a", "output": "b", "history": [["x", CUT]]}, "history[0][1]"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": CUT}]}, "messages[1].content"),
        ({"messages": json.dumps([{"role": "user", "content": CUT}])}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": CUT}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "a", "name": CUT}]}, "messages[0].name"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"city": [CUT]}}]}]},
            "messages[0].tool_calls[0].arguments.city[0]",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": CUT_JSON}]}]},
            "messages[0].tool_calls.arguments.city",
        ),
        ({"conversations": [{"from": "function_call", "value": CUT_JSON}]}, "conversations[0].value.city"),
        ({"messages": CHAT, "tools": [{"name": "f", "description": CUT}]}, "tools[0].description"),
        ({"messages": CHAT, "tools": [json.dumps({"name": "f", "description": CUT})]}, "tools[0].description"),
        ({"messages": CHAT, "images": [CUT]}, "images[0]"),
    ],
)
def test_half_of_a_character_is_named(record: Any, at: str) -> None:
    says = f"a.jsonl:1: `{at}` is not valid Unicode: a lone surrogate at character 5"
    with pytest.raises(DataError) as caught:
        sample(record)
    assert str(caught.value).startswith(says)


def test_half_of_a_key_is_named_and_whole_emojis_are_not() -> None:
    with pytest.raises(DataError, match=r"`tools\[0\].\\ud83d` is not valid Unicode: a lone surrogate at character 1"):
        sample({"messages": CHAT, "tools": [{"name": "f", "\ud83d": 1}]})
    assert sample(json.loads('{"text": "\\ud83d\\ude00"}')).text == "\N{GRINNING FACE}"


@pytest.mark.parametrize("file", ["a.jsonl", "state.json"])
def test_a_volume_that_fails_is_not_the_datas_fault(tmp_path: Path, file: str) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / file).symlink_to("/proc/self/mem")  # the kernel's own "Input/output error"
    with pytest.raises(StorageError, match=rf"datasets: {tmp_path / file} cannot be read: .*Input/output error"):
        list(read_records(tmp_path, "x"))

"""Files to batches, in process: errors with their place, masks, packing, order."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetune_api.launch import LaunchDataset, PathSource
from finetune_api.spec import ColumnsSpec, DatasetFormat, Overlong, TagsSpec
from finetune_trainer.data.batches import IGNORE, Rows
from finetune_trainer.data.formats import detect, to_sample
from finetune_trainer.data.layout import layout_of
from finetune_trainer.data.order import RowOrder, hash64, permutation
from finetune_trainer.data.packing import pack_rows, single_rows
from finetune_trainer.data.records import Record, read_records
from finetune_trainer.data.store import TokenStore, build_store
from finetune_trainer.data.tokenize import Encoder
from finetune_trainer.errors import ConfigError, DataError
from tests.trainer import tiny

USER = {"role": "user", "content": "hi"}
GOOD = {"messages": [USER, {"role": "assistant", "content": "the cat"}]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer()


def build(
    path: Path,
    tokenizer: Any,
    form: str = "Auto",
    max_length: int = 64,
    max_samples: int | None = None,
    *,
    split: str | None = None,
    columns: ColumnsSpec | None = None,
    tags: TagsSpec | None = None,
    overlong: Overlong = Overlong.TRUNCATE,
    **options: bool,
) -> TokenStore:
    dataset = LaunchDataset(
        uri=f"pvc://data/{path.name}",
        source=PathSource(path=str(path)),
        format=DatasetFormat(form),
        max_samples=max_samples,
        split=split,
        columns=columns,
        tags=tags,
        weight=None,
    )
    encoder = Encoder(tokenizer, "hf://team/tiny", **options)
    return build_store([(dataset, path)], encoder, max_length, lambda: None, overlong=overlong)


def targets(store: TokenStore, sample: int, tokenizer: Any) -> str:
    """The text of a sample's targets."""
    part = slice(int(store.offsets[sample]), int(store.offsets[sample + 1]))
    return str(tokenizer.decode(store.ids[part][store.targets[part]]))


LINE = json.dumps(GOOD)
BROKEN: dict[str, tuple[str, str, str, list[str]]] = {
    "broken-line": ("a.jsonl", f"{LINE}\n{LINE}\n{{broken\n", "Auto", ["a.jsonl:3:", "broken JSON", "one JSON object"]),
    "not-an-object": ("a.jsonl", f"{LINE}\n[1]\n", "Auto", ["a.jsonl:2:", "a list"]),
    "not-utf8": ("a.jsonl", f"{LINE}\n\udcff\n", "Auto", ["a.jsonl:2:"]),
    "broken-json": ("a.json", '[{"text": "a"},\n{"text" "b"}]', "Auto", ["a.json:2:", "list of objects"]),
    "jsonl-called-json": ("a.json", f"{LINE}\n{LINE}\n", "Auto", ["a.json:2:", ".jsonl"]),
    "object-not-list": ("a.json", LINE, "Auto", ["a.json", "must be a list", "an object"]),
    "broken-parquet": ("a.parquet", "no parquet", "Auto", ["a.parquet", "Parquet"]),
    "other-suffix": ("a.txt", "a,b", "Auto", ["a.txt", "`.parquet`"]),
    "empty-file": ("a.jsonl", "\n\n", "Auto", ["a.jsonl", "no record"]),
    "unknown-keys": ("a.jsonl", '{"prompt": "a"}', "Auto", ["a.jsonl:1:", "`prompt`", "`messages`", "`instruction`"]),
    "missing-key": ("a.jsonl", f'{LINE}\n{{"text": "a"}}', "Messages", ["a.jsonl:2:", "`messages` is missing"]),
    "empty-conversation": ("a.jsonl", f'{LINE}\n{{"messages": []}}', "Auto", ["a.jsonl:2:", "empty"]),
    "unknown-role": (
        "a.jsonl",
        '{"messages": [{"role": "bot", "content": "a"}]}',
        "Auto",
        ["a.jsonl:1:", "messages[0].role", "`assistant`", "`bot`"],
    ),
    "content-no-text": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": 3}]}',
        "Auto",
        ["content", "a string, got int"],
    ),
    "turn-no-object": ("a.jsonl", '{"messages": ["hi"]}', "Auto", ["a.jsonl:1:", "messages[0]", "`role`"]),
    "sharegpt-role": (
        "a.jsonl",
        '{"conversations": [{"from": "robot", "value": "a"}]}',
        "Auto",
        ["conversations[0].from", "`human`", "`robot`"],
    ),
    "alpaca-missing": ("a.jsonl", '{"instruction": "a"}', "Alpaca", ["a.jsonl:1:", "`output` is missing"]),
    "alpaca-history": (
        "a.jsonl",
        '{"instruction": "a", "output": "b", "history": ["x"]}',
        "Auto",
        ["history[0]", "a pair"],
    ),
    "nothing-usable": (
        "a.jsonl",
        json.dumps({"messages": [USER]}),
        "Auto",
        ["no usable sample", "1 of 1", "maxLength"],
    ),
}


@pytest.mark.parametrize(("name", "content", "form", "parts"), BROKEN.values(), ids=BROKEN.keys())
def test_wrong_data_is_named(
    tmp_path: Path, tokenizer: Any, name: str, content: str, form: str, parts: list[str]
) -> None:
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError) as caught:
        build(tmp_path / name, tokenizer, form)
    for part in parts:
        assert part in str(caught.value)


def test_missing_path_and_empty_folder(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        build(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(DataError, match=r"no `[.]jsonl`"):
        build(tmp_path, tokenizer)


def test_too_long_prompt_leaves_nothing(tmp_path: Path, tokenizer: Any) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [GOOD] * 3)
    with pytest.raises(DataError, match=r"3 of 3 have no target token within the first training.maxLength = 8"):
        build(path, tokenizer, max_length=8)


def test_formats_say_the_same(tmp_path: Path, tokenizer: Any) -> None:
    """One conversation in every format and container gives the same tokens and targets."""
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    system = {"role": "system", "content": "be red"}
    chat = {"messages": [system, USER, {"role": "assistant", "content": "the cat"}]}
    share = {
        "system": "be red",
        "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "the cat"}],
    }
    alpaca = {"instruction": "hi", "input": "", "output": "the cat", "system": "be red"}
    (tmp_path / "array.json").write_text(json.dumps([chat]))
    pq.write_table(pa.Table.from_pylist([chat]), tmp_path / "table.parquet")
    for number, record in enumerate((chat, share, alpaca)):
        tiny.write_jsonl(tmp_path / f"{number}.jsonl", [record])
    stores = [build(path, tokenizer) for path in sorted(tmp_path.iterdir())]
    assert len({store.digest() for store in stores}) == 1
    assert targets(stores[0], 0, tokenizer) == "the cat<|im_end|>"


def test_folder_mixes_files_in_order_and_max_samples_cuts(tmp_path: Path, tokenizer: Any) -> None:
    for name in ("b", "a"):
        tiny.write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name}] * 3)
    (tmp_path / "README.md").write_text("ignored")
    store = build(tmp_path, tokenizer, max_samples=4)
    assert [targets(store, i, tokenizer) for i in range(4)] == ["<|im_end|>"] * 4
    assert [record.value["text"] for record in read_records(tmp_path, "x")] == ["a", "a", "a", "b", "b", "b"]


def test_all_assistant_turns_are_targets_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    turns = [USER, {"role": "assistant", "content": "the cat"}, USER, {"role": "assistant", "content": "a red dog"}]
    store = build(tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}]), tokenizer)
    assert targets(store, 0, tokenizer) == "the cat<|im_end|>a red dog<|im_end|>"
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(store.ids) == whole


def test_text_learns_everything_and_the_end(tmp_path: Path, tokenizer: Any) -> None:
    store = build(tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": "a red cat"}]), tokenizer)
    assert store.ids[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id
    assert store.targets.tolist() == [False] + [True] * (len(store.ids) - 1)


def test_chat_without_template_says_what_to_do(tmp_path: Path) -> None:
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(ConfigError, match=r"model.chatTemplate.*no chat template"):
        build(path, tiny.make_tokenizer(template=None))


def test_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] if loop.last else '-' }};{% endfor %}"
    turns = [USER, {"role": "assistant", "content": "the cat"}, USER, {"role": "assistant", "content": "a"}]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    with pytest.raises(ConfigError, match=r"renders turn 2 of .*a.jsonl:1 differently"):
        build(path, tiny.make_tokenizer(template=template))


def test_only_the_answer_that_is_learned_has_to_stay_as_it_is_rendered(tmp_path: Path) -> None:
    """As Qwen3's template, which leaves the thoughts of earlier turns out."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [USER, {"role": "assistant", "content": "<think>a</think>the cat"}]
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": turns * 2}])
    made = tiny.make_tokenizer(template=template)
    store = build(path, made, max_length=128, mask_history=True)
    assert targets(store, 0, made) == "<think>a</think>the cat<|im_end|>"
    with pytest.raises(ConfigError, match=r"renders turn 2 of .*a.jsonl:1 differently"):
        build(path, made, max_length=128)


def test_template_that_refuses_names_the_record(tmp_path: Path) -> None:
    template = "{{ raise_exception('no system turns') }}"
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"a.jsonl:1: the chat template refuses this conversation: no system turns"):
        build(path, tiny.make_tokenizer(template=template))


def test_detect_prefers_conversations() -> None:
    assert detect(Record({"messages": [], "text": ""}, "x")).form is DatasetFormat.MESSAGES
    assert to_sample(Record({"text": "a"}, "x"), layout_of(DatasetFormat.TEXT)).text == "a"


def test_padding_and_end_of_text_share_an_id_without_harm(tmp_path: Path, tokenizer: Any) -> None:
    records = [{"text": "a"}, {"text": "the red cat sleeps"}]
    rows = Rows(
        store := build(tiny.write_jsonl(tmp_path / "a.jsonl", records), tokenizer), single_rows(2), packed=False
    )
    batch = rows.batch([0, 1, None])
    short = int(store.lengths[0])
    assert batch.labels[0, : short - 1].tolist() == store.ids[1:short].tolist(), "the end of text is learned"
    assert (batch.labels[0, short - 1 :] == IGNORE).all(), "padding is not"
    assert (batch.labels[2] == IGNORE).all()
    assert batch.num_targets == int(store.target_counts.sum()) == rows.targets_in([0, 1, None])
    assert batch.num_tokens == len(store.ids)


def test_packed_rows_hold_every_sample_once_and_labels_stay_inside() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 33, size=300)
    packed = pack_rows(lengths, 64)
    assert sorted(np.concatenate(packed).tolist()) == list(range(300))
    totals = [int(lengths[row].sum()) for row in packed]
    assert max(totals) <= 64
    assert sum(totals) / (64 * len(packed)) > 0.97

    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.arange(offsets[-1], dtype=np.int32)
    store = TokenStore(ids, np.ones(len(ids), dtype=np.bool_), offsets)
    batch = Rows(store, packed, packed=True).batch([0, 5])
    assert batch.position_ids is not None
    for row, samples in enumerate((packed[0], packed[5])):
        ends = np.cumsum(lengths[samples])
        starts = ends - lengths[samples]
        assert (batch.position_ids[row, starts] == 0).all()
        assert (batch.labels[row, ends - 1] == IGNORE).all(), "the last token of a sample predicts nothing"


def test_order_is_a_permutation_each_epoch_and_does_not_depend_on_ranks() -> None:
    order = RowOrder(num_rows=10, seed=3, global_batch_size=4, epochs=3, max_steps=None)
    assert order.total_steps == 8
    stream = [row for step in range(1, 9) for row in order.rows(step)]
    assert stream[30:] == [None, None]
    epochs = [stream[i * 10 : (i + 1) * 10] for i in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)  # type: ignore[type-var]
    assert epochs[0] != epochs[1]
    assert order.epoch_after(8) == 3.0


def test_order_is_fixed_for_all_time() -> None:
    """A changed value would make every old checkpoint resume with other data."""
    assert hash64(42, 7) == HASH_42_7
    assert permutation(42, 0, 8).tolist() == PERMUTATION_42


HASH_42_7 = 13263182900025156664
PERMUTATION_42 = [4, 1, 6, 0, 2, 3, 7, 5]

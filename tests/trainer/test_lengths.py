"""Length management, masks and the order of rows: what is kept, what is learned, and in which order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_api.spec import Overlong
from finetune_trainer.data.lengths import Tokens, fit, share, turns_of
from finetune_trainer.data.order import Mixture, RowOrder, shares
from finetune_trainer.data.packing import pack_parts, pack_rows
from finetune_trainer.data.report import padding_share
from tests.trainer import tiny
from tests.trainer.test_data import build, targets

BOS = 1


def chat(*turns: tuple[int, int], bos: bool = False) -> Tokens:
    """Tokens numbered from 10; each turn is (prompt tokens, answer tokens)."""
    answers = np.concatenate([np.repeat([False, True], turn) for turn in turns])
    ids = np.arange(10, 10 + len(answers), dtype=np.int32)
    if bos:
        ids[0] = BOS
    return Tokens(ids, answers, answers)


def cut(tokens: Tokens, length: int, overlong: Overlong, **options: Any) -> list[tuple[list[int], list[int]]]:
    """(ids, ids of targets) of each piece."""
    pieces = fit(tokens, length, overlong, bos=BOS, last_first=options.get("last_first", False))
    return [(p.ids.tolist(), p.ids[p.targets].tolist()) for p in pieces]


def test_truncate_share_is_llama_factorys() -> None:
    """Values of `infer_seqlen` in LLaMA-Factory 0.9's tests/data/processors/test_processor_utils.py."""
    table = [((3000, 2000), 1000), ((2000, 3000), 1000), ((1000, 100), 1000), ((100, 1000), 1000)]
    assert [share(*lengths, room) for lengths, room in table] == [(600, 400), (400, 600), (900, 100), (100, 900)]


def test_truncate_share_goes_turn_by_turn() -> None:
    tokens = chat((4, 4), (6, 6))
    assert cut(tokens, 14, Overlong.TRUNCATE_SHARE) == [
        ([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 24, 25, 26], [14, 15, 16, 17, 24, 25, 26])
    ]
    last = cut(tokens, 14, Overlong.TRUNCATE_SHARE, last_first=True)[0][0]
    assert last == [10, 14, *range(18, 30)], "the last turn is whole, the first has the rest"
    assert cut(tokens, 6, Overlong.TRUNCATE_SHARE)[0][0] == [10, 11, 12, 14, 15, 16], "the second turn has no room left"


def test_drop_and_truncate() -> None:
    tokens = chat((3, 4), (2, 3))
    assert cut(tokens, 11, Overlong.DROP) == []
    assert cut(tokens, 12, Overlong.DROP) == cut(tokens, 12, Overlong.SPLIT) == cut(tokens, 12, Overlong.TRUNCATE)
    assert cut(tokens, 9, Overlong.TRUNCATE) == [([*range(10, 19)], [13, 14, 15, 16])]


def test_split_prefers_places_between_turns_and_repeats_the_start_token() -> None:
    tokens = chat((3, 2), (2, 3), (2, 2), bos=True)
    assert cut(tokens, 8, Overlong.SPLIT) == [
        ([1, 11, 12, 13, 14], [13, 14]),
        ([1, 15, 16, 17, 18, 19], [17, 18, 19]),
        ([1, 20, 21, 22, 23], [22, 23]),
    ]


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6)


@given(sizes, st.integers(8, 40), st.booleans())
@settings(max_examples=30, deadline=None)
def test_split_loses_no_target_and_makes_none(turns: list[tuple[int, int]], length: int, bos: bool) -> None:
    tokens = chat(*turns, bos=bos)
    pieces = fit(tokens, length, Overlong.SPLIT, bos=BOS, last_first=False)
    learned = [int(i) for p in pieces for i in p.ids[1:][p.targets[1:]]]
    assert learned == tokens.ids[1:][tokens.targets[1:]].tolist(), (
        "each target once, in order, and never as a row's first token"
    )
    assert all(len(piece.ids) <= length for piece in pieces)
    assert [int(i) for p in pieces for i in p.ids[p.repeated :]] == tokens.ids.tolist()


@given(sizes, st.integers(8, 40), st.booleans())
@settings(max_examples=20, deadline=None)
def test_truncate_share_fits_and_keeps_order(turns: list[tuple[int, int]], length: int, last_first: bool) -> None:
    tokens = chat(*turns)
    (piece,) = fit(tokens, length, Overlong.TRUNCATE_SHARE, bos=BOS, last_first=last_first)
    assert len(piece.ids) == min(length, len(tokens.ids))
    assert (np.diff(piece.ids) > 0).all()
    assert (piece.targets == tokens.targets[np.isin(tokens.ids, piece.ids)]).all()
    assert turns_of(tokens.answers)[-1][2] == len(tokens.ids)


TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "a dog"},
]


def test_masks(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"messages": TURNS}])
    last = build(path, tokenizer, mask_history=True)
    assert targets(last, 0, tokenizer) == "a dog<|im_end|>"
    everything = build(path, tokenizer, train_on_prompt=True)
    assert everything.targets.tolist() == [False] + [True] * (len(everything.ids) - 1)
    assert everything.ids.tolist() == last.ids.tolist()


def test_text_splits_into_rows_that_learn_every_token_once(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    path = tiny.write_jsonl(tmp_path / "a.jsonl", [{"text": " ".join(tiny.WORDS * 3)}])
    whole = build(path, tokenizer, max_length=128)
    store = build(path, tokenizer, max_length=16, overlong=Overlong.SPLIT)
    assert len(store) > 3
    assert store.ids[store.targets].tolist() == whole.ids[whole.targets].tolist()


LENGTHS = np.random.default_rng(1).integers(1, 200, size=403)


@pytest.mark.parametrize("batch", [8, 32])
def test_grouped_rows_are_a_permutation_with_little_padding(batch: int) -> None:
    order = RowOrder(403, 3, batch, 3, None, lengths=LENGTHS)
    plain = RowOrder(403, 3, batch, 3, None)
    stream = [row for step in range(1, order.total_steps + 1) for row in order.rows(step)]
    assert stream[403 * 3 :] == [None] * (len(stream) - 403 * 3)
    for epoch in range(3):
        assert sorted(stream[403 * epoch : 403 * (epoch + 1)]) == list(range(403))  # type: ignore[type-var]
    assert padding_share(LENGTHS, order, batch) < 0.3 * padding_share(LENGTHS, plain, batch)
    widest = [max(LENGTHS[row] for row in order.rows(step)) for step in range(2, 13)]  # type: ignore[index]
    assert widest != sorted(widest) and widest != sorted(widest, reverse=True), "steps are not in order of length"


def test_any_step_is_known_without_those_before_it() -> None:
    """What a resume asks for, in any order of asking, with mixing and grouping together."""
    mixture = Mixture((300, 100, 3), (100, 203, 100))
    first = RowOrder(403, 3, 8, None, 200, mixture, LENGTHS)
    steps = {step: first.rows(step) for step in range(1, 201)}
    for step in (200, 1, 51, 50, 120):
        assert RowOrder(403, 3, 8, None, 200, mixture, LENGTHS).rows(step) == steps[step]
        assert first.rows(step) == steps[step]
    assert [steps[1][:4], steps[51][:4]] == GROUPED_MIXED, (
        "a changed value would resume old checkpoints with other data"
    )


GROUPED_MIXED = [[387, 341, 216, 341], [344, 400, 332, 54]]


def test_weights_are_shares_of_rows_and_every_row_has_its_turn() -> None:
    assert shares([300, 100, 3], [1.0, 2.0, 1.0]) == [101, 201, 101]
    assert shares([5, 5], [1.0, 1e-9]) == [10, 0]
    mixture = Mixture((300, 100, 3), (100, 203, 100))
    order = RowOrder(403, 3, 8, 3, None, mixture)
    epochs = [order.epoch(number) for number in range(3)]
    for rows in epochs:
        assert [int(((rows >= a) & (rows < b)).sum()) for a, b in ((0, 300), (300, 400), (400, 403))] == [100, 203, 100]
    counts = np.bincount(np.concatenate(epochs), minlength=403)
    assert set(counts[:300]) == {1}, "three epochs of a third: each row once"
    assert set(counts[300:400]) == {6, 7}
    assert set(counts[400:]) == {100}


def test_packed_data_sets_do_not_share_rows() -> None:
    rows = pack_parts(LENGTHS, [300, 103], 256)
    assert sorted(rows.samples.tolist()) == list(range(403))
    assert all((row < 300).all() or (row >= 300).all() for row in rows)
    assert max(rows.sums(LENGTHS)) <= 256
    assert [row.tolist() for row in pack_parts(LENGTHS, [403], 256)] == [
        row.tolist() for row in pack_rows(LENGTHS, 256)
    ]

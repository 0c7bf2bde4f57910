"""What becomes of a sample that is longer than a row: `training.overlong`. Pure functions of tokens and a length."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finetune_api.spec import Overlong

Ids = npt.NDArray[np.int32]
Mask = npt.NDArray[np.bool_]


class Tokens(NamedTuple):
    """One sample."""

    ids: Ids
    targets: Mask
    """Same length as `ids`; True where the model is to learn to produce the token."""
    answers: Mask
    """Where the assistant's turns are, whether they are targets or not; of a text, everywhere."""

    def part(self, start: int, end: int) -> "Tokens":
        return Tokens(self.ids[start:end], self.targets[start:end], self.answers[start:end])


class Piece(NamedTuple):
    """A row's worth of a sample."""

    ids: Ids
    targets: Mask
    repeated: int = 0
    """Tokens at its start that another piece has too."""


def fit(
    tokens: Tokens,
    max_length: int,
    overlong: Overlong,
    *,
    bos: int | None,
    last_first: bool,
    image_token: int | None = None,
) -> list[Piece]:
    """Makes a sample fit.

    Args:
        tokens: of one sample.
        max_length: tokens of a row.
        overlong: what to do with a longer sample.
        bos: the token that begins a text, if the tokenizer has one: Split puts it before every piece of a sample that has it.
        last_first: TruncateShare gives room to the last turns first, as only the last answer is learned.
        image_token: stands for the parts of images. A sample keeps all its images, whole, or is dropped: an answer about a
            picture that is no longer there would teach to invent one.

    Returns:
        The pieces, none if the sample is dropped; a sample that fits is returned as it is.
    """
    pieces = _cut(tokens, max_length, overlong, bos, last_first=last_first)
    if image_token is None or not (of_images := np.count_nonzero(tokens.ids == image_token)):
        return pieces
    whole = len(pieces) == 1 and np.count_nonzero(pieces[0].ids == image_token) == of_images
    return pieces if whole else []


def _cut(tokens: Tokens, max_length: int, overlong: Overlong, bos: int | None, *, last_first: bool) -> list[Piece]:
    if len(tokens.ids) <= max_length:
        return [Piece(tokens.ids, tokens.targets)]
    if overlong is Overlong.DROP:
        return []
    if overlong is Overlong.SPLIT:
        return split(tokens, max_length, bos)
    if overlong is Overlong.TRUNCATE_SHARE:
        return [truncate_share(tokens, max_length, last_first=last_first)]
    return [Piece(tokens.ids[:max_length], tokens.targets[:max_length])]


def share(prompt: int, answer: int, room: int) -> tuple[int, int]:
    """Tokens of a prompt and of its answer that fit into `room` (LLaMA-Factory 0.9's `infer_seqlen`).

    The shorter of the two stays whole if it takes less than half of the room, otherwise both are cut in proportion.
    """
    if answer * 2 < room:
        most = room
    elif prompt * 2 < room:
        most = room - prompt
    else:
        most = int(room * (answer / (prompt + answer)))
    kept = min(most, answer)
    return min(max(room - kept, 0), prompt), kept


def truncate_share(tokens: Tokens, max_length: int, *, last_first: bool) -> Piece:
    """Cuts turn by turn: each prompt and its answer keep their beginnings, by their share of the room that is left."""
    turns = turns_of(tokens.answers)
    kept: list[tuple[int, int, int, int]] = []
    room = max_length
    for start, middle, end in reversed(turns) if last_first else turns:
        if room <= 0:
            break
        prompt, answer = share(middle - start, end - middle, room)
        kept.append((start, start + prompt, middle, middle + answer))
        room -= prompt + answer
    index = np.concatenate([np.r_[a:b, c:d] for a, b, c, d in sorted(kept)]).astype(np.int64)
    return Piece(tokens.ids[index], tokens.targets[index])


def split(tokens: Tokens, max_length: int, bos: int | None) -> list[Piece]:
    """Cuts into rows that follow each other, between turns where a row has such a place.

    No target is lost: where the cut is before a target, the row begins with the token before it, which is not one there.
    """
    starts = [start for start, _, _ in turns_of(tokens.answers)[1:]]
    begin = [bos] if bos is not None and tokens.ids[0] == bos else []
    pieces: list[Piece] = []
    at, size = 0, len(tokens.ids)
    while at < size:
        context = 1 if at and tokens.targets[at] else 0
        head = [*begin, *tokens.ids[at - context : at].tolist()] if at else []
        end = min(size, at + max_length - len(head))
        if end < size:
            end = next((start for start in reversed(starts) if at < start <= end), end)
        ids = np.concatenate([np.array(head, dtype=np.int32), tokens.ids[at:end]])
        targets = np.concatenate([np.zeros(len(head), dtype=np.bool_), tokens.targets[at:end]])
        pieces.append(Piece(ids, targets, repeated=len(head)))
        at = end
    return pieces


def turns_of(answers: Mask) -> list[tuple[int, int, int]]:
    """(start, start of the answer, end) of each prompt with its answer; what follows the last answer is a prompt without one."""
    edges = np.flatnonzero(np.diff(answers.astype(np.int8), prepend=0, append=0))
    turns: list[tuple[int, int, int]] = []
    start = 0
    for middle, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        turns.append((start, middle, end))
        start = end
    return turns if start == len(answers) else [*turns, (start, len(answers), len(answers))]

"""Tokens of a sample and which of them are targets. Owns the masking of prompts.

The text is rendered once and tokenised once, so it is exactly what the model will see when it is used; the assistant's turns
are found as character ranges. Padding and end-of-text may share an id (SmolLM2: 2), so nothing here is masked by id.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from finetune_trainer.data.formats import Message, Sample
from finetune_trainer.errors import ConfigError, DataError


class Tokens(NamedTuple):
    ids: list[int]
    targets: list[bool]
    """Same length as `ids`; True where the model is to learn to produce the token."""


class Encoder:
    """Tokenises samples with one tokenizer."""

    def __init__(self, tokenizer: Any, uri: str) -> None:
        if not tokenizer.is_fast:
            raise ConfigError(f"model.uri: {uri} has a slow tokenizer; one with a tokenizer.json is needed")
        self._tokenizer = tokenizer
        self._uri = uri

    def encode(self, samples: Sequence[Sample]) -> list[Tokens]:
        """Tokens of many samples at once (the tokenizer works on them in parallel)."""
        texts: list[str] = []
        ranges: list[list[tuple[int, int]] | None] = []
        for sample in samples:
            if sample.messages is None:
                texts.append(sample.text or "")
                ranges.append(None)
            else:
                text, spans = self._render(sample.messages, sample.place)
                texts.append(text)
                ranges.append(spans)
        chats = self._tokenize([t for t, r in zip(texts, ranges, strict=True) if r is not None], special=False)
        plain = self._tokenize([t for t, r in zip(texts, ranges, strict=True) if r is None], special=True)
        result = []
        for kept in ranges:
            if kept is None:
                ids, _ = next(plain)
                result.append(self._text(ids))
            else:
                ids, offsets = next(chats)
                result.append(Tokens(ids, [_inside(start, end, kept) for start, end in offsets]))
        return result

    def _text(self, ids: list[int]) -> Tokens:
        """All tokens of a text are targets, and so is the end of text after it."""
        eos = self._tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        return Tokens(ids, [True] * len(ids))

    def _tokenize(self, texts: list[str], special: bool) -> Any:
        if not texts:
            return iter(())
        out = self._tokenizer(
            texts, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return iter(zip(out["input_ids"], out["offset_mapping"], strict=True))

    def _render(self, messages: list[Message], place: str) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text and the character ranges of the assistant's turns."""
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"model.chatTemplate: the tokenizer of {self._uri} has no chat template and the data set has "
                "conversations; set `model.chatTemplate`, or use a data set with `text` records"
            )
        turns = [message._asdict() for message in messages]
        whole = self._apply(turns, place, prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            after = self._apply(turns[: index + 1], place, prompt=False)
            if index == 0:
                # Nothing to prompt with: templates may put a default system turn before it, so look for the words.
                before = after[: max(0, after.rfind(message.content.strip()))]
            else:
                before = self._apply(turns[:index], place, prompt=True)
            if not after.startswith(before) or not whole.startswith(after.rstrip()):
                raise ConfigError(
                    f"model.chatTemplate: the template renders turn {index + 1} of {place} differently once other turns "
                    "follow, so its tokens cannot be told apart; set `model.chatTemplate` to one that only appends"
                )
            spans.append((len(before), self._end_of_turn(after, len(before))))
        return whole, spans

    def _end_of_turn(self, text: str, start: int) -> int:
        """The turn ends with the token that stops generation; the line break that templates put after it is no target."""
        eos = self._tokenizer.eos_token
        at = text.rfind(eos, start) if eos else -1
        return at + len(eos) if at >= 0 and not text[at + len(eos) :].strip() else len(text)

    def _apply(self, turns: list[dict[str, str]], place: str, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        except TemplateError as error:
            raise DataError(f"{place}: the chat template refuses this conversation: {error}") from error
        return text


def _inside(start: int, end: int, spans: list[tuple[int, int]]) -> bool:
    """Whether a token's characters lie in a span; a token of no characters belongs to none."""
    return start < end and any(first <= start and end <= last for first, last in spans)

"""Tokens of a sample and which of them are targets. Owns the masking of prompts.

The text is rendered once and tokenised once, so it is exactly what the model will see when it is used; the assistant's turns
are found as character ranges. Padding and end-of-text may share an id (SmolLM2: 2), so nothing here is masked by id.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_trainer.data.chat_templates import closing, end_of_turn, render, wants_parts
from finetune_trainer.data.formats import Message, Sample
from finetune_trainer.data.images import PLACEHOLDER, ImageInput
from finetune_trainer.data.lengths import Mask, Tokens
from finetune_trainer.errors import ConfigError, DataError

__all__ = ["Encoder", "Tokens"]


class Encoder:
    """Tokenises samples with one tokenizer."""

    def __init__(
        self,
        tokenizer: Any,
        uri: str,
        *,
        train_on_prompt: bool = False,
        mask_history: bool = False,
        image: ImageInput | None = None,
    ) -> None:
        """Takes a tokenizer.

        Args:
            tokenizer: a fast one, with its chat template.
            uri: the model's, for messages.
            train_on_prompt: every token of a conversation is a target.
            mask_history: only the last of the assistant's turns is a target.
            image: how a model that sees takes images; None for one that does not.

        Raises:
            ConfigError: the tokenizer cannot tell which characters a token stands for.
        """
        if not tokenizer.is_fast:
            raise ConfigError(f"model.uri: {uri} has a slow tokenizer; one with a tokenizer.json is needed")
        self.tokenizer = tokenizer
        self.train_on_prompt = train_on_prompt
        self.mask_history = mask_history
        self.image = image
        self._in_parts = image is not None and wants_parts(tokenizer)
        self._closing = closing(tokenizer)
        self._ends = [token for token in (tokenizer.eos_token, end_of_turn(tokenizer)) if token]
        self._uri = uri

    def encode(self, samples: Sequence[Sample]) -> list[Tokens]:
        """Tokens of many samples at once (the tokenizer works on them in parallel)."""
        texts: list[str] = []
        ranges: list[list[tuple[int, int]] | None] = []
        for sample in samples:
            self._check_images(sample)
            if sample.messages is None:
                texts.append(sample.text or "")
                ranges.append(None)
            else:
                text, spans = self._render(sample.messages, sample.tools, sample.place)
                texts.append(text)
                ranges.append(spans)
        chats = self._tokenize([t for t, r in zip(texts, ranges, strict=True) if r is not None], special=False)
        plain = self._tokenize([t for t, r in zip(texts, ranges, strict=True) if r is None], special=True)
        encoded = (self._text(next(plain)[0]) if kept is None else self._chat(next(chats), kept) for kept in ranges)
        if self.image is None:
            return list(encoded)
        return [self._with_images(tokens, sample, self.image) for tokens, sample in zip(encoded, samples, strict=True)]

    def _check_images(self, sample: Sample) -> None:
        count = len(sample.images)
        if self.image is None:
            if count:
                raise DataError(
                    f"{sample.place}: the record has images, and {self._uri} cannot see; leave their column out, or train a "
                    "model that sees (LLaVA-1.5's kind)"
                )
            return
        contents = [sample.text or "", *(message.content for message in sample.messages or [])]
        wanted = sum(content.count(PLACEHOLDER) for content in contents)
        if wanted != count:
            raise DataError(
                f"{sample.place}: the turns have {wanted} times `{PLACEHOLDER}` and the record has {count} images; each image "
                "needs one, where it belongs"
            )

    def _with_images(self, tokens: Tokens, sample: Sample, image: ImageInput) -> Tokens:
        """Puts as many tokens in the place of each image as the model makes of it; none of them is a target."""
        of_image = tokens.ids == image.token
        if (shown := np.count_nonzero(of_image)) != len(sample.images):
            raise ConfigError(
                f"model.chatTemplate: the template shows {shown} of the {len(sample.images)} images of {sample.place}; set "
                "`model.chatTemplate` to one that renders the turns as they are (llava)"
            )
        times = np.where(of_image, image.tokens_per_image, 1)
        return Tokens(
            tokens.ids.repeat(times), (tokens.targets & ~of_image).repeat(times), tokens.answers.repeat(times)
        )

    def _text(self, ids: list[int]) -> Tokens:
        """All tokens of a text are targets, and so is the end of text after it."""
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids = [*ids, eos]
        everything = np.ones(len(ids), dtype=np.bool_)
        return Tokens(np.array(ids, dtype=np.int32), everything, everything)

    def _chat(self, encoded: tuple[list[int], list[tuple[int, int]]], spans: list[tuple[int, int]]) -> Tokens:
        ids, offsets = encoded
        edges = np.array(offsets, dtype=np.int64).reshape(-1, 2)
        answers = _inside(edges, spans)
        if self.train_on_prompt:
            targets = np.ones(len(ids), dtype=np.bool_)
        else:
            targets = _inside(edges, spans[-1:]) if self.mask_history else answers
        return Tokens(np.array(ids, dtype=np.int32), targets, answers)

    def _tokenize(self, texts: list[str], special: bool) -> Any:
        if not texts:
            return iter(())
        out = self.tokenizer(
            texts, add_special_tokens=special, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        return iter(zip(out["input_ids"], out["offset_mapping"], strict=True))

    def _render(
        self, messages: list[Message], tools: list[dict[str, Any]] | None, place: str
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text and the character ranges of the assistant's turns."""
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"model.chatTemplate: the tokenizer of {self._uri} has no chat template and the data set has "
                "conversations; set `model.chatTemplate`, or use a data set with `text` records"
            )
        turns = [message.as_turn(in_parts=self._in_parts) for message in messages]
        whole = self._apply(turns, tools, place, prompt=False)
        spans = []
        last = max((at for at, message in enumerate(messages) if message.role == "assistant"), default=0)
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            after = self._apply(turns[: index + 1], tools, place, prompt=False)
            if index == 0:
                # Nothing to prompt with: templates may put a default system turn before it, so look for the words.
                words = after.removesuffix(self._closing)
                before = words[: max(0, words.rfind(message.content.strip()))]
            else:
                before = self._apply(turns[:index], tools, place, prompt=True)
            if not after.startswith(before) or not whole.startswith(after.rstrip()):
                if self.mask_history and index < last:
                    continue  # no target: Qwen3's template leaves the thoughts of earlier turns out
                raise ConfigError(
                    f"model.chatTemplate: the template renders turn {index + 1} of {place} differently once other turns "
                    "follow, so its tokens cannot be told apart; set `model.chatTemplate` to one that only appends"
                )
            spans.append((len(before), self._end_of_turn(after, len(before))))
            self._check_calls(message, after[len(before) :], place, index)
        if tools:
            self._check_tools(tools, turns, whole, place)
        return whole, spans

    def _check_calls(self, message: Message, rendered: str, place: str, index: int) -> None:
        """A template that knows no calls renders an empty turn: the model would learn to say nothing."""
        for call in message.tool_calls or []:
            if not _shown(call["function"]["name"], rendered):
                raise ConfigError(
                    f"model.chatTemplate: the template does not show the call of `{call['function']['name']}` in turn "
                    f"{index + 1} of {place}; set `model.chatTemplate` to one that renders `tool_calls` (qwen, chatml, llama3)"
                )

    def _check_tools(self, tools: list[dict[str, Any]], turns: list[dict[str, Any]], whole: str, place: str) -> None:
        """A name alone may be a word of the conversation."""
        ignored = whole == render(self.tokenizer, turns)
        for tool in tools:
            if ignored or not _shown(tool["function"]["name"], whole):
                raise ConfigError(
                    f"model.chatTemplate: the template does not show the function `{tool['function']['name']}` of {place}; "
                    "set `model.chatTemplate` to one that renders `tools` (qwen, chatml, llama3)"
                )

    def _end_of_turn(self, text: str, start: int) -> int:
        """The turn ends with the token that stops generation; the line break that templates put after it is no target."""
        for token in self._ends:
            at = text.rfind(token, start)
            if at >= 0 and not text[at + len(token) :].strip():
                return at + len(token)
        return len(text)

    def _apply(self, turns: list[dict[str, Any]], tools: Any, place: str, prompt: bool) -> str:
        from jinja2 import TemplateError

        more = {"tools": tools} if tools else {}
        try:
            text: str = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **more)
        except (TemplateError, TypeError) as error:  # TypeError: a template that adds None or an object to a text
            raise DataError(f"{place}: the chat template refuses this conversation: {error}") from error
        return text


def _shown(name: str, text: str) -> bool:
    return name in text or json.dumps(name)[1:-1] in text


def _inside(edges: npt.NDArray[np.int64], spans: list[tuple[int, int]]) -> Mask:
    """Which tokens' characters lie in a span; a token of no characters belongs to none.

    Args:
        edges: first character and end of each token, shape (tokens, 2).
        spans: ranges of characters.
    """
    inside = np.zeros(len(edges), dtype=np.bool_)
    for first, last in spans:
        inside |= (edges[:, 0] >= first) & (edges[:, 1] <= last)
    return inside & (edges[:, 0] < edges[:, 1])

"""Chat templates by name, against strings written by hand from the published formats."""

import json
import logging
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from finetune_api.launch import LaunchSpec
from finetune_api.spec import CHAT_TEMPLATES
from finetune_trainer.data.chat_templates import (
    MARKERS,
    closing,
    end_of_turn,
    fix_date,
    named_template,
    set_chat_template,
    written_date,
)
from finetune_trainer.data.formats import Message, Sample
from finetune_trainer.data.tokenize import Encoder
from finetune_trainer.errors import ConfigError, DataError
from finetune_trainer.model import load_tokenizer
from tests.trainer import jobs, tiny
from tests.trainer.conftest import Assets

SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]
LLAVA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)
EXPECTED: dict[str, tuple[str, str, str]] = {
    # Meta's llama and codellama: generation.py joins f"{B_INST} {question} {E_INST} {answer} " with bos and eos around each
    # pair; the system text stands between "<<SYS>>\n" and "\n<</SYS>>\n\n" before the first question.
    "llama2": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] 2+2? [/INST] 4 </s>",
        "<s>[INST] Hi [/INST] Yes? </s><s>[INST] 2+2? [/INST]",
        " 4 </s>",
    ),
    "codellama": (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yes? </s><s>[INST] 2+2? [/INST] 4 </s>",
        "<s>[INST] Hi [/INST] Yes? </s><s>[INST] 2+2? [/INST]",
        " 4 </s>",
    ),
    # Meta's llama3: tokenizer.py, ChatFormat: header, "\n\n", text, <|eot_id|>; the prompt ends with the assistant's header.
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n4<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Yes?<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n",
        "4<|eot_id|>",
    ),
    # OpenAI's ChatML description.
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "4<|im_end|>\n",
    ),
    # Qwen2.5-Instruct's model card and tokenizer_config.json: ChatML, and a system turn where there is none.
    "qwen": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n",
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "4<|im_end|>\n",
    ),
    # Mistral's documentation of its v3 tokenizer: <s>[INST] question[/INST] answer</s>[INST] ...
    "mistral": (
        "<s>[INST] Be brief.\n\nHi[/INST] Yes?</s>[INST] 2+2?[/INST] 4</s>",
        "<s>[INST] Hi[/INST] Yes?</s>[INST] 2+2?[/INST]",
        " 4</s>",
    ),
    # ai.google.dev/gemma/docs/core/prompt-structure.
    "gemma": (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
        "<start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n4<end_of_turn>\n",
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n<start_of_turn>user\n2+2?"
        "<end_of_turn>\n<start_of_turn>model\n",
        "4<end_of_turn>\n",
    ),
    # LLaVA's conversation.py, conv_vicuna_v1: separators " " and "</s>".
    "llava": (
        "<s>Be brief. USER: Hi ASSISTANT: Yes?</s>USER: 2+2? ASSISTANT: 4</s>",
        f"<s>{LLAVA} USER: Hi ASSISTANT: Yes?</s>USER: 2+2? ASSISTANT:",
        " 4</s>",
    ),
}


def tokenizer(**names: str) -> Any:
    """The tiny one with every template's markers as tokens."""
    made = tiny.make_tokenizer(template=None)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", **names})
    made.add_tokens(sorted({marker for markers in MARKERS.values() for marker in markers}), special_tokens=True)
    return made


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_named_template_writes_the_published_format(name: str) -> None:
    made = tokenizer()
    set_chat_template(made, name)
    whole, prompt, answer = EXPECTED[name]
    assert made.apply_chat_template([SYSTEM, *TURNS], tokenize=False) == whole
    assert made.apply_chat_template(TURNS[:-1], tokenize=False, add_generation_prompt=True) == prompt
    messages = [Message(turn["role"], turn["content"]) for turn in TURNS]
    (tokens,) = Encoder(made, "x", mask_history=True).encode([Sample(messages, None, "a:1")])
    assert made.decode(tokens.ids) == prompt + answer, "answers come after the very prompt that generation gets"
    assert made.decode(tokens.ids[tokens.targets]) == answer.rstrip(), "and end with the token that ends the turn"


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_the_end_of_a_turn_is_a_token_that_stops_generation(name: str) -> None:
    made = tokenizer()
    set_chat_template(made, name)
    end = end_of_turn(made)
    assert end is not None and end == EXPECTED[name][2].rstrip()[-len(end) :]
    assert (end == "</s>") == (name not in MARKERS)


def test_words_that_are_not_one_token_end_no_turn() -> None:
    made = tokenizer()
    set_chat_template(made, "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} END\n{% endfor %}")
    assert closing(made) == " END\n" and end_of_turn(made) is None
    (tokens,) = Encoder(made, "x").encode([Sample([Message("user", "Hi"), Message("assistant", "4")], None, "a:1")])
    assert made.decode(tokens.ids[tokens.targets]).endswith("4 END\n")


def test_an_answer_that_begins_a_conversation_is_not_looked_for_in_the_marks() -> None:
    made = tokenizer()
    set_chat_template(made, "qwen")
    (tokens,) = Encoder(made, "x").encode([Sample([Message("assistant", "end")], None, "a:1")])
    assert made.decode(tokens.ids[tokens.targets]) == "end<|im_end|>"


DATED = "{{ strftime_now('%d %b %Y') if strftime_now is defined else 'no date' }}" + tiny.CHATML


def test_a_template_writes_the_date_of_the_job() -> None:
    made, other = tokenizer(), tokenizer()
    made.chat_template, other.chat_template = DATED, tiny.CHATML
    for day in (date(2026, 11, 24), date(2026, 11, 25)):
        fix_date(made, day)
        fix_date(other, day)
        (tokens,) = Encoder(made, "x").encode([Sample([Message("user", "Hi"), Message("assistant", "4")], None, "a:1")])
        assert made.decode(tokens.ids).startswith(f"{day.day} Nov 2026<|im_start|>user")
        assert written_date(made) == day.isoformat() and written_date(other) is None


def test_a_job_writes_its_own_date_whatever_the_day(assets: Assets, tmp_path: Path) -> None:
    launch = jobs.launch(tmp_path, assets.model, assets.train, model__chatTemplate=DATED)
    for changes, written in (({"createdOn": "2026-11-24"}, "24 Nov 2026"), ({}, "26 Jul 2024")):
        made = load_tokenizer(assets.model, LaunchSpec.model_validate({**launch, **changes}))
        assert made.apply_chat_template(TURNS[:1], tokenize=False).startswith(f"{written}<|im_start|>user")


WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}]
TOOL_TURNS = [
    Message("user", "Hi"),
    Message("assistant", "", CALL),
    Message("tool", "12"),
    Message("assistant", "Cold."),
]
CALLS = {
    # Qwen2.5-Instruct's and Hermes 2 Pro's form.
    "qwen": '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>Cold.<|im_end|>',
    "chatml": '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>Cold.<|im_end|>',
    # Llama 3.1's form of custom functions.
    "llama3": '{"name": "weather", "parameters": {"city": "Zürich"}}<|eot_id|>Cold.<|eot_id|>',
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_targets_and_functions_and_results_are_not(name: str) -> None:
    made = tokenizer()
    set_chat_template(made, name)
    (tokens,) = Encoder(made, "x").encode([Sample(TOOL_TURNS, None, "a:1", [WEATHER])])
    whole = made.decode(tokens.ids)
    assert made.decode(tokens.ids[tokens.targets]).strip() == CALLS[name].strip()
    written = json.dumps(WEATHER, indent=4) if name == "llama3" else f"<tools>\n{json.dumps(WEATHER)}\n</tools>"
    assert written in whole and "12" in whole


def test_the_qwen_template_is_that_of_the_published_tokenizer_with_tools() -> None:
    """Written by hand from Qwen2.5-Instruct's tokenizer_config.json."""
    made = tokenizer()
    set_chat_template(made, "qwen")
    turns = [message.as_turn() for message in TOOL_TURNS[:3]]
    assert made.apply_chat_template(turns, tools=[WEATHER], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{json.dumps(WEATHER)}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
        'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n12\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("template", "sample", "says"),
    [
        (tiny.CHATML, Sample(TOOL_TURNS, None, "a:1"), "does not show the call of `weather` in turn 2 of a:1"),
        (tiny.CHATML, Sample([TOOL_TURNS[0], TOOL_TURNS[3]], None, "a:1", [WEATHER]), "not show the function `weather`"),
        (tiny.CHATML, Sample([Message("user", "weather?"), TOOL_TURNS[3]], None, "a:1", [WEATHER]), "function `weather`"),
        ("llama2", Sample([TOOL_TURNS[0], TOOL_TURNS[3]], None, "a:1", [WEATHER]), "llama2 has no form for functions"),
        ("gemma", Sample(TOOL_TURNS[2:], None, "a:1"), "gemma wants user and assistant in turn"),
    ],
    ids=["calls", "functions", "name-is-a-word", "refused", "roles"],
)  # fmt: skip
def test_nothing_is_left_out_silently(template: str, sample: Sample, says: str) -> None:
    made = tokenizer()
    set_chat_template(made, template)
    with pytest.raises((ConfigError, DataError)) as caught:
        Encoder(made, "x").encode([sample])
    assert says in str(caught.value)


def test_a_template_without_its_tokens_is_refused() -> None:
    plain = tiny.make_tokenizer()
    with pytest.raises(ConfigError, match=r"gemma needs the tokens `<start_of_turn>`, `<end_of_turn>`"):
        set_chat_template(plain, "gemma")
    plain.eos_token = None
    with pytest.raises(ConfigError, match="mistral needs eos_token"):
        set_chat_template(plain, "mistral")
    with pytest.raises(ConfigError, match=r"must be one of llama2, .*, got `vicuna`"):
        set_chat_template(plain, "vicuna")


@pytest.mark.parametrize(("own", "differs"), [("chatml", False), ("qwen", True)])
def test_a_difference_from_the_tokenizers_own_template_is_said(
    own: str, differs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = tokenizer()
    made.chat_template = named_template(own)
    with caplog.at_level(logging.WARNING, "finetune_trainer"):
        set_chat_template(made, "chatml")
    assert ("differently from the tokenizer's own template" in caplog.text) == differs


def test_the_templates_lie_in_the_package() -> None:
    """Whoever packs the trainer has to take them along: they are read from beside the module."""
    import finetune_trainer

    folder = Path(finetune_trainer.__file__).parent / "data" / "templates"
    assert {file.stem for file in folder.glob("*.jinja")} == set(CHAT_TEMPLATES)

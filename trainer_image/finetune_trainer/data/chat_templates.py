"""Chat templates by name. Owns the templates of `templates/` and how they are held against a tokenizer.

A template's markers have to be tokens of the tokenizer: in pieces they would still train, but the model has never seen them,
and generation would not stop at them. Who wants that all the same gives the Jinja text instead of the name.
"""

import logging
from datetime import date
from pathlib import Path
from typing import Any

from finetune_api.spec import CHAT_TEMPLATE_RULE, CHAT_TEMPLATES
from finetune_trainer.errors import ConfigError

FOLDER = Path(__file__).with_name("templates")
_IM = ("<|im_start|>", "<|im_end|>")
MARKERS: dict[str, tuple[str, ...]] = {
    "chatml": _IM,
    "qwen": _IM,
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}
"""What each template writes as one token; `[INST]`, `USER:` and the like are words in Llama 2, Mistral and LLaVA-1.5."""
SPECIAL: dict[str, tuple[str, ...]] = {
    "llama2": ("bos_token", "eos_token"),
    "codellama": ("bos_token", "eos_token"),
    "mistral": ("bos_token", "eos_token"),
    "llava": ("bos_token", "eos_token"),
    "llama3": ("bos_token",),
    "gemma": ("bos_token",),
}
"""The tokenizer's own tokens that each template writes."""
PROBE = [
    {"role": "user", "content": "What is 2+2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
]
_NOW = "strftime_now"
log = logging.getLogger("finetune_trainer")


def set_chat_template(tokenizer: Any, wanted: str) -> None:
    """Gives a tokenizer the job's chat template, and says in the log where it differs from its own.

    Args:
        tokenizer: is changed.
        wanted: `model.chatTemplate`: a name or a Jinja template.

    Raises:
        ConfigError: it is neither, or the tokenizer lacks the named template's tokens.
    """
    if "{{" in wanted or "{%" in wanted:
        tokenizer.chat_template = wanted
        return
    if wanted not in CHAT_TEMPLATES:
        raise ConfigError(f"model.chatTemplate: {CHAT_TEMPLATE_RULE}, got `{wanted}`")
    text = named_template(wanted)
    _check_tokens(tokenizer, wanted)
    if tokenizer.chat_template:
        _compare(tokenizer, wanted, text)
    tokenizer.chat_template = text


def fix_date(tokenizer: Any, day: date) -> None:
    """Makes templates that write today's date (`strftime_now`) write another day's, in this process.

    The name is set in the compiled template, which transformers keeps: of a function it would pass on only the name.
    """
    for template in _dated(tokenizer):
        template.globals[_NOW] = day.strftime


def written_date(tokenizer: Any) -> str | None:
    """The date that the tokenizer's templates write; None if they write none."""
    for template in _dated(tokenizer):
        return str(template.globals[_NOW]("%Y-%m-%d"))
    return None


def _dated(tokenizer: Any) -> list[Any]:
    """The compiled templates that write a date."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    own = tokenizer.chat_template or ""
    texts = own.values() if isinstance(own, dict) else [own]
    return [_compile_jinja_template(text) for text in texts if _NOW in text]


def wants_parts(tokenizer: Any) -> bool:
    """Whether a template wants a turn's content as a list of texts and images, as those of LLaVA's repositories on the hub do.

    Of a plain text they would show nothing, without an error.
    """
    if not tokenizer.chat_template:
        return False
    word = "finetune-probe"
    parts = [{"type": "text", "text": word}]
    plain, listed = (render(tokenizer, [{"role": "user", "content": c}]) for c in (word, parts))
    return word not in plain and word in listed and not listed.startswith("refused")


def closing(tokenizer: Any) -> str:
    """What the tokenizer's template writes after the words of a conversation's last answer; empty if it shows no words."""
    if not tokenizer.chat_template:
        return ""
    word = "finetune-probe"
    for content in (word, [{"type": "text", "text": word}]):
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        _, found, rest = render(tokenizer, turns).rpartition(word)
        if found:
            return rest
    return ""


def end_of_turn(tokenizer: Any) -> str | None:
    """The token that ends an answer in the tokenizer's template; None if that is not one token.

    It need not be the tokenizer's end of text: Qwen2.5's base model has `<|endoftext|>`, and its turns end with `<|im_end|>`.
    """
    rest = closing(tokenizer).lstrip()
    return max((token for token in tokenizer.get_added_vocab() if rest.startswith(token)), key=len, default=None)


def end_ids(generation_config: Any) -> list[int]:
    """The tokens at which a model's generation configuration says that its answers end; Llama 3 has several."""
    named = getattr(generation_config, "eos_token_id", None)
    return list(named) if isinstance(named, list) else [i for i in (named,) if i is not None]


def render(tokenizer: Any, turns: list[dict[str, Any]], template: str | None = None) -> str:
    """A conversation without functions as text, or why it is refused; by the tokenizer's own template if none is given."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template))
    except (TemplateError, TypeError) as error:
        return f"refused: {error}"


def named_template(name: str) -> str:
    """The Jinja text of one of `CHAT_TEMPLATES`."""
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def _check_tokens(tokenizer: Any, name: str) -> None:
    missing = [m for m in MARKERS.get(name, ()) if len(tokenizer.encode(m, add_special_tokens=False)) != 1]
    if missing:
        raise ConfigError(
            f"model.chatTemplate: {name} needs the tokens {', '.join(f'`{m}`' for m in missing)}, which the tokenizer would "
            "cut into pieces that the model has never seen as marks of a turn; choose the template that belongs to the model, "
            "or give a Jinja template"
        )
    absent = [kind for kind in SPECIAL.get(name, ()) if not getattr(tokenizer, kind)]
    if absent:
        raise ConfigError(f"model.chatTemplate: {name} needs {' and '.join(absent)}, which the tokenizer has not")


def _compare(tokenizer: Any, name: str, text: str) -> None:
    for turns, kind in (
        (PROBE, "a conversation"),
        ([{"role": "system", "content": "Be brief."}, *PROBE], "a system turn"),
    ):
        ours, own = render(tokenizer, turns, text), render(tokenizer, turns)
        if ours != own:
            log.warning(
                "model.chatTemplate: %s renders %s differently from the tokenizer's own template: %r instead of %r",
                name,
                kind,
                ours,
                own,
            )
            return

"""Which model, from where, with which chat template."""

import difflib
import re
from pathlib import Path

from finetune_cli.convert import templates
from finetune_cli.convert.conversion import Conversion
from finetune_cli.convert.uris import ON_THIS_MACHINE

_HUB_NAME = re.compile(r"^[A-Za-z0-9][-A-Za-z0-9._]*/[A-Za-z0-9][-A-Za-z0-9._]*$")


def source(c: Conversion) -> None:
    """`model.uri`, revision and credentials."""
    name = c.config["model_name_or_path"]
    if c.options.model_uri:
        uri = c.options.model_uri
        if name is not None:
            c.note("model_name_or_path", f"replaced by `--model-uri {uri}`")
    elif name is None:
        c.refuse("model_name_or_path", "the model is missing", "`model_name_or_path: org/name`, or `--model-uri`")
        return
    elif _HUB_NAME.match(name) and not any((folder / name).exists() for folder in (c.config.source.folder, Path())):
        uri = f"hf://{name}"
    else:
        c.refuse(
            "model_name_or_path",
            ON_THIS_MACHINE,
            "`--model-uri pvc://CLAIM/PATH` for a volume of the cluster, or `--model-uri file:///PATH` for `finetune run`",
            "model_revision",
        )
        return
    c.put("model.uri", uri, "model_name_or_path")
    if "model_revision" in c.config and uri.startswith("hf://"):
        c.put("model.revision", c.config["model_revision"], "model_revision")
    elif "model_revision" in c.config:
        c.note("model_revision", "no effect: the model does not come from a hub")
    if c.options.hub_secret and uri.startswith("hf://"):
        c.put("model.credentialsRef", secret(c.options.hub_secret))


def cache(c: Conversion) -> None:
    """`cache.uri`."""
    if c.options.cache_uri:
        c.put("cache.uri", c.options.cache_uri, "cache_dir")
    elif "cache_dir" in c.config:
        c.note("cache_dir", "no effect: `--cache-uri pvc://CLAIM/PATH` would say which volume keeps downloads")


def secret(reference: str) -> dict[str, str]:
    """`NAME` or `NAME/KEY` as a reference to a Secret."""
    name, _, key = reference.partition("/")
    return {"name": name, "key": key or "token"}


def template(c: Conversion) -> None:
    """`model.chatTemplate`."""
    name, given = c.config["template"], c.options.chat_template
    if c.config["enable_thinking"] is False and not given:
        c.refuse(
            "enable_thinking",
            "thoughts are the chat template's matter",
            "`--chat-template FILE` with a template that has none",
        )
    elif "enable_thinking" in c.config:
        c.note("enable_thinking", "no effect of its own: thoughts are the chat template's matter")
    if given:
        if given != "tokenizer":
            c.put("model.chatTemplate", given)
        if name is not None:
            c.note("template", "replaced by `--chat-template`")
    elif name is None:
        return
    elif name in templates.BY_NAME:
        c.put("model.chatTemplate", name, "template")
    elif name == "codellama":
        c.put("model.chatTemplate", name, "template")
        c.note("template", "LLaMA-Factory has no such template (llama2 is the one for it); here there is one")
    elif name in templates.TOKENIZERS:
        c.note("template", f"no template of that name here; the tokenizer's own is used. {_tokenizers(name)}")
    else:
        c.refuse("template", *_other_template(name))


def _tokenizers(name: str) -> str:
    """How a tokenizer's template may differ from LLaMA-Factory's of this name."""
    if name.endswith("_nothink"):
        return (
            "It may write an empty thought before an answer, where LLaMA-Factory's writes none: `--chat-template FILE` with a"
            " template that has none"
        )
    if name in templates.REASONING:
        return (
            "It may leave out the thoughts of earlier turns, and write empty ones elsewhere than LLaMA-Factory's: then"
            " conversations of several turns need `mask_history: true`, or `--chat-template FILE` with a template that keeps them"
        )
    return "LLaMA-Factory's repeats it. Compare them if the model is a base model or was trained with another one"


def _other_template(name: str) -> tuple[str, str]:
    own = "`--chat-template FILE` (Jinja), or `--chat-template tokenizer` for the tokenizer's own"
    if name in templates.OWN:
        return "no tokenizer brings this template along", own
    if name in templates.SEEING:
        return "of models that see, only those like LLaVA-1.5 are supported", "`template: llava`, or a model of text"
    near = difflib.get_close_matches(
        name, sorted({*templates.BY_NAME, *templates.TOKENIZERS, *templates.OWN, "codellama"}), n=1, cutoff=0.5
    )
    return "no such template" + (f"; the nearest is `{near[0]}`" if near else ""), own

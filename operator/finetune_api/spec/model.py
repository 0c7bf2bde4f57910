"""`spec.model`: what is trained."""

from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel, ModelUri, rules
from finetune_api.spec.common import HUB_ONLY, SecretKeyRef, Short

CHAT_TEMPLATES = ("llama2", "llama3", "codellama", "chatml", "qwen", "mistral", "gemma", "llava")
"""Templates that `model.chatTemplate` knows by name."""


CHAT_TEMPLATE_RULE = (
    f"`chatTemplate` must be one of {', '.join(CHAT_TEMPLATES)}, or a Jinja template (with `{{{{` or `{{%`)"
)


class ModelSpec(ApiModel):
    model_config = {
        "json_schema_extra": rules(
            ("!has(self.revision) || self.uri.startsWith('hf://')", f"`revision` {HUB_ONLY}"),
            ("!has(self.credentialsRef) || self.uri.startsWith('hf://')", f"`credentialsRef` {HUB_ONLY}"),
            (
                "!has(self.chatTemplate) || self.chatTemplate.contains('{{') || self.chatTemplate.contains('{%')"
                f" || self.chatTemplate in {list(CHAT_TEMPLATES)}",
                CHAT_TEMPLATE_RULE,
            ),
        )
    }

    uri: ModelUri
    """Where the model is: `hf://org/name`, `pvc://claim/path` or `file:///path` (inside the trainer's container), in Hugging
    Face layout (config.json, safetensors, tokenizer)."""
    revision: Short | None = None
    """Branch, tag or commit of an `hf://` model; the commit that it named at the first start is kept in status for all
    later attempts."""
    credentials_ref: SecretKeyRef | None = None
    """Token for an `hf://` model that is private or gated."""
    chat_template: Annotated[str, Field(min_length=1, max_length=32768)] | None = None
    """Chat template that replaces the tokenizer's own: one of the names llama2, llama3, codellama, chatml, qwen, mistral,
    gemma and llava, or a Jinja template."""

"""A tiny random Llama, a tokenizer and data for tests, written to a folder. No download, no real weights."""

import json
import random
from pathlib import Path
from typing import Any

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = tuple("the a red blue small large cat dog house tree runs sleeps sings and or not why because of in on".split())  # noqa: SIM905


def make_tokenizer(template: str | None = CHATML, *more: str) -> Any:
    """Byte-level BPE with ChatML tokens and `more` of the kind; padding and end of text share an id, as in SmolLM2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        [" ".join(WORDS)] * 4, trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder: Path, *, layers: int = 2, dtype: str = "bfloat16", tied: bool = True) -> Path:
    """Saves a random Llama of about 0.1 M parameters with its tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    tokenizer = make_tokenizer()
    config = _llama_config(tokenizer, num_hidden_layers=layers, tie_word_embeddings=tied)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_other(folder: Path, kind: str, **sizes: Any) -> Path:
    """Saves a random model of another of transformers' kinds, as small, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_sizes(tokenizer), **sizes))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _llama_config(tokenizer: Any, **others: Any) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(**{**_sizes(tokenizer), **others})


def _sizes(tokenizer: Any) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **ids,
    }


def make_llava(folder: Path, *, template: str | None = CHATML, max_positions: int = 256, siglip: bool = False) -> Path:
    """Saves a model of LLaVA's architecture with its processor: a random CLIP tower, a random projector, a random Llama.

    An image of 64x64 pixels is 16 tokens. With `siglip` the tower is a random SigLIP, and its last layer is taken, whole.
    """
    import torch
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipVisionConfig,
    )

    tokenizer = make_tokenizer(template, "<image>")
    text = _llama_config(tokenizer, max_position_embeddings=max_positions)
    tower = (SiglipVisionConfig if siglip else CLIPVisionConfig)(
        hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=64, patch_size=16
    )
    strategy = "full" if siglip else "default"
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_select_strategy=strategy,
        vision_feature_layer=-1 if siglip else -2,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    LlavaProcessor(
        processor,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(not siglip),
        chat_template=template,
    ).save_pretrained(folder)
    return folder


def chats(count: int, seed: int) -> list[dict[str, Any]]:
    """Two-turn conversations of different lengths."""
    rng = random.Random(seed)

    def say(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [
        {
            "messages": [
                {"role": "user", "content": say(2, 8)},
                {"role": "assistant", "content": say(1, 6)},
                {"role": "user", "content": say(2, 5)},
                {"role": "assistant", "content": say(1, 10)},
            ]
        }
        for _ in range(count)
    ]


def write_jsonl(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path

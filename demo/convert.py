"""Turns a GGUF file into a model folder of Hugging Face layout: bfloat16 safetensors, config and tokenizer.

    PYTHONPATH=<folder of the gguf package> python convert.py MODEL.gguf TARGET

Runs in the trainer's image, where torch and transformers are; imports nothing of this project.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""What a fresh configuration takes over; the GGUF's quantisation is left behind."""


def convert(source: Path, target: Path) -> None:
    """Writes the model of `source` to the folder `target`."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = LlamaConfig(**{name: getattr(loaded.config, name) for name in KEPT})
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))

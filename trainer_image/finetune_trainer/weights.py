"""Which files of a folder are a model's weights. Must not import torch."""

import json
from pathlib import Path

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads, whether they are there or not.

    Others can lie beside them, such as `consolidated.safetensors`, the same weights under other names.
    """
    index = folder / INDEX
    if not index.is_file():
        return [folder / FILE]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]

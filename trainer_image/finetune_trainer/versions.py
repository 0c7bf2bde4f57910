"""Versions of the libraries that decide a run's numbers, read from their metadata without importing them; and of our code."""

import hashlib
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIBRARIES = ("finetune-operator", "torch", "deepspeed", "transformers", "peft", "safetensors", "numpy")
OPERATORS = ("flash-attn", "flash-attn-3", "liger-kernel")
"""Libraries whose operators may be part of compiled code."""


@cache
def versions() -> dict[str, str]:
    """Name to version, for manifests and results."""
    found = {"python": platform.python_version()}
    return found | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@cache
def code_digest() -> str:
    """Tells one state of this package's code, and of those who define operators, from another.

    torch's caches of compiled code know their torch and what they compiled, but not the gradients of operators: code that was
    compiled with an older one would be taken, and train on its gradients.
    """
    digest = hashlib.sha256(repr([_version(name) for name in OPERATORS]).encode())
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]

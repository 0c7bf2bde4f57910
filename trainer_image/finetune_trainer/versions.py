"""Versions of the libraries that decide a run's numbers, read from their metadata without importing them."""

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("finetune-operator", "torch", "deepspeed", "transformers", "peft", "safetensors", "numpy")


@cache
def versions() -> dict[str, str]:
    """Name to version, for manifests and results."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found

"""Finds the files that a configuration names."""

from pathlib import Path

from finetune_cli.convert.conversion import Conversion


def find(c: Conversion, name: str) -> tuple[Path | None, str]:
    """Looks for a file beside the configuration, then in the working directory, where LLaMA-Factory looks.

    Returns:
        The file or None, and the places for a message.
    """
    if Path(name).is_absolute():
        return (Path(name) if is_file(Path(name)) else None), name
    places = [c.config.source.folder / name, Path.cwd() / name]
    found = next((place for place in places if is_file(place)), None)
    return found, f"`{name}` beside the configuration and in the working directory"


def is_file(path: Path) -> bool:
    """Whether a file is there, also for what cannot be a path: a name that is too long, or has a NUL."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False

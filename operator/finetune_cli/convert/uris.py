"""Paths of this machine as URIs of a volume, and names that Kubernetes takes."""

import posixpath
import re

from finetune_cli.convert_options import NAME_LENGTH

ON_THIS_MACHINE = "lies on this machine, where a job's pods do not see it"
"""Why a path alone is not enough."""
_PLACES = {
    "saves",
    "save",
    "outputs",
    "output",
    "results",
    "result",
    "checkpoints",
    "models",
    "data",
    "mnt",
    "workspace",
    "home",
}
"""Folder names that say nothing about a job."""
_GENERAL = {"config", "train", "training", "sft", "lora", "full", "finetune", "llamafactory", "args", "training-args"}
"""File names that say nothing about a job."""


def join(prefix: str, path: str) -> str | None:
    """A path below a URI; a leading slash goes. None if it would leave the URI's folder."""
    relative = posixpath.normpath(path.lstrip("/"))
    if relative.startswith(".."):
        return None
    folder = prefix.rstrip("/") + "/" if prefix != "file:///" else prefix
    return prefix.rstrip("/") if relative == "." else folder + relative


def job_name(file_stem: str, output_dir: str | None) -> str:
    """A job's name from its file's, or from where its output goes if that says more."""
    name = _plain(file_stem)
    if name in _GENERAL or not name:
        parts = [part for part in re.split(r"[/\\]", output_dir or "") if part.lower() not in _PLACES]
        name = _plain("-".join(parts)) or name or "finetune"
    return name[:NAME_LENGTH].rstrip("-")


def _plain(text: str) -> str:
    """Lower-case letters, digits and `-`, beginning with a letter."""
    name = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    return f"job-{name}" if name[:1].isdigit() else name

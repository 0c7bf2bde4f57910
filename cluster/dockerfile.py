"""Reads from a Dockerfile what a target is made of, so that an image's tag names its content."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from cluster.build import content_hash
from cluster.errors import ClusterError

FROM = re.compile(r"^FROM\s+(?:--\S+\s+)*(\S+)(?:\s+AS\s+(\S+))?", re.IGNORECASE)
COPY = re.compile(r"^(?:COPY|ADD)\s+(.*)", re.IGNORECASE)
OTHER_STAGE = re.compile(r"(?:--|[, ])from=([^\s,]+)")


def inputs(text: str, target: str) -> list[str]:
    """Returns the paths of the build context that a target is made of, those of the stages that it uses included.

    Raises:
        ClusterError: The Dockerfile has no such target.
    """
    stages = _stages(text)
    if target not in stages:
        raise ClusterError(f"the Dockerfile has no target `{target}`", hint=f"targets: {', '.join(stages)}")
    paths: set[str] = set()
    open_, done = [target], set()
    while open_:
        stage = open_.pop()
        if stage in done or stage not in stages:
            continue
        done.add(stage)
        for line in stages[stage]:
            open_ += OTHER_STAGE.findall(line)
            if start := FROM.match(line):
                open_.append(start[1])
            elif (copy := COPY.match(line)) and not OTHER_STAGE.search(line):
                paths.update(word for word in copy[1].split()[:-1] if not word.startswith("--"))
    return sorted(paths)


def tag(repository: Path, target: str, build_args: Iterable[str]) -> str:
    """Returns a tag that changes with anything that a target is made of."""
    dockerfile = repository / "Dockerfile"
    if not dockerfile.exists():
        raise ClusterError(f"there is no {dockerfile}")
    paths = [repository / name for name in inputs(dockerfile.read_text(), target)]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ClusterError(f"the Dockerfile copies what is not there: {', '.join(missing)}")
    return content_hash([dockerfile, *paths], [target, *sorted(build_args)])


def _stages(text: str) -> dict[str, list[str]]:
    stages: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in _logical_lines(text):
        if start := FROM.match(line):
            lines = []
            stages[start[2] or str(len(stages))] = lines
        lines.append(line)
    return stages


def _logical_lines(text: str) -> list[str]:
    kept = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [line.strip() for line in "\n".join(kept).replace("\\\n", " ").splitlines()]

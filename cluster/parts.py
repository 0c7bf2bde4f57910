"""What the supervisor runs: the parts, what is wanted of each, and what it last saw of each.

All of it is files in the state folder, so that the supervisor, `status` and `node stop` need no protocol and a killed
supervisor's successor knows what runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.processes import Process
from cluster.settings import Settings
from cluster.shell import PART_ENV


@dataclass(frozen=True)
class Part:
    """One supervised process.

    Attributes:
        name: Unique; also its log's name.
        argv: What is executed; must stay in the foreground.
        cgroup: The leaf cgroup that it is started in.
        after: `unix:PATH`, `tcp:HOST:PORT` or `ready` (the API server) that must answer before it starts.
        env: Its whole environment.
    """

    name: str
    argv: tuple[str, ...]
    cgroup: str
    after: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = tuple(PART_ENV.items())


@dataclass(frozen=True)
class Seen:
    """A part as the supervisor last saw it."""

    process: Process | None
    restarts: int
    argv: tuple[str, ...]


def log(settings: Settings, name: str) -> Path:
    """The part's log."""
    return settings.logs / f"{name}.log"


def write(settings: Settings, parts: Sequence[Part]) -> None:
    """Says which parts there are to be; the supervisor picks a change up by itself."""
    write_atomically(_wanted_file(settings), json.dumps([asdict(part) for part in parts], indent=1))


def read(settings: Settings) -> list[Part]:
    """Returns the parts that there are to be; none before the first `up`."""
    if not _wanted_file(settings).exists():
        return []
    return [
        Part(
            name=item["name"],
            argv=tuple(item["argv"]),
            cgroup=item["cgroup"],
            after=tuple(item["after"]),
            env=tuple((key, value) for key, value in item["env"]),
        )
        for item in json.loads(_wanted_file(settings).read_text())
    ]


def stamp(settings: Settings) -> int:
    """Returns a number that changes whenever the wanted parts are written; 0 before that."""
    path = _wanted_file(settings)
    return path.stat().st_mtime_ns if path.exists() else 0


def write_seen(settings: Settings, seen: Mapping[str, Seen]) -> None:
    """Records what runs."""
    write_atomically(_seen_file(settings), json.dumps({name: asdict(one) for name, one in seen.items()}, indent=1))


def read_seen(settings: Settings) -> dict[str, Seen]:
    """Returns what was last recorded as running."""
    if not _seen_file(settings).exists():
        return {}
    items: dict[str, dict[str, Any]] = json.loads(_seen_file(settings).read_text())
    return {
        name: Seen(
            process=Process(**item["process"]) if item["process"] else None,
            restarts=item["restarts"],
            argv=tuple(item["argv"]),
        )
        for name, item in items.items()
    }


def hold(settings: Settings, name: str) -> None:
    """Takes a part out of supervision: once dead, it stays dead."""
    _held_folder(settings).mkdir(parents=True, exist_ok=True)
    (_held_folder(settings) / name).touch()


def release(settings: Settings, name: str) -> None:
    """Puts a part back under supervision."""
    (_held_folder(settings) / name).unlink(missing_ok=True)


def held(settings: Settings) -> set[str]:
    """The parts that are out of supervision."""
    folder = _held_folder(settings)
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file at once: a reader, or a kill, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)


def _wanted_file(settings: Settings) -> Path:
    return settings.state / "parts.json"


def _seen_file(settings: Settings) -> Path:
    return settings.state / "running.json"


def _held_folder(settings: Settings) -> Path:
    return settings.state / "held"

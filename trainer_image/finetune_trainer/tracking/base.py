"""What a tracker is, and what it is told of the run. Owns no client library."""

from dataclasses import dataclass
from typing import Any, Protocol

from finetune_api.launch import LaunchSpec


@dataclass(frozen=True)
class RunFacts:
    """The run, as trackers are told of it."""

    uid: str
    """The job's: every attempt continues the same run."""
    attempt: int
    first_step: int
    """The first step that this attempt will do."""
    config: dict[str, Any]
    """The launch file, without the paths of secrets and what only concerns this attempt."""


class Tracker(Protocol):
    """Calls come from one thread, which is not training's. A tracker may raise, and may hang: others do not notice."""

    name: str
    """The field of the spec, for messages."""

    def start(self, facts: RunFacts) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def finish(self, succeeded: bool) -> None: ...


_OF_THE_ATTEMPT = ("attempt", "rendezvous", "httpPort", "tracking")


def run_config(spec: LaunchSpec) -> dict[str, Any]:
    """The launch file as a run's configuration: what is the same in all attempts, and nothing about secrets."""
    wire = {key: value for key, value in spec.to_wire().items() if key not in _OF_THE_ATTEMPT}
    return {key: _without_token_files(value) for key, value in wire.items()}


def _without_token_files(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_token_files(item) for key, item in value.items() if key != "tokenFile"}
    return [_without_token_files(item) for item in value] if isinstance(value, list) else value

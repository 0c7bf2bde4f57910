"""When a leader gives up, on a clock that only requests and waits move."""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_operator.shell import election
from finetune_operator.shell.election import Election, LeaseConfig, LeaseLostError
from finetune_operator.shell.errors import ApiError, ConflictError, NotFoundError, UnavailableError


@dataclass
class Clock:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class Server:
    """Answers each request after the seconds that it is told, with the Lease or an error; after that no more."""

    def __init__(self, clock: Clock, answers: list[tuple[float, ApiError | None]]) -> None:
        self.clock = clock
        self.answers = answers
        self.renewed_at = 0.0
        """When the last write was asked for that was answered."""

    async def request(self, method: str, *_: Any, body: Any = None, timeout_seconds: float, **_more: Any) -> Any:
        asked_at = self.clock.now
        seconds, error = self.answers.pop(0) if self.answers else (timeout_seconds + 1, None)
        self.clock.now += min(seconds, timeout_seconds)
        if seconds > timeout_seconds:
            raise UnavailableError(0, "TimeoutError", "no answer")
        if error is not None:
            raise error
        if method == "GET":
            return {"metadata": {}, "spec": {"holderIdentity": "one"}}
        self.renewed_at = asked_at
        return body


NO_LEASE = (0.0, NotFoundError(404, "NotFound", "no Lease"))
LATE = {
    "taken, told late": [NO_LEASE, (3.9, None)],
    "renewed, told late": [NO_LEASE, (0.0, None), (2.8, None)],
    "refused at once": [NO_LEASE, (0.0, None), *[(0.0, ApiError(503, "Unavailable", "down"))] * 100],
    "changed, told late": [NO_LEASE, (0.0, None), (2.0, ConflictError(409, "Conflict", "changed"))],
}


@pytest.mark.parametrize("answers", LATE.values(), ids=LATE.keys())
@pytest.mark.parametrize("retry_seconds", [1.0, 3.0])
def test_a_leader_gives_up_in_time(
    answers: list[tuple[float, ApiError | None]], retry_seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another replica may lead six seconds after it saw the Lease change, and so six after the leader asked for it."""
    clock = Clock()
    monkeypatch.setattr(election, "time", SimpleNamespace(monotonic=clock.monotonic))
    monkeypatch.setattr(election, "asyncio", SimpleNamespace(sleep=clock.sleep))
    server = Server(clock, list(answers))
    leader = Election(server, LeaseConfig("ns", "op", "one", retry_seconds=retry_seconds))  # type: ignore[arg-type]

    async def lead() -> None:
        await leader.acquire()
        await leader.hold()

    with pytest.raises(LeaseLostError, match="not renewed"):
        asyncio.run(lead())
    assert clock.now == pytest.approx(server.renewed_at + 4, abs=0.01)

"""The side thread: what its HTTP endpoints answer, and where."""

import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.config import resolve_config
from finetune_operator.shell import side as side_module
from finetune_operator.shell.errors import ApiError
from finetune_operator.shell.side import Side, bind
from tests.trainer.jobs import free_port

IF_INET6 = Path("/proc/net/if_inet6")


@contextmanager
def running(*arguments: str) -> Iterator[int]:
    """The side thread of an operator; gives its port."""
    port = free_port()
    config = resolve_config(["--trainer-image", "x", "--http-port", str(port), *arguments], {"POD_NAME": "one"})
    side = Side(config, refresh_gauges=lambda: None)
    side.start()
    try:
        wait(lambda: listens(port))
        yield port
    finally:
        side.stop()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def wait(condition: Callable[[], bool]) -> None:
    """Waits until something is so; only a failure takes the whole time."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def status(port: int, path: str, address: str = "127.0.0.1") -> int:
    """The HTTP status of one answer."""
    try:
        with urllib.request.urlopen(f"http://{address}:{port}{path}", timeout=30) as answer:
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        return error.code


class Leases:
    """The API server, as far as a Lease goes that another replica holds."""

    def __init__(self) -> None:
        self.allowed = False
        self.refusals = 0

    async def request(self, *_: Any, **_more: Any) -> dict[str, Any]:
        if not self.allowed:
            self.refusals += 1
            raise ApiError(403, "Forbidden", "cannot get resource leases")
        return {"metadata": {}, "spec": {"holderIdentity": "two"}}

    async def close(self) -> None:
        """Nothing is open."""


def test_a_standby_is_ready_once_it_has_read_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_configuration(_: object) -> None:
        return None

    leases = Leases()
    monkeypatch.setattr(side_module, "load_configuration", no_configuration)
    monkeypatch.setattr(side_module, "Api", lambda _: leases)
    with running("--retry-period", "0.01") as port:
        assert status(port, "/readyz") == 503
        wait(lambda: leases.refusals > 1)
        assert status(port, "/readyz") == 503, "it may not read the Lease"
        leases.allowed = True
        wait(lambda: status(port, "/readyz") == 200)


def test_it_listens_on_both_families() -> None:
    has_ipv6 = IF_INET6.exists() and IF_INET6.read_text() != ""
    with running("--no-leader-elect") as port:
        assert status(port, "/healthz") == 200
        if has_ipv6:
            assert status(port, "/healthz", "[::1]") == 200


def test_it_listens_where_ipv6_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    make = socket.create_server

    def without_ipv6(address: tuple[str, int], *, family: int = socket.AF_INET, **more: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return make(address, family=family, **more)

    monkeypatch.setattr(socket, "create_server", without_ipv6)
    with bind(free_port()) as listener:
        assert listener.family == socket.AF_INET


def test_a_taken_port_ends_the_operator() -> None:
    with bind(0) as listener:
        port = listener.getsockname()[1]
        config = resolve_config(["--trainer-image", "x", "--http-port", str(port), "--no-leader-elect"], {})
        side = Side(config, refresh_gauges=lambda: None)
        side.start()
        with pytest.raises(OSError, match="in use"):
            side.wait_until_leading()

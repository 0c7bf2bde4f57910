"""The side thread: HTTP endpoints and leader election, on an event loop of their own.

There they neither wait for a busy reconcile loop nor end with kopf's, which cancels all tasks that it meets.
"""

import asyncio
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator.config import OperatorConfig
from finetune_operator.shell.api import Api, load_configuration
from finetune_operator.shell.election import Election, LeaseLostError
from finetune_operator.shell.metrics import IS_LEADER

_LOG = logging.getLogger(__name__)
EXIT_LEASE_LOST = 1
STOP_SECONDS = 5.0


def bind(port: int) -> socket.socket:
    """A listening socket on all interfaces, IPv4 and, where the machine has it, IPv6.

    Raises:
        OSError: the port is taken.
    """
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # IPv6 is switched off
                raise
    return socket.create_server(("", port), backlog=64)


class Side:
    """Runs in a thread; `wait_until_leading` and `stop` are for the main thread."""

    def __init__(self, config: OperatorConfig, refresh_gauges: Callable[[], None]) -> None:
        self._config = config
        self._refresh_gauges = refresh_gauges
        self._thread = threading.Thread(target=self._main, name="side", daemon=True)
        self._changed = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._error: BaseException | None = None
        self._election: Election | None = None
        self.leading = False
        self.synced = False

    def start(self) -> None:
        self._thread.start()

    def wait_until_leading(self) -> bool:
        """Blocks until this replica leads (True) or `interrupt` or an error ends the wait (False).

        Raises:
            BaseException: what ended the side thread.
        """
        self._changed.wait()
        if self._error is not None:
            raise self._error
        return self.leading

    def interrupt(self) -> None:
        """Ends `wait_until_leading`; safe in a signal handler."""
        self._changed.set()

    def stop(self) -> None:
        """Releases the Lease and closes the endpoints."""
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=STOP_SECONDS)

    def _main(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            self._error = error
            _LOG.critical("the HTTP endpoints or the election ended: %s", error)
            if self.leading:
                self._abort()
            self._changed.set()

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        listener = bind(self._config.http_port)
        server = uvicorn.Server(uvicorn.Config(self._app(), log_config=None, access_log=False))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        electing = asyncio.create_task(self._elect())
        stopping = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait({serving, electing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        electing.cancel()
        results = await asyncio.gather(electing, return_exceptions=True)
        server.should_exit = True
        await serving
        if stopping in done:
            return
        stopping.cancel()
        for result in results:
            if isinstance(result, Exception):
                raise result
        raise RuntimeError("the HTTP server ended")

    async def _elect(self) -> None:
        lease = self._config.lease
        if lease is None:
            self._lead()
            await asyncio.Event().wait()
            return
        api = Api(await load_configuration(self._config.kubeconfig))
        self._election = election = Election(api, lease)
        try:
            await election.acquire()
            _LOG.info("%s leads", lease.identity)
            self._lead()
            await election.hold()
        except LeaseLostError as error:
            _LOG.critical("%s; this replica ends", error)
            self._abort()
        finally:
            await election.release()
            await api.close()

    def _lead(self) -> None:
        self.leading = True
        IS_LEADER.set(1)
        self._changed.set()

    def _abort(self) -> None:
        # Not a clean exit on purpose: from this moment on not one more write may leave this process.
        logging.shutdown()
        os._exit(EXIT_LEASE_LOST)

    def _app(self) -> FastAPI:
        app = FastAPI(title="finetune-operator", openapi_url=None)

        @app.get("/healthz")
        async def healthz() -> Response:
            return Response("ok\n", media_type="text/plain")

        @app.get("/readyz")
        async def readyz() -> Response:
            standby = self._election is not None and self._election.standing_by
            ready = self.synced if self.leading else standby
            return Response("ok\n" if ready else "not ready\n", 200 if ready else 503, media_type="text/plain")

        @app.get("/metrics")
        async def metrics() -> Response:
            self._refresh_gauges()
            return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

        return app

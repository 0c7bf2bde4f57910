"""HTTP of one pod: `/progress`, `/metrics` and `/healthz`, served by the supervisor while the ranks load or train.

The socket is bound before the ranks start, so a taken port is an error at once and early callers wait instead of being
refused; FastAPI is imported on the server's own thread, beside the ranks' imports.
"""

import errno
import socket
import threading
import time
from collections.abc import Callable

from finetune_trainer.errors import ConfigError
from finetune_trainer.state import RankState

States = Callable[[], list[RankState]]


def bind(port: int, host: str = "") -> socket.socket:
    """A listening socket, without `host` on all interfaces, IPv4 and, where the machine has it, IPv6.

    Raises:
        ConfigError: the port is taken.
    """
    try:
        if not host and socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("", port), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
            except OSError as error:
                if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # IPv6 is switched off
                    raise
        return socket.create_server((host, port), backlog=64)
    except OSError as error:
        raise ConfigError(f"httpPort: port {port} cannot be listened on: {error.strerror}") from error


def serve(listener: socket.socket, states: States, attempt: int) -> None:
    """Starts serving on a daemon thread; it ends with the process."""
    threading.Thread(target=_run, args=(listener, states, attempt), name="http", daemon=True).start()


def _run(listener: socket.socket, states: States, attempt: int) -> None:
    import uvicorn
    from fastapi import FastAPI, Response
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

    from finetune_trainer.metrics import RankCollector
    from finetune_trainer.report import progress_report

    started = time.time()
    app = FastAPI(title="finetune-trainer", docs_url=None, redoc_url=None, openapi_url=None)
    registry = CollectorRegistry()
    # Before the first heartbeat nothing: a sample would need a rank, and which ranks are this pod's is not known here.
    registry.register(RankCollector(states))

    @app.get("/progress")
    async def progress() -> Response:
        # Before the first heartbeat the ranks are importing: that is `Loading`. Only rank 0's pod is asked.
        state = next(iter(states()), RankState(rank=0, attempt=attempt, heartbeat_time=started))
        report = progress_report(state)
        return Response(report.to_json(), media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def healthz() -> Response:
        return Response("ok\n", media_type="text/plain")

    config = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])

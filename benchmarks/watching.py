"""What the benchmarks share: a watch with our own clock, and how figures are summed up."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import aiohttp

from finetune_operator.shell.api import Api


def command_line(doc: str | None) -> argparse.ArgumentParser:
    """A parser with a program's first line and the cluster to work on."""
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    default = os.environ.get("KUBECONFIG") or None
    parser.add_argument("--kubeconfig", default=default, required=default is None, help="default: $KUBECONFIG")
    return parser


def say(text: str) -> None:
    """Progress, on stderr: stdout is the result's."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def percentiles(values: list[float]) -> dict[str, float]:
    """p50, p99 and the largest of some values, and how many there are."""
    values = sorted(values)

    def pick(share: float) -> float:
        return round(values[min(len(values) - 1, int(share * len(values)))], 3)

    return {"p50": pick(0.5), "p99": pick(0.99), "max": pick(1.0), "count": len(values)}


class Watch:
    """Hands every event of a kind in a namespace to `note`, with the monotonic time at which it came."""

    def __init__(
        self, api: Api, target: tuple[str, str], namespace: str, note: Callable[[dict[str, Any], float], None]
    ):
        self._api, self._target, self._namespace, self._note = api, target, namespace, note

    async def run(self) -> None:
        """Watches until it is cancelled."""
        rest, configuration = self._api._rest, self._api._configuration
        token = await configuration.get_api_key_with_prefix("BearerToken")
        headers = {"Accept": "application/json", **({"Authorization": token} if token else {})}
        prefix, plural = self._target
        url = f"{configuration.host}{prefix}/namespaces/{self._namespace}/{plural}?watch=1&timeoutSeconds=3600"
        while True:
            answer = await rest.request("GET", url, headers=headers, _request_timeout=aiohttp.ClientTimeout(total=None))
            async for line in answer.response.content:
                self._note(json.loads(line), time.monotonic())

"""The API server in plain JSON: kubernetes.aio for configuration, TLS, tokens and connections, dictionaries for objects.

The generated model classes cost more time to fill than the request takes, and are not needed for objects that are built and
read here as dictionaries.
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlencode

import aiohttp
from kubernetes.aio.client.configuration import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config.incluster_config import load_incluster_config
from kubernetes.aio.config.kube_config import load_kube_config

from finetune_operator.core.situation import Kind
from finetune_operator.shell.errors import UnavailableError, api_error
from finetune_operator.shell.metrics import API_REQUESTS, API_SECONDS

FIELD_MANAGER = "finetune-operator"
REQUEST_TIMEOUT_SECONDS = 30.0
CHUNK_SIZE = 500
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
_PATHS = {
    Kind.CONFIG_MAP: ("/api/v1", "configmaps"),
    Kind.SERVICE: ("/api/v1", "services"),
    Kind.JOB: ("/apis/batch/v1", "jobs"),
    Kind.FINE_TUNE_JOB: ("/apis/finetune.dev/v1alpha1", "finetunejobs"),
}
PODS = ("/api/v1", "pods")
EVENTS = ("/api/v1", "events")
LEASES = ("/apis/coordination.k8s.io/v1", "leases")


def path_of(kind: Kind) -> tuple[str, str]:
    """The API prefix and the plural of a kind."""
    return _PATHS[kind]


async def load_configuration(kubeconfig: str | None) -> Configuration:
    """Where the API server is and how to log in: the kubeconfig that is named, or the pod's own service account."""
    configuration = Configuration()
    if kubeconfig is not None:
        await load_kube_config(config_file=kubeconfig, client_configuration=configuration, persist_config=False)
    else:
        load_incluster_config(client_configuration=configuration)
    configuration.connection_pool_maxsize = 64
    # The API server is reached directly; a proxy for it stands in the kubeconfig, not in the environment.
    configuration.client_session_kwargs = {"trust_env": False}
    return configuration


class Api:
    """A client for one event loop."""

    def __init__(self, configuration: Configuration) -> None:
        self._configuration = configuration
        self._rest = RESTClientObject(configuration)

    async def close(self) -> None:
        await self._rest.close()

    async def request(
        self,
        method: str,
        target: tuple[str, str],
        *,
        verb: str,
        namespace: str | None = None,
        name: str | None = None,
        subresource: str | None = None,
        query: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        content_type: str = "application/json",
        timeout_seconds: float = REQUEST_TIMEOUT_SECONDS,
    ) -> dict[str, Any]:
        """Sends one request.

        Raises:
            ApiError: the answer is not a success, or there is none.
        """
        prefix, plural = target
        parts = [prefix, *(["namespaces", namespace] if namespace else []), plural]
        parts += [part for part in (name, subresource) if part]
        url = f"{self._configuration.host}{'/'.join(parts)}" + (f"?{urlencode(query)}" if query else "")
        resource = f"{plural}/{subresource}" if subresource else plural
        headers = {"Content-Type": content_type, "Accept": "application/json", "User-Agent": FIELD_MANAGER}
        token = await self._configuration.get_api_key_with_prefix("BearerToken")
        if token:
            headers["Authorization"] = token
        started = time.perf_counter()
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_seconds)
            response = await self._rest.request(method, url, headers=headers, body=body, _request_timeout=timeout)
            data = await response.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            API_REQUESTS.labels(verb, resource, "none").inc()
            raise UnavailableError(0, type(error).__name__, f"{method} {url}: {error}") from error
        API_SECONDS.labels(verb, resource).observe(time.perf_counter() - started)
        API_REQUESTS.labels(verb, resource, str(response.status)).inc()
        if response.status >= 400:
            raise _refusal(response.status, data)
        answer: dict[str, Any] = json.loads(data) if data else {}
        return answer

    async def apply(self, kind: Kind, manifest: dict[str, Any]) -> dict[str, Any]:
        """Server-side apply. Without force: a field that another manager owns is a conflict, not a take-over."""
        meta = manifest["metadata"]
        return await self.request(
            "PATCH",
            path_of(kind),
            verb="apply",
            namespace=meta["namespace"],
            name=meta["name"],
            query={"fieldManager": FIELD_MANAGER},
            body=manifest,
            content_type=_APPLY,
        )

    async def delete(self, kind: Kind, namespace: str, name: str, uid: str | None = None) -> None:
        """Deletes with propagation Background. With `uid`, only that very object."""
        body: dict[str, Any] = {"propagationPolicy": "Background"}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        await self.request("DELETE", path_of(kind), verb="delete", namespace=namespace, name=name, body=body)

    async def get(self, kind: Kind, namespace: str, name: str) -> dict[str, Any]:
        return await self.request("GET", path_of(kind), verb="get", namespace=namespace, name=name)

    async def patch_status(self, namespace: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        """Merge-patches the status of a FineTuneJob."""
        return await self.request(
            "PATCH",
            path_of(Kind.FINE_TUNE_JOB),
            verb="patch",
            namespace=namespace,
            name=name,
            subresource="status",
            query={"fieldManager": FIELD_MANAGER},
            body=patch,
            content_type=_MERGE,
        )

    async def list_chunks(
        self, target: tuple[str, str], namespace: str | None, selector: str | None = None
    ) -> AsyncIterator[tuple[list[dict[str, Any]], int]]:
        """Lists in chunks; yields the items and the list's resource version."""
        query = {"limit": str(CHUNK_SIZE)}
        if selector:
            query["labelSelector"] = selector
        while True:
            answer = await self.request("GET", target, verb="list", namespace=namespace, query=query)
            meta = answer.get("metadata") or {}
            yield answer.get("items") or [], int(meta["resourceVersion"])
            if not meta.get("continue"):
                return
            query["continue"] = meta["continue"]


def _refusal(status: int, data: bytes) -> Exception:
    try:
        answer = json.loads(data)
    except ValueError:
        # A proxy in between answers in its own words.
        return api_error(status, "NotKubernetes", data[:300].decode(errors="replace"))
    return api_error(status, answer.get("reason") or "Unknown", answer.get("message") or "")

"""A small client of the Kubernetes API on the standard library, for the cluster's own needs.

It exists so that `up` needs no kubectl and the storage provisioner no virtual environment.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

Object = dict[str, Any]


class ApiError(Exception):
    """The API server answered with an error. `status` is the HTTP status, 0 where it could not be reached."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Client:
    """Speaks to one API server with a client certificate."""

    def __init__(self, url: str, pki: Path, user: str, timeout_seconds: float = 10) -> None:
        self._host = urlsplit(url).netloc
        self._timeout = timeout_seconds
        self._tls = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._tls.load_cert_chain(pki / f"{user}.crt", pki / f"{user}.key")

    def request(self, method: str, path: str, body: object = None, content_type: str = "application/json") -> str:
        """Sends one request and returns the body of the answer.

        Raises:
            ApiError: The server cannot be reached or refuses.
        """
        connection = http.client.HTTPSConnection(self._host, timeout=self._timeout, context=self._tls)
        try:
            data = None if body is None else json.dumps(body)
            connection.request(method, path, body=data, headers={"Content-Type": content_type})
            answer = connection.getresponse()
            text = answer.read().decode()
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(0, f"{method} {path}: {error}") from error
        finally:
            connection.close()
        if answer.status >= 300:
            raise ApiError(answer.status, f"{method} {path}: {answer.status}: {text.strip()[:500]}")
        return text

    def get(self, path: str) -> Object:
        """Returns the object or list at a path."""
        result: Object = json.loads(self.request("GET", path))
        return result

    def exists(self, path: str) -> bool:
        """Tells whether there is an object at a path; a server that does not answer has none."""
        try:
            self.request("GET", path)
        except ApiError:
            return False
        return True

    def items(self, path: str) -> list[Object]:
        """Returns the items of the list at a path."""
        result: list[Object] = self.get(path).get("items") or []
        return result

    def apply(self, path: str, manifest: Mapping[str, Any]) -> None:
        """Server-side applies an object; `path` names the object itself."""
        query = "fieldManager=finetune-cluster&force=true"
        self.request("PATCH", f"{path}?{query}", manifest, "application/apply-patch+yaml")

    def delete(self, path: str) -> None:
        """Deletes the object at a path; one that is not there is fine."""
        try:
            self.request("DELETE", path)
        except ApiError as error:
            if error.status != 404:
                raise

    def ready(self) -> bool:
        """Tells whether the server says that it is ready."""
        try:
            return self.request("GET", "/readyz") == "ok"
        except ApiError:
            return False

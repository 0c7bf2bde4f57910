"""Leader election on a Lease. One replica acts; it ends itself before another can follow.

A Lease is held for `duration`; its holder renews it every `retry` and gives up (the process ends) when it has not managed to
for `renew_deadline`, which is shorter. Who waits measures by its own clock how long the Lease has not changed, so clocks need
not agree; the holder counts from before it asked, since the answer may come long after the Lease has changed.
`kubernetes.aio.leaderelection` has no release, and lets a renewal hang beyond the deadline.
"""

import asyncio
import logging
import math
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from finetune_operator.shell.api import LEASES, Api
from finetune_operator.shell.errors import ApiError, NotFoundError

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LeaseConfig:
    namespace: str
    name: str
    identity: str
    duration_seconds: float = 6
    renew_deadline_seconds: float = 4
    retry_seconds: float = 1


class LeaseLostError(Exception):
    """The Lease could not be renewed in time, or somebody else holds it."""


class Election:
    """One replica's part in the election."""

    def __init__(self, api: Api, config: LeaseConfig) -> None:
        self._api = api
        self._config = config
        self._lease: dict[str, Any] = {}
        self._changed_at = 0.0
        self._renewed_at = 0.0
        self.leading = False
        self.standing_by = False
        """The Lease is somebody else's, and was read: this replica can follow."""

    async def acquire(self) -> None:
        """Waits until this replica leads."""
        while not await self._try(self._config.renew_deadline_seconds):
            await asyncio.sleep(self._config.retry_seconds)
        self.leading = True

    async def hold(self) -> None:
        """Renews for as long as it can.

        Raises:
            LeaseLostError: another replica may lead from now on.
        """
        while True:
            await asyncio.sleep(min(self._config.retry_seconds, self._left()))
            if not await self._try(self._left()) and self._holder() not in ("", self._config.identity):
                raise LeaseLostError(f"the Lease is held by {self._holder()}")

    def _left(self) -> float:
        """Seconds until the holder has to give up.

        Raises:
            LeaseLostError: none are left.
        """
        left = self._renewed_at + self._config.renew_deadline_seconds - time.monotonic()
        if left <= 0:
            raise LeaseLostError(f"the Lease was not renewed for {self._config.renew_deadline_seconds} s")
        return left

    async def release(self) -> None:
        """Gives the Lease up, so that another replica need not wait for it to run out."""
        if not self.leading:
            return
        self.leading = False
        try:
            # A renewal that was cut short may have been done all the same: what is there now counts.
            await self._read(timeout_seconds=2)
            if self._holder() != self._config.identity:
                return
            spec = {**self._lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
            await self._put({**self._lease, "spec": spec}, timeout_seconds=2)
        except ApiError as error:
            _LOG.warning("the Lease could not be released, it runs out by itself: %s", error)

    async def _try(self, timeout_seconds: float) -> bool:
        """Takes or renews the Lease; whether it is this replica's now."""
        try:
            if not self.leading:
                await self._read(timeout_seconds)
                if not self._free():
                    self.standing_by = True
                    return False
            spec = self._spec()
            asked_at = time.monotonic()
            if not self._lease:
                body = {
                    "apiVersion": "coordination.k8s.io/v1",
                    "kind": "Lease",
                    "metadata": {"name": self._config.name, "namespace": self._config.namespace},
                    "spec": spec,
                }
                self._lease = await self._api.request(
                    "POST",
                    LEASES,
                    verb="create",
                    namespace=self._config.namespace,
                    body=body,
                    timeout_seconds=timeout_seconds,
                )
            else:
                await self._put({**self._lease, "spec": spec}, timeout_seconds)
        except ApiError as error:
            _LOG.warning("Lease %s/%s: %s", self._config.namespace, self._config.name, error)
            if self.leading and error.status in (404, 409):
                await self._reread(self._left())
            return False
        self._renewed_at = asked_at
        return True

    async def _reread(self, timeout_seconds: float) -> None:
        try:
            await self._read(timeout_seconds)
        except ApiError as error:
            _LOG.warning("Lease %s/%s: %s", self._config.namespace, self._config.name, error)

    async def _read(self, timeout_seconds: float) -> None:
        try:
            lease = await self._api.request(
                "GET",
                LEASES,
                verb="get",
                namespace=self._config.namespace,
                name=self._config.name,
                timeout_seconds=timeout_seconds,
            )
        except NotFoundError:
            lease = {}
        if lease.get("spec") != self._lease.get("spec"):
            self._changed_at = time.monotonic()
        self._lease = lease

    async def _put(self, body: dict[str, Any], timeout_seconds: float) -> None:
        """Writes the Lease if nobody else has since it was read."""
        self._lease = await self._api.request(
            "PUT",
            LEASES,
            verb="update",
            namespace=self._config.namespace,
            name=self._config.name,
            body=body,
            timeout_seconds=timeout_seconds,
        )

    def _holder(self) -> str:
        return (self._lease.get("spec") or {}).get("holderIdentity") or ""

    def _free(self) -> bool:
        spec = self._lease.get("spec") or {}
        if self._holder() in ("", self._config.identity):
            return True
        duration = float(spec.get("leaseDurationSeconds") or self._config.duration_seconds)
        return time.monotonic() - self._changed_at > duration

    def _spec(self) -> dict[str, Any]:
        spec = self._lease.get("spec") or {}
        mine = self._holder() == self._config.identity
        now = _now()
        return {
            "holderIdentity": self._config.identity,
            "leaseDurationSeconds": math.ceil(self._config.duration_seconds),
            "acquireTime": spec.get("acquireTime") if mine else now,
            "renewTime": now,
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if mine else 1),
        }


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

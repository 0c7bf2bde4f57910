"""The last that was seen of each job and its children, small: a job as JSON text, children as the few fields that count.

Versions of one object are compared as numbers, so an older event never replaces what is newer (for instance the answer to an
own write). What this operator deleted stays deleted, even if an older event comes late.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from finetune_api.job import API_VERSION, KIND
from finetune_api.reports import ProgressReport
from finetune_operator.core.observe import (
    Observed,
    ObservedJob,
    ObservedPod,
    Owner,
    parse_job,
    parse_owner,
    parse_pod,
)

_LOG = logging.getLogger(__name__)
_Child = TypeVar("_Child", ObservedJob, ObservedPod)
_META = ("name", "namespace", "uid", "generation", "creationTimestamp", "deletionTimestamp")
UNKNOWN_STATE = "New"


@dataclass(slots=True)
class Entry:
    """All that is known about one job, by its uid."""

    namespace: str
    name: str
    uid: str
    body: bytes | None = None
    """The FineTuneJob as JSON; None while only children of it are known."""
    version: int = 0
    state: str = UNKNOWN_STATE
    new_since: float | None = None
    """When the event of its creation came, on the monotonic clock; None: nobody waits for its first child Job, or not for us."""
    jobs: dict[str, ObservedJob] = field(default_factory=dict)
    pods: dict[str, ObservedPod] = field(default_factory=dict)
    progress: ProgressReport | None = None
    poll_at: float = 0.0
    """When to ask for progress next, on the monotonic clock."""
    silent: bool = False
    """The last poll was not answered in time."""
    may_run: bool = False
    """A pod has been running: spares the poller a look at the pods of the many jobs that wait."""
    gone: set[str] = field(default_factory=set)
    """Uids of children that this operator deleted and whose last event has not come yet."""

    def observed(self) -> Observed:
        return Observed(jobs=tuple(self.jobs.values()), pods=tuple(self.pods.values()), progress=self.progress)

    def rank0(self) -> ObservedPod | None:
        """The pod to ask for progress: index 0 of the newest attempt, while it runs."""
        if not self.may_run or not self.jobs:
            return None
        attempt = max(job.attempt for job in self.jobs.values())
        return next(
            (p for p in self.pods.values() if p.index == 0 and p.attempt == attempt and p.running and p.ip), None
        )


class Store:
    """All entries, by the job's uid."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, uid: str) -> Entry | None:
        return self._entries.get(uid)

    def put_finetunejob(self, body: dict[str, Any], *, created: bool = False) -> str | None:
        """Takes over a FineTuneJob; returns its uid if that is news.

        Args:
            body: the job.
            created: whether this is the event of its creation; one that a list brings may be of any age.
        """
        meta = body["metadata"]
        entry = self._entry(Owner(meta["namespace"], meta["name"], meta["uid"]))
        version = int(meta["resourceVersion"])
        if version <= entry.version:
            return None
        spec, status = body.get("spec") or {}, body.get("status") or {}
        trimmed = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {key: meta[key] for key in _META if key in meta},
            "spec": spec,
            "status": status,
        }
        if entry.body is None:
            entry.new_since = time.monotonic() if created else None
            if entry.namespace != meta["namespace"]:
                entry.jobs, entry.pods = {}, {}
        if spec.get("suspend") or status.get("attempts"):
            entry.new_since = None
        entry.body = json.dumps(trimmed, separators=(",", ":")).encode()
        entry.version = version
        entry.namespace, entry.name = meta["namespace"], meta["name"]
        entry.state = status.get("state") or UNKNOWN_STATE
        return entry.uid

    def drop_finetunejob(self, uid: str) -> None:
        """Forgets a FineTuneJob that is gone. Its children are Kubernetes' to collect."""
        self._entries.pop(uid, None)

    def put_job(self, body: dict[str, Any]) -> str | None:
        """Takes over a child Job; returns the owner's uid if that is news."""
        entry, job = self._child(body, parse_job)
        if entry is None or job is None:
            return None
        old = entry.jobs.get(job.name)
        if job.uid in entry.gone or (old is not None and old.uid == job.uid and old.version >= job.version):
            return None
        entry.jobs[job.name] = job
        return entry.uid if old is None or replace(old, version=job.version) != job else None

    def put_pod(self, body: dict[str, Any]) -> str | None:
        """Takes over a pod; returns the owner's uid if anything that counts has changed."""
        entry, pod = self._child(body, parse_pod)
        if entry is None or pod is None:
            return None
        old = entry.pods.get(pod.name)
        if old is not None and old.uid == pod.uid and old.version >= pod.version:
            return None
        entry.pods[pod.name] = pod
        entry.may_run = entry.may_run or pod.running
        return entry.uid if old is None or replace(old, version=pod.version) != pod else None

    def drop_job(self, body: dict[str, Any]) -> str | None:
        """Forgets a child Job whose last event came; returns the owner's uid if it was there."""
        owner = parse_owner(body)
        entry = self._entries.get(owner.uid) if owner else None
        if entry is None:
            return None
        uid, name = body["metadata"]["uid"], body["metadata"]["name"]
        entry.gone.discard(uid)
        known = entry.jobs.get(name)
        if known is None or known.uid != uid:
            return None
        del entry.jobs[name]
        self._prune(entry)
        return entry.uid

    def drop_pod(self, body: dict[str, Any]) -> str | None:
        """Forgets a pod that is gone; returns the owner's uid if it was there."""
        owner = parse_owner(body)
        entry = self._entries.get(owner.uid) if owner else None
        if entry is None:
            return None
        known = entry.pods.get(body["metadata"]["name"])
        if known is None or known.uid != body["metadata"]["uid"]:
            return None
        del entry.pods[known.name]
        self._prune(entry)
        return entry.uid

    def deleted_by_us(self, uid: str, job_name: str) -> None:
        """The API server has accepted our deletion of a child Job."""
        entry = self._entries.get(uid)
        job = entry.jobs.pop(job_name, None) if entry else None
        if entry is not None and job is not None:
            entry.gone.add(job.uid)

    def retain(self, kind: str, namespace: str | None, seen: set[str], version: int) -> list[str]:
        """After a full list of `kind` in one namespace (None: in all) at `version`: drops what was not in it.

        Returns the uids of changed jobs.

        Closes the gap that watches have: an object that vanishes while no watch is open leaves no event.
        """
        changed: list[str] = []
        for entry in list(self._entries.values()):
            if namespace not in (None, entry.namespace):
                continue
            if kind == "finetunejobs":
                if entry.body is not None and entry.uid not in seen and entry.version <= version:
                    self.drop_finetunejob(entry.uid)
                    changed.append(entry.uid)
                continue
            children: dict[str, Any] = entry.jobs if kind == "jobs" else entry.pods
            lost = [n for n, child in children.items() if child.uid not in seen and child.version <= version]
            for name in lost:
                del children[name]
            if kind == "jobs":
                entry.gone &= seen
            if lost:
                changed.append(entry.uid)
                self._prune(entry)
        return changed

    def _child(
        self, body: dict[str, Any], parse: Callable[[dict[str, Any]], _Child]
    ) -> tuple[Entry | None, _Child | None]:
        """Whose an object is and what counts of it; nothing for what only has the labels, which anybody may write."""
        owner = parse_owner(body)
        if owner is None:
            return None, None
        known = self._entries.get(owner.uid)
        if known is not None and known.namespace != owner.namespace:
            return None, None
        try:
            child = parse(body)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            name = body["metadata"]["name"]
            _LOG.warning("%s/%s is labelled as a child and is none: %r", owner.namespace, name, error)
            return None, None
        return known or self._entry(owner), child

    def _entry(self, owner: Owner) -> Entry:
        entry = self._entries.get(owner.uid)
        if entry is None:
            entry = self._entries[owner.uid] = Entry(owner.namespace, owner.name, owner.uid)
        return entry

    def _prune(self, entry: Entry) -> None:
        if entry.body is None and not entry.jobs and not entry.pods:
            self._entries.pop(entry.uid, None)

"""How long one job takes on an idle cluster: from `apply` to its first step, and from a killed rank to training again.

    python benchmarks/job_latency.py --kubeconfig "$(make -s cluster)" [--rounds 3] > latency.json

Needs what `make demo` leaves behind: the operator in the namespace `finetune` and its claim with SmolLM2-135M-Instruct and
HumanEval. Each round runs one job of two pods on two nodes, with real weights, and prints when each thing was first seen, in
seconds after the apply or after the SIGKILL. Every figure is of one clock, this program's: pods and jobs are watched, steps
are asked of rank 0 every 20 ms.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune_api.job import LABEL_ATTEMPT, LABEL_JOB_NAME
from finetune_operator.core.situation import Kind
from finetune_operator.shell.api import PODS, Api, load_configuration, path_of
from finetune_operator.shell.errors import ApiError, NotFoundError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.watching import Watch, command_line, say
from tests.e2e.cluster import cluster_command, kill_rank
from tests.e2e.jobs import SMOLLM2, manifest
from tests.e2e.kube import Kubectl

FINETUNEJOBS, JOBS = path_of(Kind.FINE_TUNE_JOB), path_of(Kind.JOB)
NUM_PODS = 2
KILL_AT_STEP = 5
POLL_SECONDS = 0.02
TIMEOUT_SECONDS = 180
SPEC: dict[str, Any] = {
    "model": {"uri": SMOLLM2},
    "datasets": {"evaluation": []},
    "training": {"maxSteps": 1000, "maxLength": 256, "globalBatchSize": 2},
    "trainer": {"numNodes": NUM_PODS},
    "checkpoint": {"everySteps": 2},
}


class Timeline:
    """When each thing about one job was first seen, on the monotonic clock."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: dict[str, float] = {}
        self.failed = ""
        self.rank0: dict[int, str] = {}
        """The pod with index 0 of each attempt, once it runs."""
        self._pods: dict[str, set[str]] = {}

    def note(self, what: str, now: float) -> None:
        self.seen.setdefault(what, now)

    def note_finetunejob(self, event: dict[str, Any], _now: float) -> None:
        """Only a failure counts: there is nothing more to wait for."""
        body = event["object"]
        if body["metadata"]["name"] == self.name:
            status = body.get("status", {})
            self.failed = status.get("message", "") if status.get("state") == "Failed" else ""

    def note_job(self, event: dict[str, Any], now: float) -> None:
        labels = event["object"]["metadata"].get("labels", {})
        if labels.get(LABEL_JOB_NAME) == self.name:
            self.note(f"childJob/{labels[LABEL_ATTEMPT]}", now)

    def note_pod(self, event: dict[str, Any], now: float) -> None:
        """A thing about the gang is seen when it is true of all its pods; an end, when it is of one."""
        meta, status = event["object"]["metadata"], event["object"].get("status", {})
        labels = meta.get("labels", {})
        if labels.get(LABEL_JOB_NAME) != self.name:
            return
        conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
        facts = {
            "podsCreated": True,
            "podsScheduled": conditions.get("PodScheduled") == "True",
            "podsRunning": status.get("phase") == "Running",
        }
        for what in (fact for fact, true in facts.items() if true):
            key = f"{what}/{labels[LABEL_ATTEMPT]}"
            pods = self._pods.setdefault(key, set())
            pods.add(meta["name"])
            if len(pods) == NUM_PODS:
                self.note(key, now)
        if facts["podsRunning"] and labels["batch.kubernetes.io/job-completion-index"] == "0":
            self.rank0[int(labels[LABEL_ATTEMPT])] = meta["name"]
        if any("terminated" in c.get("state", {}) for c in status.get("containerStatuses", [])):
            self.note(f"podEnded/{labels[LABEL_ATTEMPT]}", now)

    def since(self, start: float, names: dict[str, str]) -> dict[str, float]:
        """Seconds after `start`, under the names that the result has."""
        return {name: round(self.seen[key] - start, 3) for key, name in names.items()}


async def progress(api: Api, kubectl: Kubectl, timeline: Timeline, attempt: int) -> dict[str, Any]:
    """What rank 0 of an attempt answers; empty while it does not."""
    pod = timeline.rank0.get(attempt)
    if pod is None:
        return {}
    with suppress(ApiError):
        return await api.request(
            "GET",
            PODS,
            verb="get",
            namespace=kubectl.namespace,
            name=f"{pod}:8080",
            subresource="proxy/progress",
            timeout_seconds=1,
        )
    return {}


async def reach_step(api: Api, kubectl: Kubectl, timeline: Timeline, attempt: int, more: int) -> int:
    """Waits until an attempt has done `more` steps of its own, notes its turning points, and returns its step."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline and not timeline.failed:
        report = await progress(api, kubectl, timeline, attempt)
        now = time.monotonic()
        if report:
            timeline.note(f"answers/{attempt}", now)
            if report["activity"] != "Loading":
                timeline.note(f"loaded/{attempt}", now)
            done = int(report["step"]) - int(report.get("resumedFromStep") or 0)
            if report["activity"] != "Loading" and done >= 1:
                timeline.note(f"firstStep/{attempt}", now)
            if report["activity"] != "Loading" and done >= more:
                return int(report["step"])
        await asyncio.sleep(POLL_SECONDS)
    raise SystemExit(f"{timeline.name}: {timeline.failed or f'no step {more} of attempt {attempt} in time'}")


async def measure(api: Api, kubectl: Kubectl, name: str) -> dict[str, dict[str, float]]:
    """One job, from its apply to its first step after a killed rank."""
    timeline = Timeline(name)
    watches = [
        asyncio.create_task(Watch(api, target, kubectl.namespace, note).run())
        for target, note in (
            (FINETUNEJOBS, timeline.note_finetunejob),
            (JOBS, timeline.note_job),
            (PODS, timeline.note_pod),
        )
    ]
    try:
        await asyncio.sleep(1)
        applied = time.monotonic()
        await api.request("POST", FINETUNEJOBS, verb="create", namespace=kubectl.namespace, body=manifest(name, SPEC))
        await reach_step(api, kubectl, timeline, 1, KILL_AT_STEP)
        pod = next(p for p in kubectl.list("pods", f"{LABEL_JOB_NAME}={name}") if p["metadata"]["name"].count("-1-1-"))
        killed = await asyncio.to_thread(kill_rank, kubectl, pod["metadata"]["name"])
        await reach_step(api, kubectl, timeline, 2, 1)
    finally:
        for watch in watches:
            watch.cancel()
        await asyncio.gather(*watches, return_exceptions=True)
        with suppress(NotFoundError):
            await api.request("DELETE", FINETUNEJOBS, verb="delete", namespace=kubectl.namespace, name=name)
    shared = {"podsCreated": "podsCreated", "podsScheduled": "podsScheduled", "podsRunning": "podsRunning",
              "answers": "rank0Answers", "loaded": "loaded", "firstStep": "firstStep"}  # fmt: skip
    return {
        "secondsAfterApply": timeline.since(
            applied, {f"{k}/1": v for k, v in {"childJob": "childJob", **shared}.items()}
        ),
        "secondsAfterKill": timeline.since(
            killed, {"podEnded/1": "podEnded", **{f"{k}/2": v for k, v in {"childJob": "childJob", **shared}.items()}}
        ),
    }


async def run(args: argparse.Namespace) -> dict[str, Any]:
    api = Api(await load_configuration(args.kubeconfig))
    kubectl = Kubectl(cluster_command("tool", "kubectl").strip(), args.kubeconfig, args.namespace)
    rounds = []
    for number in range(args.rounds):
        rounds.append(await measure(api, kubectl, f"latency-{number}"))
        say(json.dumps(rounds[-1]))
        await asyncio.sleep(5)
    await api.close()
    medians = {
        part: {what: statistics.median(one[part][what] for one in rounds) for what in rounds[0][part]}
        for part in rounds[0]
    }
    return {"rounds": args.rounds, "pods": NUM_PODS, "median": medians, "each": rounds}


def main() -> int:
    """Runs the rounds and prints the result."""
    parser = command_line(__doc__)
    parser.add_argument("--namespace", default="finetune", help="of the operator and the claim")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(asyncio.run(run(args)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

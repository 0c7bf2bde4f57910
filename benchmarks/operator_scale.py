"""How the operator scales: N FineTuneJobs against a real API server, from `apply` to deletion.

    python benchmarks/operator_scale.py 1000 --kubeconfig ~/.kube/config > scale.json

The pods ask for a node that is not there, so they stay Pending: what is measured is the operator (and the API server), not
kubelets. The operator runs as a process of this machine, out of the cluster. Steps, each a part of the JSON:

1. `apply`: N jobs are created side by side; the time from each request to its child Job (seen by a watch of our own);
2. `settle`: until the operator has written nothing for a while; requests for each job by verb and resource;
3. `restart`: SIGTERM, a new process; until every job was looked at, and what that wrote;
4. `complete`: a tenth of the jobs' pods are marked Succeeded; until their jobs are Complete;
5. `delete`: all jobs are deleted; until they and their children are gone.

With `--idle K`, K single jobs are first applied one after another to the idle cluster: apply -> pods created, and with
`--image`, on nodes: apply -> all pods running. Needs the CRD and rights of an administrator; progress goes to stderr.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from finetune_api.job import LABEL_JOB_NAME, LABEL_JOB_UID
from finetune_operator.core.situation import Kind
from finetune_operator.shell.api import PODS, Api, load_configuration, path_of
from finetune_operator.shell.errors import ApiError, ConflictError, NotFoundError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.watching import Watch, command_line, percentiles, say

FINETUNEJOBS, JOBS, NAMESPACES = path_of(Kind.FINE_TUNE_JOB), path_of(Kind.JOB), ("/api/v1", "namespaces")
QUIET_SECONDS = 10.0
WRITES = ("apply", "patch", "create", "delete", "update")
Metrics = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def manifest(namespace: str, name: str, image: str | None) -> dict[str, Any]:
    trainer: dict[str, Any] = {"numNodes": 2}
    trainer |= {"image": image} if image else {"nodeSelector": {"finetune.dev/benchmark": "no-such-node"}}
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"uri": "file:///models/none"},
            "datasets": {"train": [{"uri": "file:///data/none.jsonl"}]},
            "output": {"uri": "file:///scratch/out"},
            "trainer": trainer,
        },
    }


class Operator:
    """The operator as a child process."""

    def __init__(self, kubeconfig: str, namespace: str, port: int, log: Path) -> None:
        self._arguments = [
            *("-m", "finetune_operator", "--trainer-image", "none", "--kubeconfig", kubeconfig),
            *("--namespace", namespace, "--lease-namespace", namespace, "--http-port", str(port)),
        ]
        self._url = f"http://127.0.0.1:{port}/metrics"
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        with self._log.open("a") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._arguments,
                stdout=log,
                stderr=log,
                env={**os.environ, "POD_NAME": f"bench-{time.time()}"},
            )

    async def stop(self) -> float:
        assert self._process is not None
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        await self._process.wait()
        return time.monotonic() - started

    def peak_mib(self) -> float:
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return round(int(re.search(r"VmHWM:\s+(\d+)", status).group(1)) / 1024, 1)  # type: ignore[union-attr]

    def cpu_seconds(self) -> float:
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return round((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), 2)

    async def metrics(self) -> Metrics:
        async with aiohttp.ClientSession() as session, session.get(self._url) as response:
            text = await response.text()
        found: Metrics = {}
        for name, labels, value in re.findall(r"^(\w+)(?:\{(.*)\})? (\S+)$", text, re.MULTILINE):
            found[name, tuple(re.findall(r'(\w+)="([^"]*)"', labels))] = float(value)
        return found

    async def until(self, condition: Callable[[Metrics], bool], seconds: float = 900) -> Metrics:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with suppress(aiohttp.ClientError, OSError):
                found = await self.metrics()
                if condition(found):
                    return found
            assert self._process is not None
            if self._process.returncode is not None:
                raise SystemExit(f"the operator ended with {self._process.returncode}: see {self._log}")
            await asyncio.sleep(0.05)
        raise SystemExit(f"nothing came of it in {seconds} s: see {self._log}")


def requests(found: Metrics) -> dict[str, float]:
    """Requests by `verb resource`, without the Lease's."""
    counts: dict[str, float] = {}
    for (name, labels), value in found.items():
        if name == "finetune_operator_api_requests_total" and (of := dict(labels))["resource"] != "leases":
            key = f"{of['verb']} {of['resource']}"
            counts[key] = counts.get(key, 0) + value
    return counts


def writes(found: Metrics) -> float:
    return sum(value for key, value in requests(found).items() if key.split()[0] in WRITES)


def synced(found: Metrics) -> bool:
    return found.get(("finetune_operator_first_pass_seconds", ()), 0) > 0


def in_state(found: Metrics, state: str) -> float:
    return found.get(("finetune_operator_jobs", (("state", state),)), 0)


async def quiet(operator: Operator) -> float:
    """Waits until the operator has written nothing for a while; returns the time of its last write."""
    last, since = -1.0, time.monotonic()
    while time.monotonic() - since < QUIET_SECONDS:
        now = writes(await operator.metrics())
        if now != last:
            last, since = now, time.monotonic()
        await asyncio.sleep(0.25)
    return since


async def side_by_side(work: Callable[[int], Any], count: int, width: int = 16) -> None:
    numbers = iter(range(count))

    async def one() -> None:
        for number in numbers:
            await work(number)

    await asyncio.gather(*(one() for _ in range(width)))


@asynccontextmanager
async def bench_namespace(api: Api, name: str) -> AsyncIterator[None]:
    body = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
    with suppress(ConflictError):
        await api.request("POST", NAMESPACES, verb="create", body=body)
    try:
        yield
    finally:
        with suppress(NotFoundError):
            await api.request("DELETE", NAMESPACES, verb="delete", name=name)


class Benchmark:
    """One run; `result` is what is printed."""

    def __init__(self, api: Api, operator: Operator, namespace: str, count: int, image: str | None) -> None:
        self._api, self._operator, self._namespace, self._count, self._image = api, operator, namespace, count, image
        self._applied: dict[str, float] = {}
        self._jobs: dict[str, float] = {}
        self._gone_jobs = 0
        self._pods: dict[str, list[float]] = {}
        self._running: dict[str, list[float]] = {}
        self.result: dict[str, Any] = {"jobs": count, "podsPerJob": 2}

    def note_job(self, event: dict[str, Any], now: float) -> None:
        name = event["object"]["metadata"].get("labels", {}).get(LABEL_JOB_NAME)
        if event["type"] == "ADDED" and name:
            self._jobs.setdefault(name, now)

    def note_pod(self, event: dict[str, Any], now: float) -> None:
        name = event["object"]["metadata"].get("labels", {}).get(LABEL_JOB_NAME)
        if name and event["type"] == "ADDED":
            self._pods.setdefault(name, []).append(now)
        if name and event["object"].get("status", {}).get("phase") == "Running":
            seen = self._running.setdefault(name, [])
            if len(seen) < 2:
                seen.append(now)

    async def create(self, name: str, image: str | None = None) -> None:
        self._applied[name] = time.monotonic()
        await self._api.request(
            "POST", FINETUNEJOBS, verb="create", namespace=self._namespace, body=manifest(self._namespace, name, image)
        )

    async def idle(self, rounds: int) -> None:
        """Single jobs on the idle cluster."""
        created, running = [], []
        for number in range(rounds):
            name = f"idle-{number}"
            await self.create(name, self._image)
            while len(self._pods.get(name, [])) < 2:
                await asyncio.sleep(0.01)
            created.append(max(self._pods[name]) - self._applied[name])
            if self._image:
                while len(self._running.get(name, [])) < 2:
                    await asyncio.sleep(0.01)
                running.append(max(self._running[name]) - self._applied[name])
            await self._api.request("DELETE", FINETUNEJOBS, verb="delete", namespace=self._namespace, name=name)
            await asyncio.sleep(2)
        self.result["idle"] = {"podsCreatedSeconds": percentiles(created)}
        if running:
            self.result["idle"]["podsRunningSeconds"] = percentiles(running)

    async def apply(self) -> None:
        """N jobs at once, until all have child Jobs and the operator is quiet."""
        before = requests(await self._operator.metrics())
        cpu = self._operator.cpu_seconds()
        started = time.monotonic()
        await side_by_side(lambda number: self.create(f"scale-{number}"), self._count)
        created = time.monotonic() - started
        names = [f"scale-{number}" for number in range(self._count)]
        while not all(name in self._jobs for name in names):
            await asyncio.sleep(0.02)
        children = max(self._jobs[name] for name in names) - started
        cpu = self._operator.cpu_seconds() - cpu
        say(f"{self._count} child Jobs after {children:.1f} s")
        while sum(len(self._pods.get(name, [])) for name in names) < 2 * self._count:
            await asyncio.sleep(0.1)
        pods = max(max(self._pods[name]) for name in names) - started
        say(f"all pods after {pods:.1f} s")
        settled = await quiet(self._operator) - started
        found = await self._operator.metrics()
        after = requests(found)
        each = {key: round((value - before.get(key, 0)) / self._count, 3) for key, value in after.items()}
        each = {key: value for key, value in each.items() if value}
        self.result["apply"] = {
            "createdSeconds": round(created, 2),
            "childJobsSeconds": round(children, 2),
            "cpuSecondsUntilChildJobs": round(cpu, 2),
            "loadAverage": os.getloadavg()[0],
            "allPodsSeconds": round(pods, 2),
            "settledSeconds": round(settled, 2),
            "applyToChildJobSeconds": percentiles([self._jobs[name] - self._applied[name] for name in names]),
            "requestsPerJob": each,
            "requestsPerJobTotal": round(sum(value for key, value in each.items() if not key.startswith("list")), 3),
            "peakMiB": self._operator.peak_mib(),
        }

    async def restart(self) -> None:
        """A new process looks at all jobs."""
        stop = await self._operator.stop()
        started = time.monotonic()
        await self._operator.start()
        found = await self._operator.until(synced)
        looked = time.monotonic() - started
        await quiet(self._operator)
        self.result["restart"] = {
            "stopSeconds": round(stop, 2),
            "allLookedAtSeconds": round(looked, 2),
            "firstPassSeconds": round(found["finetune_operator_first_pass_seconds", ()], 2),
            "writes": int(writes(await self._operator.metrics())),
            "peakMiB": self._operator.peak_mib(),
        }

    async def complete(self) -> None:
        """A tenth of the jobs succeed."""
        count = max(1, self._count // 10)
        names = {f"scale-{number}" for number in range(count)}
        pods: list[str] = []
        async for items, _ in self._api.list_chunks(PODS, self._namespace, LABEL_JOB_UID):
            pods += [p["metadata"]["name"] for p in items if p["metadata"]["labels"][LABEL_JOB_NAME] in names]
        started = time.monotonic()

        async def succeed(number: int) -> None:
            await self._api.request(
                "PATCH",
                PODS,
                verb="patch",
                namespace=self._namespace,
                name=pods[number],
                subresource="status",
                body={"status": {"phase": "Succeeded"}},
                content_type="application/merge-patch+json",
            )

        await side_by_side(succeed, len(pods))
        await self._operator.until(lambda found: in_state(found, "Complete") >= count)
        self.result["complete"] = {"jobs": count, "seconds": round(time.monotonic() - started, 2)}

    async def delete(self) -> None:
        """All jobs go, and with them their children."""
        started = time.monotonic()
        while True:
            # The API server ends a request after a minute, done or not.
            with suppress(ApiError):
                await self._api.request(
                    "DELETE", FINETUNEJOBS, verb="deletecollection", namespace=self._namespace, timeout_seconds=90
                )
                break
        gone = await self._until_gone(FINETUNEJOBS, started)
        children = {plural: await self._until_gone((prefix, plural), started) for prefix, plural in (JOBS, PODS)}
        await asyncio.sleep(1)
        found = await self._operator.metrics()
        self.result["delete"] = {
            "jobsGoneSeconds": gone,
            "childJobsGoneSeconds": children["jobs"],
            "podsGoneSeconds": children["pods"],
            "peakMiB": self._operator.peak_mib(),
            "errors": int(found.get(("finetune_operator_reconciles_total", (("result", "error"),)), 0)),
        }

    async def _until_gone(self, target: tuple[str, str], started: float) -> float:
        while True:
            query = {"limit": "1"}
            answer = await self._api.request("GET", target, verb="list", namespace=self._namespace, query=query)
            if not answer["items"]:
                return round(time.monotonic() - started, 2)
            await asyncio.sleep(0.25)


async def run(args: argparse.Namespace) -> dict[str, Any]:
    configuration = await load_configuration(args.kubeconfig)
    configuration.connection_pool_maxsize = 100
    api = Api(configuration)
    namespace = f"bench-{args.count}-{int(time.time()) % 100000}"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    operator = Operator(args.kubeconfig, namespace, port, Path(args.log))
    async with bench_namespace(api, namespace):
        bench = Benchmark(api, operator, namespace, args.count, args.image)
        watches = [
            asyncio.create_task(Watch(api, target, namespace, note).run())
            for target, note in ((JOBS, bench.note_job), (PODS, bench.note_pod))
        ]
        try:
            await operator.start()
            await operator.until(synced)
            await asyncio.sleep(6)
            bench.result["restMiB"] = operator.peak_mib()
            if args.idle:
                await bench.idle(args.idle)
            for step in (bench.apply, bench.restart, bench.complete, bench.delete):
                say(step.__name__)
                await step()
                say(json.dumps(bench.result[step.__name__]))
        finally:
            for watch in watches:
                watch.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            with suppress(ProcessLookupError):
                await operator.stop()
    with suppress(ApiError):
        await api.close()
    return bench.result


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("count", type=int, help="FineTuneJobs")
    parser.add_argument("--idle", type=int, default=0, help="single jobs on the idle cluster before")
    parser.add_argument("--image", help="for --idle: an image that the nodes can run, to measure until pods run")
    parser.add_argument("--log", default="operator_scale.log", help="the operator's log")
    args = parser.parse_args()
    print(json.dumps(asyncio.run(run(args)), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

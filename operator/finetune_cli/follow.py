"""`finetune follow`: watches one job until it has finished.

The job's status says what happens; while it trains, rank 0 is asked for its own progress through the API server's pod proxy,
which is finer than what status keeps. Whoever may not use the proxy sees the coarser figures.
"""

import argparse
import json
import sys
import time
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from finetune_api.job import GROUP, LABEL_ATTEMPT, LABEL_JOB_NAME, PLURAL, VERSION, FineTuneJob
from finetune_api.reports import ProgressReport
from finetune_api.status import State
from finetune_cli.display import open_display
from finetune_cli.errors import CliError
from finetune_cli.view import FINISHED, state_line

POLL_SECONDS = 1.0


class FollowError(CliError):
    """The job cannot be followed; the message says why."""


class UnansweredError(FollowError):
    """The API server does not answer now, or has too much to do."""


def main(options: argparse.Namespace) -> int:
    """Follows the job of a command line; see `run`."""
    try:
        return run(options.name, options.namespace, options.timeout)
    except KeyboardInterrupt:
        print("\nstopped watching; the job goes on", file=sys.stderr)
        return 130


def run(name: str, namespace: str | None, timeout_seconds: float | None) -> int:
    """Shows the job until it has finished.

    Returns:
        0 for Complete, 1 for Failed.

    Raises:
        FollowError: no cluster answers, the job does not exist, or the time is over.
    """
    source = _JobSource(name, namespace)
    job: FineTuneJob | None = None
    deadline = time.monotonic() + timeout_seconds if timeout_seconds else None
    with open_display(name) as display:
        while True:
            try:
                job = source.job()
            except UnansweredError:
                if job is None:
                    raise  # later it may be restarting, and the job goes on
            if job.status.state in FINISHED:
                display.show(job, None)
                return 0 if job.status.state is State.COMPLETE else 1
            display.show(job, source.progress(job))
            if deadline and time.monotonic() > deadline:
                raise FollowError(f"`{name}` has not finished after {timeout_seconds:.0f} s: {state_line(job)}")
            time.sleep(POLL_SECONDS)


class _JobSource:
    """Reads the job and rank 0's progress from the API server."""

    def __init__(self, name: str, namespace: str | None) -> None:
        try:
            config.load_kube_config()
            _, context = config.list_kube_config_contexts() if namespace is None else ([], {})
        except config.ConfigException as error:
            raise FollowError(f"no cluster: {error}. Set KUBECONFIG, or run `make cluster`") from error
        self.name = name
        self.namespace = namespace or context.get("context", {}).get("namespace", "default")
        self._objects = client.CustomObjectsApi()
        self._core = client.CoreV1Api()

    def job(self) -> FineTuneJob:
        try:
            body: dict[str, Any] = self._objects.get_namespaced_custom_object(
                GROUP, VERSION, self.namespace, PLURAL, self.name
            )
        except ApiException as error:
            if error.status == 404:
                raise FollowError(f"no FineTuneJob `{self.name}` in namespace `{self.namespace}`") from error
            kind = UnansweredError if error.status == 429 or error.status >= 500 else FollowError
            raise kind(f"the API server refused: {error.reason} ({error.status})") from error
        except HTTPError as error:
            raise UnansweredError(f"the API server does not answer: {error}") from error
        return FineTuneJob.from_object(body)

    def progress(self, job: FineTuneJob) -> ProgressReport | None:
        """Rank 0's report; None where it is not running, does not answer yet, or may not be asked."""
        if job.status.state is not State.RUNNING or not job.status.attempts:
            return None
        attempt = job.status.attempts[-1].number
        selector = f"{LABEL_JOB_NAME}={self.name},{LABEL_ATTEMPT}={attempt},batch.kubernetes.io/job-completion-index=0"
        try:
            pods = self._core.list_namespaced_pod(self.namespace, label_selector=selector).items
            if not pods:
                return None
            # By number: the API server's proxy fails on a port's name (Kubernetes 1.37.2 panics).
            port = pods[0].spec.containers[0].ports[0].container_port
            answer = self._core.connect_get_namespaced_pod_proxy_with_path(
                f"{pods[0].metadata.name}:{port}",
                self.namespace,
                "progress",
                _preload_content=False,
                _request_timeout=2,
            )
            return ProgressReport.model_validate(json.loads(answer.data))
        except (ApiException, HTTPError, ValueError):
            return None

"""The operator's configuration, resolved once from flags and environment, before anything is built.

Every flag `--some-name` has an environment variable `FINETUNE_SOME_NAME`; the flag wins.
"""

import argparse
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finetune_operator.core.settings import PlanConfig
from finetune_operator.shell.election import LeaseConfig


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """Everything that was decided at the start."""

    plan: PlanConfig
    namespaces: tuple[str, ...]
    """Watched namespaces; empty: all."""
    lease: LeaseConfig | None
    """None: no election, this process leads."""
    identity: str
    http_port: int
    poll_interval_seconds: float
    workers: int
    kubeconfig: str | None
    """None: the pod's service account."""
    log_level: str


def resolve_config(arguments: Sequence[str], environment: Mapping[str, str]) -> OperatorConfig:
    """Resolves the configuration.

    Raises:
        SystemExit: an argument is wrong (2) or help was asked for (0).
    """
    parser = _parser(environment)
    args = parser.parse_args(arguments)
    if not args.trainer_image:
        parser.error("--trainer-image (or FINETUNE_TRAINER_IMAGE) is required: the image of jobs that name none")
    if not 0 < args.retry_period < args.renew_deadline < args.lease_duration:
        parser.error("--retry-period must be below --renew-deadline, and that below --lease-duration")
    namespaces = args.namespace or [n.strip() for n in environment.get("FINETUNE_NAMESPACES", "").split(",")]
    identity = environment.get("POD_NAME") or socket.gethostname()
    lease = LeaseConfig(
        namespace=args.lease_namespace,
        name=args.lease_name,
        identity=identity,
        duration_seconds=args.lease_duration,
        renew_deadline_seconds=args.renew_deadline,
        retry_seconds=args.retry_period,
    )
    plan = PlanConfig(
        trainer_image=args.trainer_image,
        http_port=args.trainer_port,
        rendezvous_port=args.rendezvous_port,
        termination_grace_seconds=args.termination_grace,
        communication_timeout_seconds=args.communication_timeout,
        hang_timeout_seconds=args.hang_timeout,
        node_lost_seconds=args.node_lost,
        cache_uri=args.cache_uri or None,
        progress_interval_seconds=args.progress_interval,
    )
    return OperatorConfig(
        plan=plan,
        namespaces=tuple(dict.fromkeys(name for name in namespaces if name)),
        lease=lease if args.leader_elect else None,
        identity=identity,
        http_port=args.http_port,
        poll_interval_seconds=args.poll_interval,
        workers=args.workers,
        kubeconfig=args.kubeconfig or None,
        log_level=args.log_level.upper(),
    )


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m finetune_operator",
        description="Runs FineTuneJobs. Every flag --some-name can be given as FINETUNE_SOME_NAME.",
    )
    truth = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}

    def add(flag: str, kind: type, default: object, text: str) -> None:
        given = environment.get(f"FINETUNE_{flag.upper().replace('-', '_')}")
        shown = f" (default: {default})" if default not in (None, "") else ""
        parser.add_argument(
            f"--{flag}", type=kind, default=given if given not in (None, "") else default, help=text + shown
        )

    parser.add_argument(
        "--namespace", action="append", help="namespace to watch; repeat for several; absent: all (FINETUNE_NAMESPACES)"
    )
    add("trainer-image", str, None, "image of jobs that name none; required")
    add("cache-uri", str, None, "folder for hf:// downloads of jobs that name none, such as pvc://models/hub")
    add("http-port", int, 8080, "port of /metrics, /healthz and /readyz")
    add("trainer-port", int, 8080, "port of the trainer's /progress and /metrics")
    add("rendezvous-port", int, 29500, "port on which rank 0 gathers the gang")
    add("termination-grace", int, 120, "seconds that pods get to save a checkpoint on SIGTERM")
    add("communication-timeout", int, 300, "seconds after which a collective has failed")
    add("hang-timeout", int, 1800, "seconds without a heartbeat after which a training rank has hung")
    add("node-lost", int, 5, "seconds that pods stay on a node that is unreachable or not ready")
    add("poll-interval", float, 5.0, "seconds between two polls of a job's progress")
    add("progress-interval", int, 10, "seconds between two writes of a job's progress")
    add("workers", int, 24, "jobs that are reconciled at the same time")
    election = environment.get("FINETUNE_LEADER_ELECT", "true").lower()
    parser.add_argument(
        "--leader-elect",
        action=argparse.BooleanOptionalAction,
        default=truth.get(election, True),
        help="of several replicas only the holder of a Lease acts",
    )
    add("lease-name", str, "finetune-operator", "name of the Lease")
    add("lease-namespace", str, environment.get("POD_NAMESPACE") or "default", "namespace of the Lease")
    add("lease-duration", float, 6.0, "seconds after which a Lease that is not renewed is free")
    add("renew-deadline", float, 4.0, "seconds without a renewal after which the leader ends itself")
    add("retry-period", float, 1.0, "seconds between two attempts to take or renew the Lease")
    kubeconfig = None if environment.get("KUBERNETES_SERVICE_HOST") else environment.get("KUBECONFIG")
    add("kubeconfig", str, kubeconfig, "absent: the pod's service account")
    add("log-level", str, "info", "debug, info, warning or error")
    return parser

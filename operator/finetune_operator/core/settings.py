"""`PlanConfig`: the operator's settings that decisions depend on. Resolved once, in `finetune_operator.config`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PlanConfig:
    """Settings of the installation, as opposed to those of one job."""

    trainer_image: str
    """Image of jobs that name none."""
    http_port: int = 8080
    """Port of the trainer's `/progress` and `/metrics`."""
    rendezvous_port: int = 29500
    """Port on which rank 0 gathers the gang."""
    termination_grace_seconds: int = 120
    """What a pod gets between SIGTERM and SIGKILL, to save a checkpoint."""
    communication_timeout_seconds: int = 300
    """A collective that takes longer has failed."""
    hang_timeout_seconds: int = 1800
    """A training rank without a heartbeat for so long has hung."""
    node_lost_seconds: int = 5
    """How long pods tolerate a node that Kubernetes has marked as unreachable or not ready."""
    cache_uri: str | None = None
    """Folder for `hf://` downloads of jobs that name none."""
    progress_interval_seconds: int = 10
    """Progress is written into status at most so often."""
    backoff_base_seconds: int = 10
    backoff_cap_seconds: int = 300
    """The wait before restarts doubles from base to cap while attempts make no progress; the first has no wait."""
    pods_late_seconds: int = 300
    """A pod that is not there so long after its attempt began is worth a word. With a thousand new jobs at once, Kubernetes'
    Job controller was seen to need three minutes."""
    leftover_seconds: int = 30
    """How long the pods of a finished job may take to end by themselves before their Job is deleted."""

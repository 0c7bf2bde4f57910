"""Why an attempt ended: the one table that the trainer, the operator, the metrics and the docs share.

A trainer pod exits with the reason's code and repeats the reason by name in its termination message; Kubernetes' own causes
have no exit code of ours and are read from pod and node status.
"""

from enum import StrEnum
from typing import NamedTuple


class Recovery(StrEnum):
    """What follows a failure."""

    RESTART = "Restart"
    """A new attempt from the newest complete checkpoint, counted against `recovery.backoffLimit`."""
    RESTART_UNCOUNTED = "RestartUncounted"
    """A new attempt that is not counted: the platform took the pods away, the job did nothing wrong."""
    WAIT = "Wait"
    """Nothing ends: kubelet goes on trying, and so the job waits; only `activeDeadlineSeconds` ends it."""
    FAIL = "Fail"
    """The same would happen again: the job fails at once and says what to change."""


class Reason(StrEnum):
    """A failure's reason, in the words that conditions, events and metrics use."""

    # Told by the trainer, with an exit code.
    OUT_OF_MEMORY_GPU = "OutOfMemoryGPU"
    HANG = "Hang"
    COMMUNICATION_ERROR = "CommunicationError"
    HARDWARE_FAULT = "HardwareFault"
    NON_FINITE_LOSS = "NonFiniteLoss"
    CHECKPOINT_CORRUPT = "CheckpointCorrupt"
    DATA_ERROR = "DataError"
    CONFIG_ERROR = "ConfigError"
    CODE_ERROR = "CodeError"
    RANK_KILLED = "RankKilled"
    STORAGE_ERROR = "StorageError"
    HUB_UNAVAILABLE = "HubUnavailable"
    SUPERSEDED = "Superseded"
    TERMINATED = "Terminated"
    # Read from Kubernetes.
    OUT_OF_MEMORY_HOST = "OutOfMemoryHost"
    NODE_LOST = "NodeLost"
    PREEMPTED = "Preempted"
    EVICTED = "Evicted"
    POD_DELETED = "PodDeleted"
    POD_REJECTED = "PodRejected"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    POD_FAILED = "PodFailed"
    # Decided by the operator.
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    SUSPENDED = "Suspended"


class Failure(NamedTuple):
    """One row of the table."""

    exit_code: int | None
    """What the trainer's supervisor exits with; None where Kubernetes or the operator names the reason."""
    recovery: Recovery
    hint: str
    """What a person should do or look at, in one sentence."""


FAILURES: dict[Reason, Failure] = {
    Reason.OUT_OF_MEMORY_GPU: Failure(
        81,
        Recovery.RESTART,
        "Lower training.microBatchSize or training.maxLength, set activationCheckpointing: Full, or raise deepspeed.zeroStage.",
    ),
    Reason.HANG: Failure(
        82,
        Recovery.RESTART,
        "The stack of the rank that the others waited for is in status.attempts; those of all ranks are in the pod's log.",
    ),
    Reason.COMMUNICATION_ERROR: Failure(
        83, Recovery.RESTART, "Another rank ended first or the network failed: look at the other pods' reasons."
    ),
    Reason.HARDWARE_FAULT: Failure(
        84, Recovery.RESTART, "Check the node's GPUs (nvidia-smi -q, dmesg | grep Xid) and cordon it."
    ),
    Reason.NON_FINITE_LOSS: Failure(
        85, Recovery.RESTART, "Lower training.learningRate or check the data for empty or broken samples."
    ),
    Reason.CHECKPOINT_CORRUPT: Failure(
        86, Recovery.RESTART, "No checkpoint verifies: check the volume; delete the broken folder to start from step 0."
    ),
    Reason.DATA_ERROR: Failure(
        87, Recovery.FAIL, "Correct the file and line named in the message, then create the job again."
    ),
    Reason.CONFIG_ERROR: Failure(
        88, Recovery.FAIL, "Correct the field named in the message, then create the job again."
    ),
    Reason.CODE_ERROR: Failure(
        89,
        Recovery.FAIL,
        "An error in the trainer or in the model's code: the traceback is in status.attempts and in the pod's log.",
    ),
    Reason.RANK_KILLED: Failure(
        90, Recovery.RESTART, "A rank was killed by a signal: look for host memory pressure on its node."
    ),
    Reason.STORAGE_ERROR: Failure(
        91,
        Recovery.RESTART,
        "A volume is full, read-only, failing or gone: check what the message names, the claim's capacity and permissions.",
    ),
    Reason.HUB_UNAVAILABLE: Failure(
        92,
        Recovery.RESTART,
        "The model hub did not answer: check HF_ENDPOINT, the network and credentialsRef, or use pvc://.",
    ),
    Reason.SUPERSEDED: Failure(
        93, Recovery.RESTART_UNCOUNTED, "A newer attempt owns the checkpoints; this one ended itself."
    ),
    Reason.TERMINATED: Failure(
        143, Recovery.RESTART_UNCOUNTED, "The pod was asked to stop and left after saving a checkpoint."
    ),
    Reason.OUT_OF_MEMORY_HOST: Failure(None, Recovery.RESTART, "Raise trainer.resourcesPerNode.limits.memory."),
    Reason.NODE_LOST: Failure(
        None, Recovery.RESTART_UNCOUNTED, "The node stopped answering; the gang moves to other nodes."
    ),
    Reason.PREEMPTED: Failure(
        None, Recovery.RESTART_UNCOUNTED, "A pod of higher priority took the place; the job waits for room."
    ),
    Reason.EVICTED: Failure(
        None, Recovery.RESTART_UNCOUNTED, "The pod was evicted (drain or node pressure); the gang restarts elsewhere."
    ),
    Reason.POD_DELETED: Failure(None, Recovery.RESTART_UNCOUNTED, "Somebody or something deleted a pod of the gang."),
    Reason.POD_REJECTED: Failure(
        None,
        Recovery.RESTART_UNCOUNTED,
        "The node would not take the pod; see kubectl describe node, and restart its device plugin if a GPU is not healthy.",
    ),
    Reason.IMAGE_PULL_FAILED: Failure(
        None, Recovery.WAIT, "Check trainer.image, the registry and imagePullSecrets of the service account."
    ),
    Reason.POD_FAILED: Failure(
        None,
        Recovery.RESTART,
        "The container ended without a report: the message has the end of its log, if there was one.",
    ),
    Reason.DEADLINE_EXCEEDED: Failure(
        None, Recovery.FAIL, "Raise spec.activeDeadlineSeconds and create the job again: it resumes nothing."
    ),
    Reason.BACKOFF_LIMIT_EXCEEDED: Failure(
        None,
        Recovery.FAIL,
        "Look at status.attempts for the cause of each restart; a job created again begins at step 0.",
    ),
    Reason.SUSPENDED: Failure(
        None, Recovery.RESTART_UNCOUNTED, "Set spec.suspend: false to go on from the last checkpoint."
    ),
}

EXIT_CODES: dict[int, Reason] = {f.exit_code: reason for reason, f in FAILURES.items() if f.exit_code is not None}

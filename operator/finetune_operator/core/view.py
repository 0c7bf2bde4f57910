"""How an attempt is, in words for people: state, reason and a message that says what is going on and what to do."""

import re
from dataclasses import dataclass
from datetime import timedelta

from finetune_api.reasons import FAILURES, Reason
from finetune_api.reports import Activity
from finetune_api.status import ConditionType, FineTuneJobStatus, ProgressStatus, State
from finetune_operator.core.conditions import is_true
from finetune_operator.core.names import attempt_name
from finetune_operator.core.observe import ObservedPod
from finetune_operator.core.situation import Situation

_PULL_PROBLEMS = {
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
}
_RPC_ERROR = re.compile(r"rpc error: code = \w+ desc = ")
"""What kubelet puts before the container runtime's words."""
_CONTAINER_PROBLEMS = {"CreateContainerConfigError", "CreateContainerError", "RunContainerError"}
_UNSCHEDULABLE_HINT = (
    "Lower trainer.resourcesPerNode or numNodes, change trainer.nodeSelector or tolerations, or add nodes."
)
_CLAIM_HINT = "Create the claim, or correct the pvc:// URI that names it."
_CONTAINER_HINT = "Check the Secrets and claims that the job names; kubectl describe pod tells more."
_PODS_HINT = "Often a ResourceQuota, a LimitRange or Pod Security forbids them."
_BUSY = {
    Activity.TRAINING: "Training",
    Activity.EVALUATING: "Evaluating on held-out data",
    Activity.CHECKPOINTING: "Saving a checkpoint",
    Activity.EXPORTING: "Writing the result",
    Activity.DONE: "Done; the pods are ending",
}


@dataclass(frozen=True, slots=True)
class View:
    state: State
    reason: str
    message: str
    gang_runs: bool = False
    problem: bool = False
    """Something stands in the way that a person may have to remove."""


def sentence(text: str) -> str:
    """The text with a full stop."""
    text = text.strip()
    return text if not text or text[-1] in ".!?" else f"{text}."


def view_gang(s: Situation, gang: tuple[ObservedPod, ...]) -> View:
    """How the running attempt is."""
    view = _pods(s, gang)
    after = restart_text(s.status)
    restarting = is_true(s.status, ConditionType.RESTARTING)
    state, reason = view.state, view.reason
    if restarting and not view.gang_runs and not view.problem:
        state = State.RESTARTING
        reason = s.status.attempts[-2].reason or reason if len(s.status.attempts) > 1 else reason
    message = f"{view.message} {after}".strip()
    return View(state, reason, message, gang_runs=view.gang_runs, problem=view.problem)


def _pods(s: Situation, gang: tuple[ObservedPod, ...]) -> View:
    for pod in gang:
        if pod.waiting is not None and pod.waiting.reason in _PULL_PROBLEMS:
            return _image_problem(s, pod)
        if pod.waiting is not None and pod.waiting.reason in _CONTAINER_PROBLEMS:
            text = f"{sentence(f'{pod.name}: {pod.waiting.message}')} {_CONTAINER_HINT}"
            return View(State.PENDING, pod.waiting.reason, text, problem=True)
    for pod in gang:
        if pod.unschedulable is not None and not pod.scheduled:
            # The scheduler adds what preemption would bring, which changes often and helps nobody here.
            text = pod.unschedulable.partition(" preemption:")[0]
            hint = _CLAIM_HINT if "persistentvolumeclaim" in text else _UNSCHEDULABLE_HINT
            return View(State.PENDING, "Unschedulable", f"{sentence(text)} {hint}", problem=True)
    placed = {pod.index for pod in gang if pod.scheduled}
    up = {pod.index for pod in gang if pod.running or pod.succeeded}
    name = attempt_name(s.job.metadata.name, s.status.attempts[-1].number)
    if pods_are_late(s, gang):
        text = f"Kubernetes has not created all of {_count(s.num_nodes)}: kubectl describe job {name} says why."
        return View(State.PENDING, "PodsNotCreated", f"{text} {_PODS_HINT}", problem=True)
    if len(placed) < s.num_nodes:
        # One text for pods that are not there and for those that wait: two would be one write more for every job.
        text = f"Waiting for {_count(s.num_nodes)} to be created and placed on nodes (kubectl describe job {name})."
        return View(State.PENDING, "Scheduling", text)
    if len(up) < s.num_nodes:
        nodes = ", ".join(sorted({pod.node for pod in gang}))
        # A Secret that is not there, or a volume that does not mount, is in the pods' events only.
        tells = f"kubectl describe pods -l batch.kubernetes.io/job-name={name} tells what keeps them"
        return View(State.STARTING, "ContainersStarting", f"Starting {_count(s.num_nodes)} on {nodes} ({tells}).")
    return _activity(s, gang)


def pods_are_late(s: Situation, gang: tuple[ObservedPod, ...]) -> bool:
    """Whether pods are missing that should have been there for a while. Nothing else tells: the reason is in events only."""
    missing = len({pod.index for pod in gang}) < s.num_nodes
    return missing and seconds_until_late(s) <= 0


def seconds_until_late(s: Situation) -> float:
    """Until missing pods are called late."""
    return s.seconds_until(s.status.attempts[-1].start_time + timedelta(seconds=s.config.pods_late_seconds))


def _count(num_nodes: int) -> str:
    return "1 pod" if num_nodes == 1 else f"{num_nodes} pods"


def _image_problem(s: Situation, pod: ObservedPod) -> View:
    reason = Reason.IMAGE_PULL_FAILED
    assert pod.waiting is not None
    text = _RPC_ERROR.sub("", pod.waiting.message or pod.waiting.reason)
    message = f"{sentence(f'{pod.name}: {text}')} {FAILURES[reason].hint}"
    # kubelet says the same in turns in two ways (pull, back-off): the first one stays.
    if s.status.reason == reason and s.status.message and s.status.message.startswith(f"{pod.name}:"):
        message = s.status.message.removesuffix(restart_text(s.status)).strip()
    return View(State.PENDING, reason, message, problem=True)


def _activity(s: Situation, gang: tuple[ObservedPod, ...]) -> View:
    progress = s.status.progress
    activity = progress.activity if progress else None
    if progress is None or activity is None or activity is Activity.LOADING:
        nodes = ", ".join(sorted({pod.node for pod in gang if pod.node}))
        return View(State.STARTING, "Loading", f"Loading model and data on {nodes}.", gang_runs=True)
    return View(State.RUNNING, activity.value, f"{_BUSY[activity]}: {progress_text(progress)}.", gang_runs=True)


def progress_text(progress: ProgressStatus) -> str:
    """For example `step 120/400 (30%), loss 1.23, about 5 min left`."""
    parts = [f"step {progress.summary}"]
    if progress.loss is not None:
        parts.append(f"loss {progress.loss}")
    if progress.eta_seconds is not None:
        parts.append(f"about {duration(progress.eta_seconds)} left")
    return ", ".join(parts)


def duration(seconds: int) -> str:
    """For example `40 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def restart_text(status: FineTuneJobStatus) -> str:
    """What the newest restart was about; empty if the attempt before did not fail."""
    if len(status.attempts) < 2:
        return ""
    before, now = status.attempts[-2:]
    if before.reason in (None, Reason.SUSPENDED):
        return ""
    text = f"Restart {status.restarts} after {before.reason}"
    if before.to_step is not None:
        text += f" at step {before.to_step}"
    if now.from_step is not None:
        text += f", resumed from step {now.from_step}"
    return sentence(text)

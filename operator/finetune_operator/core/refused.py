"""What status says when the API server refuses what a plan wants to create."""

from finetune_api.status import MESSAGE_LIMIT, FineTuneJobStatus, State

REASON = "ApplyFailed"
_HINT = "It is tried again; the operator needs nothing but the obstacle removed."


def refused(status: FineTuneJobStatus, kind: str, name: str, error: str) -> FineTuneJobStatus:
    """A copy that names the object and the API server's words."""
    message = f"{kind} {name} cannot be created: {error.strip().rstrip('.')}. {_HINT}"[:MESSAGE_LIMIT]
    return status.model_copy(update={"state": State.PENDING, "reason": REASON, "message": message})

"""What can go wrong with the API server, mapped from foreign exceptions in `api.py` and nowhere else."""


class ApiError(Exception):
    """The API server refused a request or could not be reached."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        """HTTP status; 0 if there was no answer."""
        self.reason = reason
        self.message = message

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later without anybody changing anything."""
        # An object whose lists name something twice is answered with 500 (kubernetes#139253).
        wrong = self.message.startswith("failed to create typed patch object")
        # An admission webhook that is down: it may stay so, and somebody has to know.
        wrong = wrong or "failed calling webhook" in self.message
        return self.status in (0, 408, 429) or (self.status >= 500 and not wrong)


class NotFoundError(ApiError):
    """The object is not there (404)."""


class ConflictError(ApiError):
    """The object has changed, exists already, or a field belongs to another manager (409)."""


class UnavailableError(ApiError):
    """No answer: connection refused, reset or timed out."""


def api_error(status: int, reason: str, message: str) -> ApiError:
    """The exception for an HTTP status."""
    kinds: dict[int, type[ApiError]] = {404: NotFoundError, 409: ConflictError}
    return kinds.get(status, ApiError)(status, reason, message)

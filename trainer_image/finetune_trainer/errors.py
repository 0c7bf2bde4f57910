"""The trainer's own errors, and the one place where any exception becomes a reason of the contract's table.

Raise the class that names who has to act: `ConfigError` and `DataError` are the user's to correct, `StorageError` and
`HubUnavailable` the platform's; what is none of these is an error in our code.
"""

import errno
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from finetune_api.reasons import Reason


class TrainerError(Exception):
    """An end of the attempt whose reason is known."""

    reason: ClassVar[Reason] = Reason.CODE_ERROR


class ConfigError(TrainerError):
    """The job asks for something that cannot be; the message names the field."""

    reason = Reason.CONFIG_ERROR


class DataError(TrainerError):
    """A data set is missing, broken or empty; the message names file and line."""

    reason = Reason.DATA_ERROR


class CheckpointCorruptError(TrainerError):
    """There are checkpoints, and none of them verifies."""

    reason = Reason.CHECKPOINT_CORRUPT


class StorageError(TrainerError):
    """A volume cannot be written or read."""

    reason = Reason.STORAGE_ERROR


class HubUnavailableError(TrainerError):
    """The hub did not answer."""

    reason = Reason.HUB_UNAVAILABLE


class SupersededError(TrainerError):
    """A newer attempt owns the checkpoints."""

    reason = Reason.SUPERSEDED


class NonFiniteLossError(TrainerError):
    """The loss or the gradient norm is NaN or infinite."""

    reason = Reason.NON_FINITE_LOSS


class TerminatedError(TrainerError):
    """All ranks agreed to leave because a pod was asked to stop."""

    reason = Reason.TERMINATED


def error_of(reason: Reason, message: str) -> TrainerError:
    """An error with a given reason, for one that happened on another rank."""
    kind = next((k for k in TrainerError.__subclasses__() if k.reason is reason), TrainerError)
    return kind(message)


_VOLUME_ERRNOS = {
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.ENOLCK,
    errno.EUCLEAN,
    errno.EREMOTEIO,
}
"""What no wrong path, right or content brings about, but a volume that fails."""
_STORAGE_ERRNOS = _VOLUME_ERRNOS | {errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def os_error(error: BaseException) -> OSError | None:
    """What the system said, also where safetensors and tokenizers, written in Rust, made a text of it."""
    if said := _OS_ERROR.search(str(error)):
        return OSError(int(said[1]), str(error))
    return error if isinstance(error, OSError) else None


@contextmanager
def writing(field: str, path: Path) -> Iterator[None]:
    """Whatever the system refuses within is the volume's fault.

    Args:
        field: of the spec, which names the volume.
        path: what is written.

    Raises:
        StorageError: naming both.
    """
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:
        if os_error(error) is None:
            raise
        raise StorageError(f"{field}: {path} cannot be written: {error}") from error


@contextmanager
def reading(field: str, path: Path) -> Iterator[None]:
    """As `writing`, but only for what is nobody's mistake: a file that is missing or closed to the trainer may be the user's.

    Raises:
        StorageError: naming field and path.
    """
    try:
        yield
    except TrainerError:
        raise
    except Exception as error:
        cause = os_error(error)
        if cause is None or cause.errno not in _VOLUME_ERRNOS:
            raise
        raise StorageError(f"{field}: {path} cannot be read: {error}") from error


_COMMUNICATION_TYPES = {"DistBackendError", "DistNetworkError", "DistStoreError", "DistQueueEmptyError"}
_COMMUNICATION_TEXTS = (
    "gloo",
    "nccl",
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "wait timeout",
    "socket timeout",
)
_HARDWARE_TEXTS = (
    "uncorrectable ecc",
    "fallen off the bus",
    "hardware error",
    "nvlink error",
    "devices are busy or unavailable",
    "device is busy or unavailable",
    "cuda error: unknown error",
)


def classify(error: BaseException) -> tuple[Reason, str]:
    """The reason of any exception, and the sentence to show.

    torch is not imported here (the supervisor uses this module too), so its classes are told by their names.
    """
    message = str(error).strip() or type(error).__name__
    name, text = type(error).__name__, message.lower()
    if isinstance(error, TrainerError):
        return error.reason, message
    if name == "OutOfMemoryError" or "cuda out of memory" in text:
        return Reason.OUT_OF_MEMORY_GPU, message
    if isinstance(error, RuntimeError) and any(part in text for part in _HARDWARE_TEXTS):
        return Reason.HARDWARE_FAULT, message
    cause = os_error(error)
    if isinstance(cause, ConnectionError) and cause.filename is not None:
        return Reason.STORAGE_ERROR, message  # of a file that a file system in user space or on a network has lost
    if name in _COMMUNICATION_TYPES or isinstance(error, ConnectionError):
        return Reason.COMMUNICATION_ERROR, message
    if isinstance(error, RuntimeError) and any(part in text for part in _COMMUNICATION_TEXTS):
        return Reason.COMMUNICATION_ERROR, message
    if cause is not None and cause.errno in _STORAGE_ERRNOS:
        return Reason.STORAGE_ERROR, message
    return Reason.CODE_ERROR, f"{name}: {message}"


def short_traceback(error: BaseException, limit: int) -> str:
    """The end of the traceback, at most `limit` characters: the innermost frames say most."""
    text = "".join(traceback.format_exception(error))
    return text if len(text) <= limit else "…" + text[-(limit - 1) :]

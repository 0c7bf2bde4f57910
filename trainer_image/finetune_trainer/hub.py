"""Where models and data sets are on this machine: a path that is given, or a hub's repository downloaded once.

Owns every use of the network. Rank 0 resolves a branch or tag to a commit, so that all pods load the same; the first rank of
each node downloads under a lock in the shared cache folder; after that nothing asks the hub again.
"""

import fcntl
import hashlib
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_api.launch import HubSource, PathSource
from finetune_trainer.errors import ConfigError, HubUnavailableError, writing
from finetune_trainer.files import write_atomic

log = logging.getLogger("finetune_trainer")
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "tokenizer*"]
"""What training needs of a model's repository: not its .bin, .gguf, .onnx twins."""
CONFIG = "config.json"
DATA_FILES = ["*.jsonl", "*.json", "*.csv", "*.parquet", "*.arrow"]


def resolve_revision(source: PathSource | HubSource, uri: str, field: str) -> str | None:
    """The commit that a hub source's revision names; None for a path.

    Raises:
        HubUnavailableError: no answer.
        ConfigError: no such repository or revision, or no access to it.
    """
    if isinstance(source, PathSource):
        return None
    from huggingface_hub import HfApi

    with _hub_errors(source, uri, field):
        info = HfApi(token=_token(source)).repo_info(
            source.repo_id, repo_type=source.repo_type, revision=source.revision, timeout=30
        )
    return str(info.sha)


def local_path(source: PathSource | HubSource, commit: str | None, cache_dir: Path, uri: str, field: str) -> Path:
    """The folder or file to read, downloaded first if it is a hub's and not there yet.

    Args:
        source: what the job names.
        commit: from `resolve_revision`.
        cache_dir: shared by pods and jobs.
        uri: as the user wrote it, for messages.
        field: of the spec, for messages.

    Raises:
        HubUnavailableError: the download failed.
        ConfigError: no access, or the repository has no such path.
        StorageError: the cache cannot be written.
    """
    if isinstance(source, PathSource):
        return Path(source.path)
    assert commit is not None
    with writing("cache.uri", cache_dir), locked(cache_dir / "locks" / f"{_name(source)}.lock"):
        marker, folder = _marker(source, commit, cache_dir), _downloaded(source, commit, cache_dir)
        if folder is None:
            log.info("downloading %s at %s", uri, commit[:12])
            folder = _download(source, commit, cache_dir, uri, field, _patterns(source))
            marker.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(marker, str(folder.relative_to(cache_dir)).encode(), durable=True)
    path = folder / source.path.strip("/")
    if not path.exists():
        raise ConfigError(f"{field}: {uri}: the repository has no `{source.path}` at revision {source.revision}")
    return path


def config_ahead(source: PathSource | HubSource, commit: str | None, cache_dir: Path, uri: str) -> Path | None:
    """The folder with the config.json of a hub's model that is still to be downloaded; None where there is no need.

    Raises:
        HubUnavailableError: the download failed.
        ConfigError: no access.
        StorageError: the cache cannot be written.
    """
    if isinstance(source, PathSource) or commit is None:
        return None
    folder = source.path.strip("/")
    with writing("cache.uri", cache_dir):
        if _downloaded(source, commit, cache_dir) is not None:
            return None
        return _download(source, commit, cache_dir, uri, "model", [f"{folder}/{CONFIG}".lstrip("/")]) / folder


def go_offline() -> None:
    """From here on nothing asks a hub: transformers looks for optional files of a model even when it is given a path."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True


def _name(source: HubSource) -> str:
    return f"{source.repo_type}s--{source.repo_id.replace('/', '--')}"


def _marker(source: HubSource, commit: str, cache_dir: Path) -> Path:
    """Is there once all of it has been downloaded, and names the folder. A path may be longer than a file's name."""
    path = hashlib.sha256(source.path.strip("/").encode()).hexdigest()[:16]
    return cache_dir / "complete" / f"{_name(source)}--{commit}--{path}"


def _downloaded(source: HubSource, commit: str, cache_dir: Path) -> Path | None:
    """The repository's folder; None if it is not all there, or somebody has cleared it away."""
    try:
        name = _marker(source, commit, cache_dir).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return cache_dir / name if name and (cache_dir / name).is_dir() else None


def _patterns(source: HubSource) -> list[str]:
    path = source.path.strip("/")
    if path:
        return [path, f"{path}/*"]
    return MODEL_FILES if source.repo_type == "model" else DATA_FILES


def _download(source: HubSource, commit: str, cache_dir: Path, uri: str, field: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _hub_errors(source, uri, field):
        return Path(
            snapshot_download(
                source.repo_id,
                repo_type=source.repo_type,
                revision=commit,
                cache_dir=cache_dir / "hub",
                allow_patterns=patterns,
                token=_token(source),
                max_workers=4,
            )
        )


def _token(source: HubSource) -> str | bool:
    """The token's text; False: none, not even one that lies about in a home folder."""
    if source.token_file is None:
        return False
    try:
        return Path(source.token_file).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"credentialsRef: the token file cannot be read: {error.strerror}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process of all pods at a time; the kernel releases the lock of one that dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _hub_errors(source: HubSource, uri: str, field: str) -> Iterator[None]:
    """Maps the hub's errors, in one place. Those of the file system that is downloaded to are left as they are."""
    import httpx
    from huggingface_hub import errors as hub

    def status(error: Any) -> int | None:
        return getattr(getattr(error, "response", None), "status_code", None)

    try:
        yield
    except hub.GatedRepoError as error:
        raise ConfigError(
            f"{field}.credentialsRef: {uri} is gated: accept its terms on the hub and set `credentialsRef` to a Secret "
            "with the token of an account that has access"
        ) from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(f"{field}.revision: {uri} has no branch, tag or commit `{source.revision}`") from error
    except hub.LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError: the hub was asked and did not answer
        raise HubUnavailableError(f"{field}.uri: no hub answered for {uri}: {error}") from error
    except (hub.RepositoryNotFoundError, hub.EntryNotFoundError) as error:
        if status(error) == 401:
            raise ConfigError(_denied(source, uri, field, 401)) from error
        raise ConfigError(
            f"{field}.uri: {uri} does not exist on the hub (or is private: set `credentialsRef`)"
        ) from error
    except hub.HfHubHTTPError as error:
        code = status(error)
        if code in (401, 403):
            raise ConfigError(_denied(source, uri, field, code)) from error
        raise HubUnavailableError(f"{field}.uri: the hub answered {code} for {uri}: {error}") from error
    except (httpx.HTTPError, hub.OfflineModeIsEnabled, OSError) as error:
        if isinstance(error, OSError) and _is_of_files(error):
            raise
        raise HubUnavailableError(f"{field}.uri: no hub answered for {uri}: {error}") from error


def _is_of_files(error: OSError) -> bool:
    of_connections = ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError
    return error.filename is not None or (error.errno is not None and not isinstance(error, of_connections))


def _denied(source: HubSource, uri: str, field: str, code: int) -> str:
    if source.token_file is None:
        return f"{field}.credentialsRef: {uri} needs a token (or does not exist): set `credentialsRef` (answer {code})"
    return f"{field}.credentialsRef: the token has no access to {uri}, or the repository does not exist (answer {code})"

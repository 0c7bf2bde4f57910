"""Where a job's URIs are inside its pods, and the claims and Secrets that have to be mounted for that."""

import posixpath
from dataclasses import dataclass, field

from finetune_api.spec import FineTuneJobSpec, SecretKeyRef

PVC_ROOT = "/mnt/pvc"
SECRET_ROOT = "/etc/finetune-secrets"
_PVC = "pvc://"
_FILE = "file://"


@dataclass(frozen=True, slots=True)
class ClaimMount:
    claim: str
    read_only: bool

    @property
    def path(self) -> str:
        return f"{PVC_ROOT}/{self.claim}"


@dataclass(frozen=True, slots=True)
class SecretMount:
    secret: str
    key: str
    index: int

    @property
    def dir(self) -> str:
        return f"{SECRET_ROOT}/{self.index}"

    @property
    def path(self) -> str:
        return f"{self.dir}/token"


@dataclass(frozen=True, slots=True)
class Mounts:
    """What a job's pods mount besides the scratch folders. Each claim is mounted once, writable if anything writes to it."""

    claims: tuple[ClaimMount, ...] = ()
    secrets: tuple[SecretMount, ...] = ()
    _token_paths: dict[tuple[str, str], str] = field(default_factory=dict, hash=False)

    def token_file(self, ref: SecretKeyRef | None) -> str | None:
        """The path of the file that holds a token; never the token."""
        return None if ref is None else self._token_paths[ref.name, ref.key]


def local_path(uri: str) -> str:
    """The path inside the pod of a `pvc://` or `file://` URI."""
    if uri.startswith(_FILE):
        return posixpath.normpath(uri.removeprefix(_FILE) or "/")
    claim, _, path = uri.removeprefix(_PVC).partition("/")
    return posixpath.normpath(f"{PVC_ROOT}/{claim}/{path}")


def sibling(uri: str, name: str) -> str:
    """The URI of `name` beside the folder `uri`; at the root of a volume, inside it."""
    scheme, rest = (_FILE, uri.removeprefix(_FILE)) if uri.startswith(_FILE) else (_PVC, uri.removeprefix(_PVC))
    root, _, path = rest.partition("/")
    parent = posixpath.dirname(path.rstrip("/"))
    return f"{scheme}{posixpath.join(root, parent, name)}" if root else f"{scheme}/{posixpath.join(parent, name)}"


def child(uri: str, name: str) -> str:
    """The URI of `name` inside the folder `uri`."""
    return f"{uri.rstrip('/')}/{name}"


def plan_mounts(spec: FineTuneJobSpec, *, read: list[str], write: list[str]) -> Mounts:
    """Collects the claims of all URIs and the Secrets of all tokens."""
    claims: dict[str, bool] = {}
    for uris, read_only in ((write, False), (read, True)):
        for uri in uris:
            if uri.startswith(_PVC):
                claims.setdefault(uri.removeprefix(_PVC).partition("/")[0], read_only)
    data = [*spec.datasets.train, *spec.datasets.evaluation]
    refs = [spec.model.credentials_ref, *(dataset.credentials_ref for dataset in data)]
    if spec.tracking is not None and spec.tracking.wandb is not None:
        refs.append(spec.tracking.wandb.credentials_ref)
    unique = list(dict.fromkeys((ref.name, ref.key) for ref in refs if ref is not None))
    secrets = tuple(SecretMount(name, key, index) for index, (name, key) in enumerate(unique))
    return Mounts(
        claims=tuple(ClaimMount(claim, read_only) for claim, read_only in sorted(claims.items())),
        secrets=secrets,
        _token_paths={(s.secret, s.key): s.path for s in secrets},
    )

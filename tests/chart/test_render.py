"""What the chart renders: the right objects for each set of values, with no more rights and privileges than needed."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.config import resolve_config
from tests.chart import helm
from tests.chart.helm import CHART, VALUES, one, render
from tests.e2e.cluster import ROOT

ALWAYS = {"ClusterRole", "CustomResourceDefinition", "Deployment", "Role", "RoleBinding", "Service", "ServiceAccount"}
KINDS = {
    "default": ALWAYS,
    "cluster-wide": ALWAYS | {"ClusterRoleBinding"},
    "high-availability": ALWAYS | {"PodDisruptionBudget"},
    "monitoring": ALWAYS | {"ServiceMonitor", "PodMonitor"},
    "everything": ALWAYS | {"PodDisruptionBudget", "ServiceMonitor", "PodMonitor", "NetworkPolicy"},
}
by_values = pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)


@by_values
def test_lint(values: Path) -> None:
    done = helm.run("lint", "--strict", str(CHART), "--values", str(values))
    assert done.returncode == 0, done.stdout + done.stderr


@by_values
def test_kinds(values: Path) -> None:
    assert {body["kind"] for body in render(values=values)} == KINDS[values.stem]


@by_values
def test_operator_pod_is_restricted(values: Path) -> None:
    """What Pod Security's restricted level asks for, and a root file system that nothing can write."""
    pod = one(render(values=values), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all("emptyDir" in volume for volume in pod["volumes"])
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["limits"]["memory"]
        assert not [port for port in container["ports"] if "hostPort" in port]


@by_values
def test_operator_leaves_a_lost_node(values: Path) -> None:
    """Kubernetes' own default would keep the only operator on a dead node for 5 minutes."""
    tolerations = one(render(values=values), "Deployment")["spec"]["template"]["spec"]["tolerations"]
    given: dict[str, Any] = yaml.safe_load(values.read_text())
    seconds = {item["key"]: item["tolerationSeconds"] for item in tolerations if "tolerationSeconds" in item}
    expected = given.get("nodeLostSeconds", 5)
    assert seconds == {"node.kubernetes.io/unreachable": expected, "node.kubernetes.io/not-ready": expected}
    assert [item for item in tolerations if "tolerationSeconds" not in item] == given.get("tolerations", [])


@by_values
def test_operator_understands_its_arguments(values: Path) -> None:
    container = one(render(values=values), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    config = resolve_config(container["args"], {"POD_NAMESPACE": helm.NAMESPACE, "POD_NAME": "operator-0"})
    given: dict[str, Any] = yaml.safe_load(values.read_text())
    expected = () if given.get("clusterWide") else tuple(given.get("watchNamespaces", [helm.NAMESPACE]))
    assert config.namespaces == expected
    assert config.plan.cache_uri == given.get("trainer", {}).get("cacheUri")
    assert config.lease is not None


@by_values
def test_probes_and_service_reach_the_named_port(values: Path) -> None:
    objects = render(values=values)
    container = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    assert [port["name"] for port in container["ports"]] == ["http"]
    assert container["livenessProbe"]["httpGet"] == {"path": "/healthz", "port": "http"}
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": "http"}
    service = one(objects, "Service")["spec"]
    assert service["ports"][0]["targetPort"] == "http"
    labels = one(objects, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()


@by_values
def test_operator_has_no_right_that_it_can_do_without(values: Path) -> None:
    """No secrets, nodes, namespaces or CRDs; no wildcard; nothing cluster-wide unless asked for."""
    objects = render(values=values)
    operator_roles = [
        body
        for body in objects
        if body["kind"] in ("Role", "ClusterRole") and not body["metadata"]["name"].endswith((":viewer", ":editor"))
    ]
    allowed = {
        "finetunejobs", "finetunejobs/status", "jobs", "pods", "configmaps", "services", "events", "leases",
    }  # fmt: skip
    for role in operator_roles:
        for rule in role["rules"]:
            assert set(rule["resources"]) <= allowed
            assert "*" not in rule["verbs"] + rule["apiGroups"]
    is_cluster_wide = "cluster-wide" in values.stem
    assert any(role["kind"] == "ClusterRole" for role in operator_roles) is is_cluster_wide
    assert any(body["kind"] == "ClusterRoleBinding" for body in objects) is is_cluster_wide


def test_a_role_in_each_watched_namespace() -> None:
    objects = render("--set", "watchNamespaces={a,b}", namespace="ops")
    places = {body["metadata"]["namespace"] for body in objects if body["kind"] == "Role"}
    assert places == {"a", "b", "ops"}
    for binding in (body for body in objects if body["kind"] == "RoleBinding"):
        assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "finetune-operator", "namespace": "ops"}]
    in_ops = one([body for body in objects if body["metadata"].get("namespace") == "ops"], "Role")
    assert {name for rule in in_ops["rules"] for name in rule["resources"]} == {"leases"}


def test_a_namespace_may_look_like_a_number() -> None:
    switches = "networkPolicy.enabled=true,metrics.serviceMonitor.enabled=true,metrics.podMonitor.enabled=true"
    objects = render("--set-json", 'watchNamespaces=["2024"]', "--set", switches, namespace="2025")
    places = {body["metadata"]["namespace"] for body in objects if "namespace" in body["metadata"]}
    assert places == {"2024", "2025"}
    subjects = [subject["namespace"] for body in objects for subject in body.get("subjects", [])]
    assert set(subjects) == {"2025"}
    selectors = [
        body["spec"]["namespaceSelector"]["matchNames"] for body in objects if body["kind"].endswith("Monitor")
    ]
    assert sorted(selectors) == [["2024"], ["2025"]]
    policies = [body for body in objects if body["kind"] == "NetworkPolicy"]
    trainers = one(policies, "NetworkPolicy", "finetune-operator-trainers")
    allowed = trainers["spec"]["ingress"][1]["from"][0]["namespaceSelector"]["matchLabels"]
    assert allowed == {"kubernetes.io/metadata.name": "2025"}


def test_kubernetes_own_roles_include_jobs() -> None:
    objects = render()
    viewer = one(objects, "ClusterRole", "chart-test:finetune-operator:viewer")
    editor = one(objects, "ClusterRole", "chart-test:finetune-operator:editor")
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    assert {key.removeprefix(prefix) for key in viewer["metadata"]["labels"] if key.startswith(prefix)} == {
        "view", "edit", "admin",
    }  # fmt: skip
    assert not set(viewer["rules"][0]["verbs"]) - {"get", "list", "watch"}
    assert f"{prefix}view" not in editor["metadata"]["labels"]
    without = render("--set", "rbac.aggregateRoles=false")
    assert not [body for body in without if body["kind"] == "ClusterRole"]


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "drop"])
def test_crd_is_the_generated_one(keep: bool) -> None:
    rendered = one(render("--set", f"crds.keep={str(keep).lower()}"), "CustomResourceDefinition")
    annotations = rendered["metadata"].pop("annotations", {})
    assert (annotations.get("helm.sh/resource-policy") == "keep") is keep
    rendered["metadata"].pop("labels")
    generated = Path(ROOT / "crds" / "finetune.dev_finetunejobs.yaml").read_text()
    assert rendered == yaml.safe_load(generated)


def test_crd_can_be_left_out() -> None:
    assert not [body for body in render("--set", "crds.install=false") if body["kind"] == "CustomResourceDefinition"]


def test_two_releases_of_one_name_share_no_cluster_wide_object() -> None:
    names = [
        {
            (body["kind"], body["metadata"]["name"])
            for body in render("--set", "clusterWide=true,crds.install=false", namespace=namespace)
            if "namespace" not in body["metadata"]
        }
        for namespace in ("a", "b")
    ]
    assert names[0] and not names[0] & names[1]


def test_notes_name_what_to_type_next() -> None:
    done = helm.run(
        "install",
        "finetune-operator",
        str(CHART),
        "--namespace",
        "ops",
        "--dry-run=client",
        "--set",
        "watchNamespaces={team}",
    )
    assert done.returncode == 0, done.stderr
    notes = done.stdout.partition("NOTES:")[2]
    assert "kubectl -n ops rollout status deployment/finetune-operator" in notes
    assert "kubectl -n team get finetunejobs" in notes
    assert "service/finetune-operator-metrics" in notes

"""The values' schema: it describes every value, and refuses what it does not know by name."""

import json
from typing import Any

import pytest
import yaml

from tests.chart import helm
from tests.chart.helm import CHART

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())

REFUSED = {
    "unknown value": ("replica=2", "replica"),
    "unknown value, nested": ("trainer.cacheURI=pvc://a/b", "cacheURI"),
    "wrong type": ("replicas=two", "/replicas"),
    "out of range": ("replicas=-1", "/replicas"),
    "not one of": ("image.pullPolicy=Sometimes", "/image/pullPolicy"),
    "level": ("logLevel=verbose", "/logLevel"),
    "flag as text": ("clusterWide=maybe", "/clusterWide"),
    "namespace's name": ("watchNamespaces={Team A}", "/watchNamespaces/0"),
    "digest": ("image.digest=latest", "/image/digest"),
    "cache that is no volume": ("trainer.cacheUri=s3://bucket", "/trainer/cacheUri"),
    "port": ("metrics.service.port=0", "/metrics/service/port"),
    "no ports, which would be all": ("networkPolicy.apiServerPorts=[]", "/networkPolicy/apiServerPorts"),
    "ports without a value": ("networkPolicy.apiServerPorts=null", "apiServerPorts"),
    "interval": ("metrics.podMonitor.interval=fast", "/metrics/podMonitor/interval"),
    "empty repository": ("image.repository=", "/image/repository"),
    "monitor without its service": (
        "metrics.serviceMonitor.enabled=true,metrics.service.enabled=false",
        "metrics.serviceMonitor.enabled needs metrics.service.enabled",
    ),
}


@pytest.mark.parametrize(("setting", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_refused_by_name(setting: str, named: str) -> None:
    option = "--set-json" if setting.endswith("[]") else "--set"
    done = helm.run("template", "finetune-operator", str(CHART), option, setting)
    assert done.returncode != 0
    assert named in done.stderr


def _objects(schema: dict[str, Any], path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, schema)]
    for name, child in schema.get("properties", {}).items():
        found += _objects(child, f"{path}.{name}")
    if "items" in schema:
        found += _objects({"description": "an item", **schema["items"]}, f"{path}[]")
    return found


def test_every_value_is_described() -> None:
    assert [path for path, schema in _objects(SCHEMA) if path and not schema.get("description")] == []


def test_every_object_refuses_unknown_values() -> None:
    loose = [path for path, s in _objects(SCHEMA) if "properties" in s and s.get("additionalProperties") is not False]
    assert loose == []


def test_schema_and_defaults_name_the_same_values() -> None:
    def names(schema: dict[str, Any], defaults: Any, path: str = "") -> list[str]:
        known, given = schema.get("properties"), defaults if isinstance(defaults, dict) else {}
        if known is None:
            return []
        wrong = [f"{path}.{name}" for name in set(known) ^ set(given) if name not in OPTIONAL]
        return wrong + [
            bad for name, child in known.items() if name in given for bad in names(child, given[name], f"{path}.{name}")
        ]

    assert names(SCHEMA, DEFAULTS) == []


OPTIONAL = {"global", "claims"}
"""Values without a default."""

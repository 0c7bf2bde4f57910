"""Generates the CustomResourceDefinition from the models: `python -m finetune_api.crd [--check]`.

The pydantic JSON schema becomes a structural schema: references are inlined, optional fields lose their `null`, and CEL rules
travel along as they stand on the models.
"""

import json
import sys
from pathlib import Path
from typing import Any

from finetune_api.base import VALIDATIONS
from finetune_api.job import GROUP, KIND, PLURAL, SHORT_NAME, VERSION, FineTuneJob

ROOT = Path(__file__).resolve().parents[2]
FILE_NAME = f"{GROUP}_{PLURAL}.yaml"
TARGETS = (ROOT / "crds" / FILE_NAME, ROOT / "charts" / "finetune-operator" / "files" / "crds" / FILE_NAME)
HEADER = "# Generated from operator/finetune_api by `make generate`. Do not edit.\n"

MAX_NAME_LENGTH = 50
"""A pod's host name is `<job>-<attempt>-<index>` and may have 63 characters."""

_KEPT = {
    "description", "enum", "format", "items", "maxItems", "maxLength", "maxProperties", "maximum",
    "minItems", "minLength", "minProperties", "minimum", "properties", "required", "type", VALIDATIONS,
}  # fmt: skip
_LIST_MAPS = {"conditions": "type", "env": "name", "attempts": "number"}

COLUMNS = (
    ("State", "string", ".status.state", 0),
    ("Reason", "string", ".status.reason", 0),
    ("Progress", "string", ".status.progress.summary", 0),
    ("Restarts", "integer", ".status.restarts", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Nodes", "integer", ".spec.trainer.numNodes", 1),
    ("Procs", "integer", ".status.plan.worldSize", 1),
    ("Loss", "string", ".status.progress.loss", 1),
    ("Eval-Loss", "string", ".status.progress.evalLoss", 1),
    ("Tokens/s", "string", ".status.progress.tokensPerSecond", 1),
    ("Checkpoint", "integer", ".status.lastCheckpoint.step", 1),
    ("Message", "string", ".status.message", 1),
)


def custom_resource_definition() -> dict[str, Any]:
    """The CRD as a plain object, ready for YAML or the API server."""
    schema = FineTuneJob.model_json_schema(by_alias=True, mode="validation")
    definitions = schema["$defs"]
    spec = _structural(definitions["FineTuneJobSpec"], definitions)
    status = _structural(definitions["FineTuneJobStatus"], definitions)
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": [SHORT_NAME],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {"name": name, "type": type_, "jsonPath": path, **({"priority": priority} if priority else {})}
                        for name, type_, path, priority in COLUMNS
                    ],
                    "schema": {"openAPIV3Schema": _root(spec, status)},
                }
            ],
        },
    }


def _root(spec: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
    return {
        "description": (FineTuneJob.__doc__ or "").strip(),
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": {"description": "What to do.", **spec},
            "status": {"description": "What the operator sees and did.", **status},
        },
        VALIDATIONS: [
            {
                "rule": f"size(self.metadata.name) <= {MAX_NAME_LENGTH}"
                " && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "message": f"metadata.name must be at most {MAX_NAME_LENGTH} lower-case letters, digits and `-`, and begin"
                " with a letter: it names Services and pods",
            }
        ],
    }


def _structural(node: dict[str, Any], definitions: dict[str, Any], name: str = "") -> dict[str, Any]:
    """One node of a JSON schema as a node of a structural schema; `name` is the property's name."""
    merged = _resolve(node, definitions)
    if merged.pop("x-finetune-quantity", False):
        return {
            **_description(merged),
            "x-kubernetes-int-or-string": True,
            "maxLength": 32,
            VALIDATIONS: merged[VALIDATIONS],
        }
    if free := merged.pop("x-finetune-structural", None):
        return {**_description(merged), **free}
    out = {key: value for key, value in merged.items() if key in _KEPT} | _description(merged)
    if "const" in merged:
        out["enum"] = [merged["const"]]
    if "properties" in out:
        out["properties"] = {key: _structural(child, definitions, key) for key, child in out["properties"].items()}
    elif isinstance(merged.get("additionalProperties"), dict):
        out["additionalProperties"] = _structural(merged["additionalProperties"], definitions)
    if "items" in out:
        out["items"] = _structural(out["items"], definitions)
        if key := _LIST_MAPS.get(name):
            out |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}
    return out | _default(merged, out)


def _resolve(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Follows references and drops the `null` of optional fields; what the field itself says wins."""
    own = dict(node)
    if "anyOf" in own:
        variants = [variant for variant in own.pop("anyOf") if variant.get("type") != "null"]
        own = _resolve(variants[0], definitions) | own
    if "$ref" in own:
        own = _resolve(definitions[own.pop("$ref").rsplit("/", 1)[1]], definitions) | own
    return own


def _description(node: dict[str, Any]) -> dict[str, Any]:
    return {"description": " ".join(node["description"].split())} if "description" in node else {}


def _default(merged: dict[str, Any], out: dict[str, Any]) -> dict[str, Any]:
    default = _without_absent(merged.get("default"))
    if default is None or default == [] or (default == {} and not out.get("properties")):
        return {}
    return {"default": default}


def _without_absent(value: Any) -> Any:
    """A default without nulls and empty lists. A block's default holds those of its fields, since the API server checks its
    rules on it as it stands."""
    if isinstance(value, dict):
        cleaned = {key: _without_absent(child) for key, child in value.items()}
        return {key: child for key, child in cleaned.items() if child not in (None, [], {})}
    return value


def render() -> str:
    """The CRD as YAML text."""
    import yaml  # the only need for it; pods that import this package do without

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    plain = json.loads(json.dumps(custom_resource_definition()))
    return HEADER + yaml.dump(plain, Dumper=Dumper, sort_keys=False, width=120, allow_unicode=True)


def main(arguments: list[str]) -> int:
    """Writes both copies, or with `--check` says which of them differ."""
    text = render()
    stale = [path for path in TARGETS if not path.exists() or path.read_text() != text]
    if "--check" in arguments:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from the models; run `make generate`", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

"""What the Kubernetes API server would say to a manifest, from the CRD that it would validate it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import yaml

# What the API server adds to every kind, whatever the CRD says of `metadata`.
OBJECT_META = {
    "type": "object",
    "required": ["name"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"},
        "namespace": {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}


class Crd:
    """A CustomResourceDefinition as a strict validator of its kind."""

    def __init__(self, path: Path):
        self.definition = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]
        self.validators = {
            f"{self.definition['group']}/{version['name']}": jsonschema.Draft202012Validator(
                _root(strict(version["schema"]["openAPIV3Schema"]))
            )
            for version in self.definition["versions"]
            if version["served"]
        }

    def errors(self, manifest: dict) -> list[str]:
        """All violations, each with its path; none for a manifest that the API server would accept."""
        kind, version = manifest.get("kind"), manifest.get("apiVersion")
        if kind != self.definition["names"]["kind"] or version not in self.validators:
            return [f"no served version of this CRD has kind {kind}, apiVersion {version}"]
        found = self.validators[version].iter_errors(manifest)
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def strict(schema: Any) -> Any:
    """An OpenAPI v3 structural schema as JSON schema, in which a field that is not declared is an error."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: strict(value) for key, value in schema.items() if key not in ("properties", "description", "default")}
    if "properties" in schema:
        # Names of properties are no keywords, whatever they are called.
        out["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
    if schema.get("x-kubernetes-int-or-string"):
        out["type"] = ["integer", "string"]
    is_object = schema.get("type") == "object"
    if is_object and "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    return out


def _root(schema: dict) -> dict:
    properties = schema["properties"] | {"metadata": OBJECT_META}
    return schema | {"properties": properties, "required": ["apiVersion", "kind", "metadata", "spec"]}

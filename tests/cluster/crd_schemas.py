"""KubeRay's own schemas, as the API server applies them: unknown fields are refused, not dropped.

The API server prunes what a schema does not know, without a word; here that is an error. What the schemas
say in CEL (`x-kubernetes-validations`) is in `cluster.rules`.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

FOLDER = Path(
    os.environ.get("SEEKR_KUBERAY_CRDS", Path(__file__).parents[3] / "shared" / "kuberay-crds")
)
PLURALS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}


def skip_without_schemas() -> None:
    """Skip a test where the schemas are not there."""
    if not FOLDER.is_dir():
        pytest.skip(f"KubeRay's schemas are not in {FOLDER}; SEEKR_KUBERAY_CRDS names their folder")


@cache
def validator(kind: str) -> Draft202012Validator:
    """Return what validates objects of a kind at `ray.io/v1`."""
    path = FOLDER / f"ray.io_{PLURALS[kind]}.yaml"
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    definition = yaml.load(path.read_text(encoding="utf-8"), loader)
    (version,) = (item for item in definition["spec"]["versions"] if item["name"] == "v1")
    return Draft202012Validator(_strict(version["schema"]["openAPIV3Schema"]))


def complaints(manifest: dict[str, Any]) -> list[str]:
    """Return what the schema of a manifest's kind has against it."""
    errors = validator(manifest["kind"]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.path))}: {error.message}" for error in errors]


def _strict(schema: Any) -> Any:
    """Return a structural schema as a JSON schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: {name: _strict(item) for name, item in value.items()}
        if key == "properties"
        else _strict(value)
        for key, value in schema.items()
        if not key.startswith("x-kubernetes-") and key != "format"
    }
    open_ = schema.get("x-kubernetes-preserve-unknown-fields")
    if "properties" in found and "additionalProperties" not in found and not open_:
        found["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string"):
        found.pop("anyOf", None)
        found["type"] = ["integer", "string"]
    return found

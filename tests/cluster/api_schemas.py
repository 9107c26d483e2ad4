"""What a stand-in API server lets in: KubeRay's own schemas for its kinds, Kubernetes' for the others.

An unknown field is an error, as `fieldValidation=Strict` asks for, and so are names that the operator
refuses. Where KubeRay's schemas are absent its kinds are not validated, which `has_schemas` tells.
"""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate

from tests.cluster.crd_schemas import FOLDER, PLURALS, complaints

_VERSION = "1.34"
_NAME = re.compile(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?")


def has_schemas() -> bool:
    """Whether KubeRay's schemas are on this machine."""
    return FOLDER.is_dir()


def problems(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with a manifest, nothing if it may come in."""
    kind = manifest["kind"]
    if kind == "RayJob" and not _NAME.fullmatch(manifest["metadata"]["name"]):
        return ["RayJob name should be a DNS1035 label of no more than 47 characters"]
    if kind in PLURALS:
        return [text[:300] for text in complaints(manifest)] if has_schemas() else []
    try:
        kubernetes_validate.validate(manifest, _VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}"]
    return []

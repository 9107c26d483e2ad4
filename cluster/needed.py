"""What must exist on the cluster before manifests are applied: Secrets with their keys."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def needed_secrets(manifests: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, ...]]:
    """Return the Secrets that manifests refer to, each with the keys that it must have."""
    found: dict[str, set[str]] = {}
    for name, key in _references(list(manifests)):
        found.setdefault(name, set()).add(key)
    return {name: tuple(sorted(found[name])) for name in sorted(found)}


def _references(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    if not isinstance(value, Mapping):
        return
    for key, item in value.items():
        if key == "secretKeyRef":
            yield item["name"], item["key"]
        elif key == "secret" and isinstance(item, Mapping) and "secretName" in item:
            yield from ((item["secretName"], entry["key"]) for entry in item["items"])
        elif key == "authOptions" and "secretName" in item:
            yield item["secretName"], "auth_token"
        elif key == "imagePullSecrets":
            yield from ((entry["name"], ".dockerconfigjson") for entry in item)
        else:
            yield from _references(item)

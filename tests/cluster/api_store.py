"""The objects of a stand-in API server: versions, owners of fields, and what watches have to be told.

Server-side apply is kept as Kubernetes has it, but that lists are of one piece: a manager owns the fields
it has applied, loses those it leaves out, and meets a conflict where another owns a field it would change.
"""

from __future__ import annotations

import copy
import itertools
import threading
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]
Key = tuple[str, str]
Field = tuple[str, ...]


class Refused(Exception):
    """What the server answers instead of an object."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


@dataclass(slots=True)
class Event:
    """A change, with the version that it made."""

    version: int
    kind: str
    type: str
    object: Object


@dataclass(slots=True)
class Store:
    """All objects of one namespace, by kind and name."""

    namespace: str
    changed: threading.Condition = field(default_factory=threading.Condition)
    objects: dict[Key, Object] = field(default_factory=dict)
    owners: dict[Key, dict[Field, str]] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)
    forgotten: int = 0
    _versions: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def get(self, kind: str, name: str) -> Object:
        with self.changed:
            if (kind, name) not in self.objects:
                raise Refused(404, "NotFound", f'{kind} "{name}" not found')
            return copy.deepcopy(self.objects[kind, name])

    def select(self, kind: str, labels: Mapping[str, str], name: str | None = None) -> list[Object]:
        with self.changed:
            return [
                copy.deepcopy(item)
                for (its_kind, its_name), item in self.objects.items()
                if its_kind == kind
                and name in (None, its_name)
                and labels.items() <= item["metadata"].get("labels", {}).items()
            ]

    def create(self, manifest: Object, manager: str, *, dry: bool = False) -> Object:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        with self.changed:
            if (kind, name) in self.objects:
                raise Refused(409, "AlreadyExists", f'{kind} "{name}" already exists')
            item = copy.deepcopy(manifest)
            item["metadata"] |= {
                "namespace": self.namespace,
                "uid": str(uuid.uuid4()),
                "creationTimestamp": now(),
            }
            if dry:
                return item
            self.owners[kind, name] = {leaf: manager for leaf, _ in leaves(manifest)}
            return self._write(kind, name, item, "ADDED")

    def apply(self, manifest: Object, manager: str, *, force: bool) -> Object:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        with self.changed:
            if (kind, name) not in self.objects:
                return self.create(manifest, manager)
            item = copy.deepcopy(self.objects[kind, name])
            owners = self.owners[kind, name]
            wanted = dict(leaves(manifest))
            taken = [
                (leaf, owners[leaf])
                for leaf, value in wanted.items()
                if owners.get(leaf, manager) != manager and read(item, leaf) != value
            ]
            if taken and not force:
                told = "; ".join(f'conflict with "{who}": .{".".join(leaf)}' for leaf, who in taken)
                raise Refused(409, "Conflict", f"Apply failed with {len(taken)} conflict: {told}")
            for leaf in [leaf for leaf, who in owners.items() if who == manager]:
                if leaf not in wanted:
                    del owners[leaf]
                    remove(item, leaf)
            for leaf, value in wanted.items():
                put(item, leaf, value)
                if owners.get(leaf) is None or force:
                    owners[leaf] = manager
            return self._write(kind, name, item, "MODIFIED")

    def merge(self, kind: str, name: str, patch: Mapping[str, Any], manager: str) -> Object:
        with self.changed:
            item = self.get(kind, name)
            for leaf, value in leaves(patch):
                put(item, leaf, value)
                self.owners[kind, name][leaf] = manager
            return self._write(kind, name, item, "MODIFIED")

    def set_status(self, kind: str, name: str, **values: Any) -> None:
        """What the operator does; fields that are None go away."""
        with self.changed:
            item = self.objects.get((kind, name))
            if item is None:
                return
            item = copy.deepcopy(item)
            status = item.setdefault("status", {}) | values
            item["status"] = {key: value for key, value in status.items() if value is not None}
            self._write(kind, name, item, "MODIFIED")

    def delete(self, kind: str, name: str) -> Object:
        """Mark an object that a finalizer holds, remove any other."""
        with self.changed:
            item = self.get(kind, name)
            if item["metadata"].get("finalizers"):
                item["metadata"]["deletionTimestamp"] = now()
                return self._write(kind, name, item, "MODIFIED")
            return self.remove(kind, name)

    def remove(self, kind: str, name: str) -> Object:
        with self.changed:
            item = self.objects.pop((kind, name))
            self.owners.pop((kind, name), None)
            self._note(kind, item, "DELETED")
            return item

    def forget(self) -> None:
        """Let every version up to now be too old to watch from."""
        with self.changed:
            self.forgotten = next(self._versions)
            self.events.clear()
            self.changed.notify_all()

    def _write(self, kind: str, name: str, item: Object, change: str) -> Object:
        self.objects[kind, name] = item
        self._note(kind, item, change)
        return copy.deepcopy(item)

    def _note(self, kind: str, item: Object, change: str) -> None:
        version = next(self._versions)
        item["metadata"]["resourceVersion"] = str(version)
        self.events.append(Event(version, kind, change, copy.deepcopy(item)))
        self.changed.notify_all()


def now() -> str:
    """Return the time as Kubernetes writes it, in whole seconds."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def leaves(value: Any, *path: str) -> Iterator[tuple[Field, Any]]:
    """Yield the fields of an object that hold no further ones; lists are of one piece."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from leaves(item, *path, str(key))
    elif path:
        yield path, value


def read(item: Any, path: Field) -> Any:
    for key in path:
        item = item.get(key) if isinstance(item, Mapping) else None
    return item


def put(item: Object, path: Field, value: Any) -> None:
    for key in path[:-1]:
        item = item.setdefault(key, {})
    item[path[-1]] = copy.deepcopy(value)


def remove(item: Object, path: Field) -> None:
    for key in path[:-1]:
        item = item.get(key, {})
    item.pop(path[-1], None)

"""The stream as pods read it: the user's YAML, with every path where pods find it.

What is written relative to the file is relative to `cluster.folder` there, so the folder that a user has on
a laptop is copied to the claim as it is. What no pod could find is refused, and so is a credential in
an address, as everybody who may read a ConfigMap would read it. No field that bears identity changes.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

import yaml

from cluster.mlflow import tracking_uri
from cluster.names import Scene
from pipelines.load import put
from pipelines.stream_values import local_paths, texts
from seekr.errors import ConfigError

_MAX_BYTES = 1_000_000  # of a ConfigMap, whose limit is 1 MiB with its metadata
_CREDENTIALS = re.compile(r"://[^/@\s]*:[^/@\s]*@|[?&](access|secret)_key=")
_HEADER = "# What `seekr cluster render` has made of {name}: paths are those of the pods.\n"


def placed_stream(scene: Scene, text: str) -> str:
    """Return a stream's YAML for the pods.

    Args:
        scene: of the same stream.
        text: its YAML, as the user has it.

    Raises:
        ConfigError: a path that no pod has, a store that would die with a pod, or a credential.
    """
    values: dict[str, Any] = yaml.safe_load(text)
    _refuse_credentials(values)
    for field, path in local_paths(values).items():
        if not _below_data_root(field):
            put(values, field, _placed(scene, field, path))
        elif path.startswith(("/", "~")):
            _placed(scene, field, path)
    if values.get("data_root") is None and _has_sources(values):
        put(values, "data_root", _placed(scene, "data_root", "."))
    put(values, "storage", _storage(scene))
    put(values, "ray.address", "auto")
    values["ray"].pop("num_cpus", None)
    _track(scene, values)
    placed = _HEADER.format(name=scene.config.name) + yaml.safe_dump(
        values, sort_keys=False, allow_unicode=True, width=100
    )
    if len(placed.encode()) > _MAX_BYTES:
        raise ConfigError(
            f"stream {scene.config.name} takes {len(placed.encode())} bytes of YAML and a ConfigMap holds "
            f"{_MAX_BYTES}; give tasks by a pattern or a folder instead of one by one"
        )
    return placed


def _below_data_root(field: str) -> bool:
    """Whether a relative path in this field starts at data_root."""
    below = ("tasks_from", "tasks.", "probes.", "replay.review", "token_weights.meta.")
    return field.startswith(below)


def _has_sources(values: dict[str, Any]) -> bool:
    return any(
        _below_data_root(field) and not path.startswith("/")
        for field, path in local_paths(values).items()
    )


def _placed(scene: Scene, field: str, path: str) -> str:
    """Return where pods find what a field names."""
    cluster = scene.cluster
    has_claim = cluster.storage.claim is not None
    folders = [*([cluster.folder] if has_claim else []), *cluster.image_folders]
    found = posixpath.normpath(posixpath.join(cluster.folder, path))
    if not path.startswith("~") and any(_within(found, folder) for folder in folders):
        return found
    known = ", ".join(folders) if folders else "none yet"
    raise ConfigError(
        f"{field} is {path!r}, which is {found if path[:1] not in '/~' else path} for the pods, and no pod "
        f"has that folder. Folders that pods have: {known}. Put it on a shared claim "
        f"(cluster.storage.claim, mounted at cluster.folder {cluster.folder}), or into the image and name "
        "its folder in cluster.image_folders"
    )


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _storage(scene: Scene) -> str:
    storage = scene.config.storage
    if "://" in storage and not storage.startswith("file://"):
        return storage
    if scene.cluster.storage.claim is None:
        raise ConfigError(
            f"storage is {storage!r}, a folder, and pods share none: what one writes would die with it; set "
            "storage to s3:// or gs://, or give pods a claim with cluster.storage.claim"
        )
    path = storage.removeprefix("file://")
    found = posixpath.normpath(posixpath.join(scene.cluster.folder, path))
    if path.startswith("~") or not _within(found, scene.cluster.folder):
        raise ConfigError(
            f"storage is {storage!r}, which is not on the claim at {scene.cluster.folder}; write it "
            "relative, or below that folder"
        )
    return found


def _track(scene: Scene, values: dict[str, Any]) -> None:
    uri, asked = tracking_uri(scene), scene.config.tracking.uri
    if uri is not None:
        if asked == "off":
            raise ConfigError(
                "tracking.uri is off and cluster.mlflow is set; remove one of the two"
            )
        put(values, "tracking.uri", uri)
    elif asked is not None and asked.startswith("sqlite:"):
        raise ConfigError(
            f"tracking.uri is {asked!r}, a file that pods do not share; name a server in cluster.mlflow.uri, "
            "render one with cluster.mlflow.deploy, or set tracking.uri to off"
        )


def _refuse_credentials(values: Any) -> None:
    for field, text in texts(values):
        if _CREDENTIALS.search(text):
            raise ConfigError(
                f"{field} has credentials in its address, which would be readable in a ConfigMap; take them "
                "out, put them into a Secret and name it in cluster.storage.object_store or "
                "cluster.secret_env"
            )

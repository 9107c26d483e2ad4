"""Manifests on the disk, as kustomize reads them: a base, and an overlay per way of running the stream.

A file begins with a line that says who wrote it. Only files with that line are ever replaced or removed, so
patches and overlays of one's own live beside them and survive the next rendering.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from seekr.errors import ConfigError

MARK = "# Written by `seekr cluster render`; changed there, not here."
_KUSTOMIZATION = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}


class _Dumper(yaml.SafeDumper):
    """YAML without anchors, and with the text of files as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def manifest_text(manifest: Mapping[str, Any]) -> str:
    """Return a manifest as YAML."""
    return yaml.dump(dict(manifest), Dumper=_Dumper, sort_keys=False, width=100)


def write_kustomization(
    folder: Path,
    base: Sequence[Mapping[str, Any]],
    overlays: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[Path]:
    """Write a base and its overlays, and return the files.

    Raises:
        ConfigError: a file of somebody else is in the way, or the folder cannot be written.
    """
    texts = {Path("base") / name: text for name, text in _folder(base, ()).items()}
    for overlay, manifests in overlays.items():
        written = _folder(manifests, ("../../base",))
        texts |= {Path("overlays") / overlay / name: text for name, text in written.items()}
    _refuse_others(folder, texts)
    try:
        for path in _mine(folder):
            if path.relative_to(folder) not in texts:
                path.unlink()
        for path, text in texts.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(f"{MARK}\n{text}", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"--out {folder} cannot be written ({error.strerror}); choose another"
        ) from error
    _remove_empty(folder)
    return [folder / path for path in texts]


def _folder(manifests: Sequence[Mapping[str, Any]], resources: Sequence[str]) -> dict[str, str]:
    """Return the files of a folder by name: one per object, and the kustomization that lists them."""
    files = {
        f"{item['kind'].lower()}-{item['metadata']['name']}.yaml": manifest_text(item)
        for item in manifests
    }
    listed = {**_KUSTOMIZATION, "resources": [*resources, *files]}
    return {"kustomization.yaml": manifest_text(listed), **files}


def _mine(folder: Path) -> list[Path]:
    """Return the files of an earlier rendering."""
    found = [*folder.glob("base/*.yaml"), *folder.glob("overlays/*/*.yaml")]
    return [path for path in sorted(found) if _is_mine(path)]


def _is_mine(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.readline().rstrip("\n") == MARK
    except (OSError, UnicodeDecodeError):
        return False


def _refuse_others(folder: Path, texts: Mapping[Path, str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder")
    for path in texts:
        found = folder / path
        if found.exists() and not _is_mine(found):
            raise ConfigError(
                f"{found} is in the way, and was not written by `seekr cluster render` or has lost its first "
                "line; move it, or choose another --out"
            )


def _remove_empty(folder: Path) -> None:
    for path in folder.glob("overlays/*"):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()

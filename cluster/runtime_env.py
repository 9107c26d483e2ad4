"""What a run on an existing Ray cluster is given, where no container holds it: code, stream, pins.

The code is the packages installed here, as `py_modules`. The working directory holds the stream and the
files that it names by relative paths; what it names by absolute paths or URIs has to be on the cluster.
Pins are those of this environment, so that what was tested here is what runs there. Everybody who may
open the dashboard can read all of it, so nothing secret goes in: credentials belong into the cluster's
own environment.
"""

from __future__ import annotations

import glob
import importlib.util
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cluster.submission import CLOSING_SECONDS, STOP_WAIT
from seekr.errors import ConfigError

PACKAGES = ("seekr", "pipelines", "tune", "cluster")
STREAM = "stream.yaml"
MOST_BYTES = 256 * 2**20
"""Of what travels; Ray itself refuses 512 MiB, which would lie in the head's memory."""
_DISTRIBUTION = "seekr-ray"
_CLUSTER_HAS = frozenset({"ray", "setuptools"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Luggage:
    """What a stream takes along: files by their path below the working directory, and the rest.

    Attributes:
        values: the stream as it will stand there.
        files: path below the working directory to path here.
        expected: paths that every node of the cluster must have.
    """

    values: dict[str, Any]
    files: dict[str, Path]
    expected: tuple[str, ...]

    def pack(self, folder: Path) -> Path:
        """Write the working directory into a folder, made when needed, and return it."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in self.files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        text = yaml.safe_dump(self.values, sort_keys=False, allow_unicode=True)
        (folder / STREAM).write_text(text, encoding="utf-8")
        return folder


def luggage(stream: Path, values: Mapping[str, Any], paths: Mapping[str, str]) -> Luggage:
    """Sort what a stream names into what travels and what the cluster must have.

    Args:
        stream: the YAML file, whose folder relative paths start at.
        values: its plain values, changes included.
        paths: those of them that are paths, by dotted field.

    Raises:
        ConfigError: a relative path is missing, leads out of the folder or is too large, or the storage
            would vanish with the run.
    """
    _check_storage(values)
    root = stream.parent.absolute()
    data_root = str(values.get("data_root") or ".")
    files: dict[str, Path] = {}
    expected: list[str] = []
    for field, text in paths.items():
        if field == "data_root":
            continue
        relative = _joined(data_root, text) if _is_source(field) else Path(text)
        if relative.is_absolute() or str(relative).startswith("~"):
            expected.append(str(relative))
        else:
            files |= _files(root, relative, field)
    _check_size(files)
    ray = dict(values.get("ray") or {}) | {"address": "auto"}
    return Luggage(
        values={**values, "ray": ray}, files=files, expected=tuple(dict.fromkeys(expected))
    )


def runtime_env(folder: Path, *, grace: float, pip: Sequence[str] = ()) -> dict[str, Any]:
    """Return Ray's runtime environment for a packed working directory.

    Args:
        folder: the working directory.
        grace: seconds that trainings get to save when the run is stopped.
        pip: what Ray installs on the nodes beside what they have.
    """
    env: dict[str, Any] = {
        "working_dir": str(folder),
        "py_modules": [str(path) for path in installed_packages()],
        "env_vars": {STOP_WAIT: str(round(grace) + CLOSING_SECONDS)},
    }
    if pip:
        env["pip"] = list(pip)
    return env


def entrypoint(grace: float) -> str:
    """Return the command of a run; the shell makes way for it, so that it is what signals reach."""
    return f"exec python -m pipelines.cli run {STREAM} --grace {grace:g}"


def installed_packages() -> tuple[Path, ...]:
    """Return the folders of the packages that a run imports."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.submodule_search_locations, name
        found.append(Path(next(iter(spec.submodule_search_locations))))
    return tuple(found)


def pins() -> list[str]:
    """Return `name==version` of everything that a run needs beside Ray, as it is installed here.

    Ray itself is the cluster's. Builds of a version, such as torch's for CPUs, are not told apart: the
    nodes take what fits them.

    Raises:
        ConfigError: this environment was not installed from a package, or lacks something.
    """
    try:
        names = dict(_closure(_DISTRIBUTION))
    except metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"--pip: {error.name} is not installed here, so there are no versions to pin; install "
            "seekr-ray with pip first"
        ) from error
    return sorted(
        f"{name}=={version.partition('+')[0]}"
        for name, version in names.items()
        if name != _DISTRIBUTION
    )


def _closure(root: str) -> Iterator[tuple[str, str]]:
    """Every distribution below one, with its version; extras as they are asked for."""
    waiting: list[tuple[str, str]] = [(root, "")]
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen or name in _CLUSTER_HAS:
            continue
        seen.add((name, extra))
        found = metadata.distribution(name)
        yield name, found.version
        for line in found.requires or ():
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                below = canonicalize_name(needed.name)
                waiting += [(below, ""), *((below, item) for item in needed.extras)]


def _is_source(field: str) -> bool:
    return field.startswith(("tasks.", "probes.", "replay.")) or ".meta." in field


def _joined(folder: str, text: str) -> Path:
    return Path(text) if text.startswith(("/", "~")) else Path(folder) / text


def _files(root: Path, relative: Path, field: str) -> dict[str, Path]:
    if ".." in relative.parts:
        raise ConfigError(
            f"{field}: {relative} leads out of the stream's folder {root}, and only what is in it travels "
            "with the run; move it there, or give an absolute path that every node of the cluster has"
        )
    found = root / relative
    tops = [found] if found.exists() else [Path(item) for item in sorted(glob.glob(str(found)))]
    files = [path for top in tops for path in ([top] if top.is_file() else sorted(top.rglob("*")))]
    chosen = {str(path.relative_to(root)): path for path in files if path.is_file()}
    if not chosen:
        raise ConfigError(
            f"{field}: {relative} is not in the stream's folder {root}, from where it would travel with "
            "the run; correct it, or give an absolute path that every node of the cluster has"
        )
    return chosen


def _check_size(files: Mapping[str, Path]) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if (total := sum(sizes.values())) <= MOST_BYTES:
        return
    largest = max(sizes, key=lambda name: sizes[name])
    raise ConfigError(
        f"the files that the stream names by relative paths have {total / 2**20:.0f} MiB, of which "
        f"{largest} has {sizes[largest] / 2**20:.0f}; {MOST_BYTES // 2**20} MiB travel with a run: put "
        "them on storage that every node sees, and name them by absolute paths or URIs"
    )


def _check_storage(values: Mapping[str, Any]) -> None:
    storage = str(values.get("storage") or "seekr-store")
    if "://" not in storage and not Path(storage).is_absolute():
        raise ConfigError(
            f"storage: {storage} is a relative folder, which would vanish with the run's working directory; "
            "give an absolute folder that every node of the cluster sees, or s3:// or gs://"
        )
    tracking = values.get("tracking")
    uri = str(tracking.get("uri") or "") if isinstance(tracking, Mapping) else ""
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        raise ConfigError(
            f"tracking.uri: {uri} is a relative file, which would vanish with the run's working directory; "
            "give four slashes and an absolute path, or a server's address"
        )

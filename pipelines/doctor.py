"""Is this machine, and a stream on it, fit to run? Each check finds out one thing and says it."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from seekr.errors import ConfigError, SeekrError

_PACKAGES = ("ray", "torch", "transformers", "mlflow", "pyarrow", "datasets", "deepspeed")
_OPTIONAL = {"deepspeed"}
_LITTLE_DISK = 5 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    text: str


def examine(stream: Path | None, overrides: Sequence[str] = ()) -> list[Check]:
    """Run all checks; those of a stream only if one is given."""
    checks = [_python(), *map(_package, _PACKAGES), _devices(), _memory(), _disk(Path.cwd())]
    if stream is not None:
        checks += _stream_checks(stream, overrides)
    return checks


def _python() -> Check:
    version = platform.python_version()
    ok = tuple(map(int, version.split(".")[:2])) >= (3, 11)
    return Check(name="python", ok=ok, text=f"{version}, 3.11 or newer is needed")


def _package(name: str) -> Check:
    try:
        return Check(name=name, ok=True, text=importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        if name in _OPTIONAL:
            return Check(name=name, ok=True, text="not installed (optional)")
        return Check(name=name, ok=False, text="not installed; pip install seekr-ray")


def _devices() -> Check:
    import torch

    if not torch.cuda.is_available():
        cores = psutil.cpu_count()
        return Check(name="devices", ok=True, text=f"no CUDA device, {cores} CPU cores")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Check(name="devices", ok=True, text=", ".join(names))


def _memory() -> Check:
    free = psutil.virtual_memory().available
    return Check(name="memory", ok=free > 2**30, text=f"{free / 2**30:.1f} GiB available")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    return Check(name="disk", ok=free > _LITTLE_DISK, text=f"{free / 2**30:.1f} GiB free here")


def _stream_checks(path: Path, overrides: Sequence[str]) -> list[Check]:
    from pipelines.alerts import webhook
    from pipelines.inbox import look as look_into
    from pipelines.load import load_config
    from pipelines.provenance import redact
    from pipelines.sources import display_name
    from pipelines.stream import open_storage
    from pipelines.survey import survey
    from pipelines.tracking import tracking_uri

    try:
        config = load_config(path, overrides)
    except SeekrError as error:
        return [Check(name="stream", ok=False, text=str(error))]

    def look() -> str:
        facts = survey(config)
        rows = sum(task.num_train for task in facts.tasks.values())
        shape = facts.shape
        return (
            f"{len(facts.tasks)} tasks, {rows} training rows; model of {shape.num_layers} layers "
            f"x {shape.num_heads} heads"
        )

    def storage() -> str:
        return f"{open_storage(config, writable=True).location.shown} can be written"

    def tracking() -> str:
        uri = tracking_uri(config.tracking.uri, open_storage(config, writable=False))
        if uri is None:
            return "off"
        try:
            return f"{redact(uri)} {_answers(uri)}"
        except OSError as error:
            raise ConfigError(
                f"tracking.uri {redact(uri)} does not answer: {error}; start the server, correct "
                "the address, or set it to off"
            ) from error

    def inbox() -> str:
        found = look_into(str(config.tasks_from), config.inbox.settle_seconds)
        whole = sum(not delivery.waits_for for delivery in found)
        return (
            f"{display_name(str(config.tasks_from))} can be read, {whole} of {len(found)} are whole"
        )

    def alerts() -> str:
        return f"{webhook(config.alerts).shown} is named" if config.alerts is not None else "off"

    checks = [
        _try("model and data", look),
        _try("storage", storage),
        _try("tracking", tracking),
    ]
    checks += [_try("inbox", inbox)] if config.tasks_from is not None else []
    return checks + ([_try("alerts", alerts)] if config.alerts is not None else [])


def _try(name: str, check: Callable[[], str]) -> Check:
    try:
        return Check(name=name, ok=True, text=check())
    except (SeekrError, OSError) as error:
        return Check(name=name, ok=False, text=str(error))


def _answers(uri: str) -> str:
    """Knock at a tracking server; sqlite needs none."""
    import socket

    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return "(local)"
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname or "", port), timeout=3):
        return "answers"

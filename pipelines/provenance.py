"""Where a result came from: who ran what, when, on which versions and commit, in how much memory.

Nothing here bears identity. A record keeps it so that a person can trace a number months later;
the fingerprint never sees it. Secrets are removed before anything is written, because records are
read by many.
"""

from __future__ import annotations

import contextlib
import getpass
import platform
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Final

import psutil

PACKAGES: Final = (
    *("seekr-ray", "torch", "transformers", "peft", "safetensors", "numpy", "ray", "pyarrow"),
    *("datasets", "mlflow", "deepspeed", "triton", "flash-attn"),
)

_SECRET_NAME: Final = (
    r"[\w.-]*(?:password|passwd|secret|token(?![a-z])|api[_-]?key|access[_-]?key|credential"
    r"|signature)[\w.-]*"
)
_USERINFO: Final = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^@\s'\"]+@", re.IGNORECASE)
_ASSIGNED: Final = re.compile(rf"(?P<name>\b{_SECRET_NAME})=(?P<value>[^&\s'\"]+)", re.IGNORECASE)
_FLAG: Final = re.compile(rf"--?{_SECRET_NAME}", re.IGNORECASE)
_TOKEN: Final = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|AKIA[A-Z0-9]{12,}|gh[pousr]_[A-Za-z0-9]{16,})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """The circumstances of one process, as they go into every record it writes."""

    host: str
    user: str
    argv: tuple[str, ...]
    git_commit: str | None
    versions: dict[str, str]

    @classmethod
    def capture(cls, folder: str | Path = ".") -> Provenance:
        """Reads the circumstances of this process.

        Args:
            folder: where the stream's YAML lives; its git commit is the one recorded.
        """
        return cls(
            host=socket.gethostname(),
            user=user_name(),
            argv=tuple(redact_argv(sys.argv)),
            git_commit=git_commit(folder),
            versions=versions(),
        )


def now_iso() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def user_name() -> str:
    """The login name, or the numeric id where the container has no entry for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{psutil.Process().uids().real}"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that can change a result. Imports none of
    them."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def git_commit(folder: str | Path) -> str | None:
    """Commit of the repository `folder` lies in, `-dirty` when it has changes; None outside one."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain")
    return commit if changes == "" else f"{commit}-dirty"


def redact(text: str) -> str:
    """Replaces what looks like a credential: user info of URIs, `secret=...`, known token
    shapes."""
    text = _USERINFO.sub(r"\g<scheme>***@", text)
    text = _ASSIGNED.sub(r"\g<name>=***", text)
    return _TOKEN.sub("***", text)


def redact_argv(argv: Sequence[str]) -> list[str]:
    """`redact` for a command line, where a secret may also be the word after `--some-token`."""
    shown: list[str] = []
    for i, word in enumerate(argv):
        after_flag = i > 0 and _FLAG.fullmatch(argv[i - 1]) and not word.startswith("-")
        shown.append("***" if after_flag else redact(word))
    return shown


class PeakMemory:
    """Context that samples how far the memory of this process and its children grows.

    `peak_bytes` is the largest resident sum seen, less what was there when the context began: the
    driver and an idle local Ray are not the stage's doing. Pages that processes share are counted
    once per process, a stage that runs beside this one is counted too, and other machines are not
    seen.

    Args:
        interval: seconds between samples. One sample takes a few milliseconds.
    """

    def __init__(self, interval: float = 1.0) -> None:
        self.interval = interval
        self.peak_bytes = 0
        self._at_start: int | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="seekr-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._sample()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _run(self) -> None:
        while not self._stop.wait(self.interval):
            self._sample()

    def _sample(self) -> None:
        own = psutil.Process()
        total = 0
        for process in [own, *own.children(recursive=True)]:
            # A child may end between the listing and the reading.
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        if self._at_start is None:
            self._at_start = total
        self.peak_bytes = max(self.peak_bytes, total - self._at_start)


def _git(folder: str | Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git here, or a repository too slow to ask: the record says null
    return done.stdout.strip() if done.returncode == 0 else None

"""What a source holds, found in one pass and remembered: its digest, its counts, its bad rows.

A run looks at every source before it computes anything, because the digest is part of the stages'
fingerprints, and because data that cannot be trained on must fail in the first second and not in
the last hour. The pass is remembered in a cache that trusts a file's path, size and modification
time, as `make` and `git` do, so the tenth run of a stream does not read nine old tasks again.
Counting duplicates keeps 16 bytes per row in memory; everything else is bounded by the readers.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.readers import BadRow, Columns, read_rows
from pipelines.sources import Layout, SourceFile, display_name, list_files
from seekr.errors import DataError

MAX_LISTED = 20  # bad rows a report shows; all are counted
_NUM_QUOTED = 3  # bad rows an error message shows
_VERSION = 1  # raise it when a reader's verdict on the same bytes changes
# A file this fresh may change again within one tick of its clock, so its report is not cached.
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReport:
    """One file: the sha256 of its bytes, and how many of its rows are new, repeated and bad."""

    name: str
    layout: Layout
    size: int
    digest: str
    num_rows: int
    num_duplicates: int
    num_bad: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceReport:
    """A whole source.

    Attributes:
        source: as it was given; a local path made absolute, a URI without its credentials.
        digest: one file's sha256 (what `sha256sum` prints); for several, the sha256 of their hex
            digests in order. Neither names nor places enter.
        num_rows: usable rows that differ in content.
        num_duplicates: usable rows whose content was seen before in this source.
        num_bad: rows that cannot be used.
        bad: the first `MAX_LISTED` of them.
        files: in reading order.
    """

    source: str
    digest: str
    num_rows: int
    num_duplicates: int
    num_bad: int
    bad: tuple[BadRow, ...]
    files: tuple[FileReport, ...]

    @property
    def num_read(self) -> int:
        """All rows: usable, repeated and bad."""
        return self.num_rows + self.num_duplicates + self.num_bad

    @property
    def bad_share(self) -> float:
        """Bad rows among all rows read, in 0..1; 0 where there are none at all."""
        return self.num_bad / self.num_read if self.num_read else 0.0


# What a source counts as, given its task, train or test, and what it holds.
TakenFor = Callable[[str, str, SourceReport], SourceReport]


def as_is(task: str, part: str, report: SourceReport) -> SourceReport:
    """Take a source for what it holds."""
    return report


def inspect(source: str | Path, columns: Columns, *, cache_dir: Path | None = None) -> SourceReport:
    """Read a source once and report on it, or return the report of an earlier, equal pass.

    Args:
        source: a file, a folder, a glob or a URI of one of these.
        columns: which columns hold what.
        cache_dir: a local folder for reports, made when needed; None reads the source every time.

    Raises:
        DataError: the source is missing, cannot be read, lacks a column, or changed meanwhile.
    """
    files = list_files(source)
    cached = None if cache_dir is None else cache_dir / f"{_cache_key(source, files, columns)}.json"
    if cached is not None and (report := _load(cached)) is not None:
        return report
    report = _read(source, files, columns)
    if list_files(source) != files:
        raise DataError(
            f"{report.source} changed while it was read; run again when its writer has finished"
        )
    if cached is not None and _is_settled(files):
        _save(cached, report)
    return report


def require_good(report: SourceReport, max_bad_share: float, what: str) -> None:
    """Refuse a source that must not be trained or tested on.

    Args:
        report: from `inspect`.
        max_bad_share: the largest share of bad rows that is accepted, in 0..1.
        what: the source's role in the user's words, such as "tasks.news.train".

    Raises:
        DataError: it has no rows, no usable row, or too large a share of bad ones.
    """
    size = sum(file.size for file in report.files)
    subject = f"{what}: {report.source}"
    if not report.num_rows and not report.num_bad:
        raise DataError(
            f"{subject} is empty ({len(report.files)} files, {size} bytes, no rows); a source "
            "needs at least one usable row, so write the data or correct the path"
        )
    quoted = "".join(f"\n  {bad}: {bad.text}" for bad in report.bad[:_NUM_QUOTED])
    if report.num_bad > _NUM_QUOTED:
        quoted += f"\n  and {report.num_bad - _NUM_QUOTED} more"
    if not report.num_rows:
        raise DataError(
            f"{subject} has no usable row; all {report.num_bad} are bad. Correct the rows, or the "
            f"columns that are read:{quoted}"
        )
    if report.bad_share > max_bad_share:
        raise DataError(
            f"{subject} has {report.num_bad} bad rows of {report.num_read} "
            f"({report.bad_share:.2%}); allowed are {max_bad_share:.2%} (max_bad_share). Correct "
            f"the rows, or allow more:{quoted}"
        )


def _read(source: str | Path, files: Sequence[SourceFile], columns: Columns) -> SourceReport:
    seen: set[bytes] = set()
    bad: list[BadRow] = []
    reports: list[FileReport] = []
    for file in files:
        digest = hashlib.sha256()
        num_rows = num_duplicates = num_bad = 0
        for row in read_rows(file, columns, digest.update):
            if isinstance(row, BadRow):
                num_bad += 1
                if len(bad) < MAX_LISTED:
                    bad.append(row)
                continue
            key = bytes.fromhex(row.row_id)
            num_duplicates += key in seen
            num_rows += key not in seen
            seen.add(key)
        reports.append(
            FileReport(
                name=file.name,
                layout=file.layout,
                size=file.size,
                digest=digest.hexdigest(),
                num_rows=num_rows,
                num_duplicates=num_duplicates,
                num_bad=num_bad,
            )
        )
    return SourceReport(
        source=display_name(source),
        digest=_join_digests([report.digest for report in reports]),
        num_rows=sum(report.num_rows for report in reports),
        num_duplicates=sum(report.num_duplicates for report in reports),
        num_bad=sum(report.num_bad for report in reports),
        bad=tuple(bad),
        files=tuple(reports),
    )


def _join_digests(digests: Sequence[str]) -> str:
    return (
        digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    )


def _cache_key(source: str | Path, files: Sequence[SourceFile], columns: Columns) -> str:
    seen = [[file.name, file.layout, file.size, file.mtime_ns] for file in files]
    text = json.dumps([_VERSION, display_name(source), seen, asdict(columns)])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _is_settled(files: Sequence[SourceFile]) -> bool:
    """Whether every file's last change is known and long enough ago for its time to be trusted."""
    latest = time.time_ns() - _SETTLED_NS
    return all(file.mtime_ns is not None and file.mtime_ns < latest for file in files)


def _load(path: Path) -> SourceReport | None:
    """A cached report; None where there is none, or only what a crash left of one."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        bad = tuple(BadRow(**row) for row in value.pop("bad"))
        files = tuple(
            FileReport(**{**file, "layout": Layout(file["layout"])}) for file in value.pop("files")
        )
        return SourceReport(**value, bad=bad, files=files)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save(path: Path, report: SourceReport) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
    ) as file:
        json.dump(asdict(report), file, ensure_ascii=False)
    os.replace(file.name, path)

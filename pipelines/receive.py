"""From the inbox into the register: every whole delivery is judged once, copied, and entered, in order.

The steps of one delivery are: look (sizes and times), read (digests and bad rows), survey (does the stream
go on with it), copy into the store, look again, enter. Only the last one counts, and it is one file that
appears as a whole. Killed before it, the next tick does the same again and comes to the same copy, whose
folder is named by the rows' digests; killed after it, the next tick finds the entry. Whoever changes a
file in between finds it judged at a later tick, as if it had come then.

What cannot be read because of the network or a disk is no verdict about data: the tick fails and the next
one tries again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import yaml

from pipelines.arrival_copies import Part, ShortCopy, written_without
from pipelines.arrivals import NOT_OPTIONS, Arrival, LeftOut, Register, names_of, task_of
from pipelines.config import StreamConfig
from pipelines.data_config import TaskConfig
from pipelines.fingerprint import fingerprint
from pipelines.forgotten import ForgottenRows
from pipelines.inbox import OPTIONS, Delivery, InboxFile, look
from pipelines.inspection import SourceReport, inspect
from pipelines.lease import Lease
from pipelines.row_ids import is_forgotten
from pipelines.rows import Columns
from pipelines.store import Store
from pipelines.survey import survey
from pipelines.transfer import cache_folder
from seekr.errors import ConfigError, DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """What a look into the inbox came to: new entries of the register, and who is not whole yet."""

    entered: tuple[Arrival, ...] = ()
    waiting: tuple[str, ...] = ()


class _Refused(Exception):
    """A delivery is no task, and why; never leaves this module."""

    def __init__(self, reason: str, report: SourceReport | None = None) -> None:
        super().__init__(reason)
        self.bad_rows = tuple(
            {"file": row.file, "line": row.line, "reason": row.reason}
            for row in (report.bad if report else ())
        )


class _Duplicate(Exception):
    """A delivery's rows have been learnt already, and as what; never leaves this module."""


class _Changed(Exception):
    """A delivery is not what it was when it was looked at; never leaves this module."""


def take_in(
    config: StreamConfig,
    register: Register,
    lease: Lease,
    tell: Callable[[Arrival], None] = lambda _: None,
) -> Taken:
    """Enter everything that is whole and not known yet, in the order of arrival.

    Args:
        config: the stream as its YAML has it.
        register: of the stream; extended.
        lease: that only one tick has.
        tell: called with each new entry.

    Raises:
        ConfigError, DataError: the stream itself cannot be run, or the inbox cannot be read.
        LeaseLost: another tick has taken over; what is entered so far stays.
    """
    assert config.tasks_from is not None
    stream = register.extend(config)
    found = look(config.tasks_from, config.inbox.settle_seconds)
    new = [item for item in found if not register.knows(item.place, item.stamp)]
    waiting = [f"{item.place} waits for {item.waits_for}" for item in new if item.waits_for]
    whole = [item for item in new if not item.waits_for]
    if not whole:
        return Taken(waiting=tuple(waiting))
    facts = survey(
        stream, register.as_delivered
    )  # what is wrong with the stream is no delivery's fault
    own = {facts.tasks[task.name].train.digest: task.name for task in config.tasks}
    entered: list[Arrival] = []
    for item in whole:
        try:
            judged = _Judge(config, register, own, item).verdict()
            _require_unchanged(config, item)
        except _Changed:
            waiting.append(f"{item.place} changed while it was read; the next tick looks again")
            continue
        entered.append(register.enter(judged, lease))
        tell(entered[-1])
    return Taken(entered=tuple(entered), waiting=tuple(waiting))


class _Judge:
    """Decides about one delivery, and copies it if it is a task.

    Args:
        own: digests of training rows of the YAML's tasks, with their names.
    """

    def __init__(
        self, config: StreamConfig, register: Register, own: dict[str, str], delivery: Delivery
    ) -> None:
        self._config, self._register, self._own = config, register, own
        self._delivery = delivery
        self._entry = Arrival(
            verdict="quarantined",
            name=delivery.name,
            place=delivery.place,
            stamp=delivery.stamp,
            modified_at=delivery.modified_at,
        )

    def verdict(self) -> Arrival:
        """Return the entry.

        Raises:
            _Changed: it is not what it was when it was looked at.
            DataError: it could not be read for reasons that are not its own.
        """
        try:
            return self._accepted()
        except _Duplicate as found:
            return replace(self._entry, verdict="duplicate", reason=str(found))
        except _Refused as refusal:
            return replace(self._entry, reason=str(refusal), bad_rows=refusal.bad_rows)
        except (ConfigError, DataError) as error:
            if isinstance(error.__cause__, OSError):
                _require_unchanged(self._config, self._delivery)  # gone is changed, and no failure
                raise
            return replace(self._entry, reason=str(error))

    def _accepted(self) -> Arrival:
        delivery = self._delivery
        parts = {name: part for name in ("train", "test") if (part := delivery.part(name))}
        if "train" not in parts:
            raise _Refused(
                f"there is no train.jsonl (or .json, .parquet, or train/) in {delivery.place}; the "
                "folder of a task needs one"
            )
        options = _options(delivery)
        sources = {name: delivery.source(part) for name, part in parts.items()}
        task = task_of(delivery.name, sources["train"], sources.get("test"), options)
        reports = {name: self._read(task, name) for name in parts}
        self._require_new(reports["train"].digest)
        for name, report in reports.items():
            self._require_good(name, report)
        self._survey(task)
        digests = {name: report.digest for name, report in reports.items()}
        copies = {name: _name_in_copy(delivery, name, part) for name, part in parts.items()}
        folder, left_out = self._copied(task, parts, copies, reports)
        return replace(
            self._entry,
            verdict="accepted",
            train_digest=digests["train"],
            test_digest=digests.get("test"),
            rows=reports["train"].num_rows,
            folder=folder,
            train=copies["train"],
            test=copies.get("test"),
            columns=asdict(self._columns(task, "train")),
            left_out=left_out,
            options=options,
            behind=names_of(self._config.tasks),
        )

    def _columns(self, task: TaskConfig, part: str) -> Columns:
        columns = Columns(**self._config.options(task).columns.model_dump())
        return columns if part == "train" else columns.of_questions

    def _read(self, task: TaskConfig, part: str) -> SourceReport:
        source = getattr(task, part)
        return inspect(source, self._columns(task, part), cache_dir=cache_folder() / "sources")

    def _copied(
        self,
        task: TaskConfig,
        parts: Mapping[str, Sequence[InboxFile]],
        copies: Mapping[str, str],
        reports: Mapping[str, SourceReport],
    ) -> tuple[str, Mapping[str, LeftOut]]:
        """Copy a delivery into the store, but for rows that the store has forgotten.

        Args:
            copies: the file or folder of each part below the copy's folder.

        Returns:
            The folder, and what parts lack.
        """
        delivery, store = self._delivery, self._register.store
        digests = {name: report.digest for name, report in reports.items()}
        forgotten = ForgottenRows.load(store)
        if forgotten.dates:
            wanted = {
                part: Part(
                    source=getattr(task, part),
                    name=name,
                    readings=(self._columns(task, part),),
                )
                for part, name in copies.items()
            }
            with written_without(wanted, lambda row: is_forgotten(row, forgotten)) as short:
                if short.read != digests:
                    raise _Changed
                self._require_left(short, reports)
                if short.lacking:
                    return short.place(self._register), short.lacking
        folder = f"{self._register.folder}/data/{fingerprint(digests)}"
        for name, part in parts.items():
            _copy(delivery, copies[name], part, store, folder)
        self._check_copies(task, folder, copies, digests)
        return folder, {}

    def _require_left(self, short: ShortCopy, reports: Mapping[str, SourceReport]) -> None:
        for part, lacks in short.lacking.items():
            if lacks.rows == reports[part].num_rows:
                raise _Refused(f"all {lacks.rows} usable {part} rows of it were forgotten")

    def _require_new(self, digest: str) -> None:
        known = self._register.with_digest(digest)
        name = self._own.get(digest) if known is None else known.name
        if name is not None:
            since = "of the YAML" if known is None else f"that arrived as number {known.number}"
            raise _Duplicate(f"its training rows are those of the task {name} {since}")
        taken = {task.name.lower() for task in self._register.extend(self._config).tasks}
        if self._delivery.name.lower() in taken:
            raise _Refused(
                f"the stream has a task {self._delivery.name} with other rows, which stays as it is; "
                "deliver these under another name"
            )

    def _require_good(self, part: str, report: SourceReport) -> None:
        allowed = self._config.data.max_bad_share
        if not report.num_rows:
            raise _Refused(f"there is no usable {part} row in {report.source}", report)
        if report.bad_share > allowed:
            raise _Refused(
                f"{report.num_bad} of {report.num_read} {part} rows cannot be used "
                f"({report.bad_share:.2%}; data.max_bad_share is {allowed:.2%}); correct and deliver "
                "again",
                report,
            )

    def _survey(self, task: TaskConfig) -> None:
        """See that the stream can go on with the task: everything that a run would refuse."""
        stream = self._register.extend(self._config)
        try:
            longer = stream.with_tasks([task])
        except ValueError as error:
            hint = "; a folder may hold test.jsonl beside train.jsonl" if task.test is None else ""
            raise _Refused(f"{error}{hint}") from None
        survey(longer, self._register.as_delivered)

    def _check_copies(
        self,
        task: TaskConfig,
        folder: str,
        copies: Mapping[str, str],
        digests: Mapping[str, str],
    ) -> None:
        """See that what was copied is what was judged."""
        store = self._register.store
        placed = {name: store.address(f"{folder}/{copy}") for name, copy in copies.items()}
        copied = task.model_copy(update=placed)
        for name, digest in digests.items():
            if self._read(copied, name).digest != digest:
                raise _Changed


def _options(delivery: Delivery) -> dict[str, Any]:
    """Read what an arrival says of itself in `task.yaml`."""
    file = next((f for f in delivery.files if delivery.inside(f) == OPTIONS), None)
    if file is None or file.path == delivery.path:
        return {}
    with delivery.open(file) as stream:
        text = stream.read()
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise _Refused(f"{OPTIONS} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise _Refused(
            f"{OPTIONS} is {type(values).__name__}; options such as `epochs: 2` are needed"
        )
    forbidden = sorted(NOT_OPTIONS & values.keys())
    if forbidden:
        raise _Refused(
            f"{OPTIONS} sets {', '.join(forbidden)}, which follow from the folder; remove them"
        )
    return values


def _name_in_copy(delivery: Delivery, name: str, part: Sequence[InboxFile]) -> str:
    """Return the file or folder of `train` or `test` below a copy's folder."""
    first = part[0]
    if first.path == delivery.path:  # a single file is called as it would be in a folder
        return f"{name}{PurePosixPath(first.path).suffix}"
    return delivery.inside(first).partition("/")[0]


def _copy(
    delivery: Delivery, name: str, part: Sequence[InboxFile], store: Store, folder: str
) -> None:
    """Copy `train` or `test` into the store."""
    for file in part:
        inside = name if file.path == delivery.path else delivery.inside(file)
        try:
            with delivery.open(file) as stream:
                store.receive(stream, folder, inside)
        except FileNotFoundError:
            raise _Changed from None


def _require_unchanged(config: StreamConfig, delivery: Delivery) -> None:
    assert config.tasks_from is not None
    now = {item.place: item.stamp for item in look(config.tasks_from, 0.0)}
    if now.get(delivery.place) != delivery.stamp:
        raise _Changed

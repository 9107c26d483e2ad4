"""The register of arrivals: what came through a stream's inbox, in order, and what became of it.

It is an append-only journal in the store. An entry that is `accepted` is a task of the stream, behind
those of its YAML, in the order of the register and for ever: its rows were copied into the store before
it was entered, so neither a change nor a removal of the file in the inbox touches the stream.
`duplicate` and `quarantined` entries say why something is no task, and let later ticks pass it over. A
`withdrawn` entry takes an accepted one out of the stream again, by hand; its copy stays. An `erased` entry
says that rows were forgotten, and where the copy without them lies.

To the stages a task stays what arrived: the digests and counts of its rows are those of the delivery, however
many of them the copy has lost (`as_delivered`). So forgetting makes nothing run again.

A task that is added to the YAML after something has arrived would come before all that has arrived, and
change what every later model was trained after. That is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal

from pydantic import ValidationError

from pipelines.config import StreamConfig
from pipelines.data_config import TaskConfig
from pipelines.inspection import SourceReport
from pipelines.journal import Journal
from pipelines.lease import Lease
from pipelines.provenance import now_iso
from pipelines.sources import display_name
from pipelines.store import Store
from seekr.errors import ConfigError, StoreError

Verdict = Literal["accepted", "duplicate", "quarantined", "withdrawn", "erased"]
# Options that an arrival may bring along; where its rows are is not for it to say.
NOT_OPTIONS: Final = frozenset({"name", "train", "test"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """What the training or test rows of a copy lack of those that were delivered.

    Attributes:
        digest: of the copy's part as it lies in the store.
        rows: different usable rows that it lacks.
        repeated: further rows with the same content as others that it lacks.
    """

    digest: str
    rows: int
    repeated: int

    @classmethod
    def between(cls, delivered: SourceReport, copy: SourceReport) -> LeftOut:
        """Return the difference of two looks at a part, before and after."""
        return cls(
            digest=copy.digest,
            rows=delivered.num_rows - copy.num_rows,
            repeated=delivered.num_duplicates - copy.num_duplicates,
        )

    def and_then(self, more: LeftOut) -> LeftOut:
        """Return what a copy lacks of which this was left out, and then more."""
        return replace(more, rows=self.rows + more.rows, repeated=self.repeated + more.repeated)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One entry of the register.

    Attributes:
        number: from 1, in the order of the register; 0 before it is entered.
        name: of the task, or of what would have been one.
        place, stamp: where it lay in the inbox, and its version there, see `inbox.Delivery`.
        modified_at, noted_at: when it became whole there, and when it was entered; ISO 8601, UTC.
        reason: why it is no task; empty for one that is.
        bad_rows: where its bad rows are, the first of them: file, line and reason of each.
        train_digest, test_digest: of its rows as they came, by content.
        rows: usable training rows that came.
        folder, train, test: where the copy lies in the store, and what in it is read.
        columns: which columns of its training rows were read; see `rows.Columns`.
        left_out: by `train` and `test`, what the copy lacks; empty if it has all rows.
        options: of `task.yaml`.
        behind: the YAML's tasks when it was accepted.
        withdraws: the number of the arrival that a `withdrawn` entry takes out.
        shortens: the number of the arrival of which an `erased` entry has the copy without some rows.
    """

    number: int = 0
    verdict: Verdict
    name: str
    place: str
    stamp: str
    modified_at: str
    noted_at: str = field(default_factory=now_iso)
    reason: str = ""
    bad_rows: tuple[Mapping[str, Any], ...] = ()
    train_digest: str | None = None
    test_digest: str | None = None
    rows: int | None = None
    folder: str | None = None
    train: str | None = None
    test: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    behind: tuple[str, ...] = ()
    withdraws: int | None = None
    shortens: int | None = None

    @property
    def parts(self) -> dict[str, str]:
        """What is read of the copy, `train` and perhaps `test`, by these names."""
        found = {"train": self.train, "test": self.test}
        return {part: name for part, name in found.items() if name is not None}

    def digest(self, part: str) -> str | None:
        """Return the digest of `train` or `test` as it was delivered."""
        return self.train_digest if part == "train" else self.test_digest

    def task(self, store: Store) -> TaskConfig:
        """Return the task that an accepted arrival is, with its rows in the store."""
        assert self.folder is not None and self.train is not None
        test = None if self.test is None else store.address(f"{self.folder}/{self.test}")
        train = store.address(f"{self.folder}/{self.train}")
        return task_of(self.name, train, test, self.options)

    def __str__(self) -> str:
        what = f"{self.name}: {self.verdict}"
        if self.verdict == "accepted":
            return f"{what}, {self.rows} training rows from {self.place}"
        rows = "".join(f"\n  {row['file']}:{row['line']}: {row['reason']}" for row in self.bad_rows)
        return f"{what}, {self.reason}{rows}"


class Register:
    """The arrivals of one stream.

    Args:
        store: the stream's.
        stream: its name.
    """

    def __init__(self, store: Store, stream: str) -> None:
        self.store = store
        self.folder = f"streams/{stream}/arrivals"
        self._journal = Journal(store, self.folder)
        self.entries: tuple[Arrival, ...] = tuple(
            _arrival(store, number, entry) for number, entry in enumerate(self._journal.read(), 1)
        )

    @property
    def copies(self) -> tuple[Arrival, ...]:
        """All that were ever accepted, in order, each with its newest copy."""
        newest = {entry.shortens: entry for entry in self.entries if entry.verdict == "erased"}
        return tuple(
            _with_copy(entry, newest.get(entry.number, entry))
            for entry in self.entries
            if entry.verdict == "accepted"
        )

    @property
    def accepted(self) -> tuple[Arrival, ...]:
        """Those that are tasks, in order."""
        gone = {entry.withdraws for entry in self.entries}
        return tuple(entry for entry in self.copies if entry.number not in gone)

    def knows(self, place: str, stamp: str) -> bool:
        """Return whether this version of a file or folder has been entered already."""
        return any((entry.place, entry.stamp) == (place, stamp) for entry in self.entries)

    def with_digest(self, digest: str) -> Arrival | None:
        """Return the task whose training rows have this digest, as they came or as their copy is now."""
        return next((e for e in self.accepted if digest in _digests(e, "train")), None)

    def enter(self, arrival: Arrival, lease: Lease) -> Arrival:
        """Add an entry; returns it with its number.

        Raises:
            LeaseLost: another run has entered something meanwhile.
        """
        values = {key: value for key, value in asdict(arrival).items() if key != "number"}
        self._journal.append(values, after=len(self.entries), lease=lease)
        entered = _arrival(self.store, len(self.entries) + 1, values)
        self.entries = (*self.entries, entered)
        return entered

    def withdraw(self, name: str, reason: str, lease: Lease) -> Arrival:
        """Take a task out of the stream; what arrived behind it moves up. Returns the entry that does it.

        Raises:
            ConfigError: no task of that name has arrived.
            LeaseLost: another run has entered something meanwhile.
        """
        found = next((entry for entry in self.accepted if entry.name == name), None)
        if found is None:
            names = ", ".join(entry.name for entry in self.accepted) or "none"
            raise ConfigError(
                f"no task {name!r} has arrived; there are {names}. Tasks of the YAML are changed there"
            )
        gone = Arrival(
            verdict="withdrawn",
            name=name,
            place=found.place,
            stamp=found.stamp,
            modified_at=found.modified_at,
            reason=reason,
            withdraws=found.number,
        )
        return self.enter(gone, lease)

    def extend(self, config: StreamConfig) -> StreamConfig:
        """Return a stream with what has arrived as further tasks.

        Raises:
            ConfigError: the YAML's tasks are not those that the arrivals came behind, or do not go
                with them.
        """
        accepted = self.accepted
        if not accepted:
            return config
        now, then = [task.name for task in config.tasks], list(accepted[-1].behind)
        if now != then:
            raise ConfigError(
                f"stream {config.name}: the YAML has the tasks {', '.join(now) or 'none'}, and "
                f"{len(accepted)} tasks have arrived behind {', '.join(then) or 'none'}; arrivals keep "
                "their place, so all of them would be learnt anew. Deliver new tasks to "
                f"{display_name(str(config.tasks_from))}, or give the changed stream another name"
            )
        try:
            return config.with_tasks([entry.task(self.store) for entry in accepted])
        except ValueError as error:
            names = ", ".join(entry.name for entry in accepted)
            raise ConfigError(
                f"stream {config.name}: with what has arrived ({names}) it cannot be run: {error}"
            ) from error

    def shorten(self, copy: Arrival, reason: str, lease: Lease) -> Arrival:
        """Say where the copy of an arrival lies now that it lacks rows. Returns the entry that does it.

        Args:
            copy: the arrival with its new `folder` and `left_out`.

        Raises:
            LeaseLost: another run has entered something meanwhile.
        """
        erased = Arrival(
            verdict="erased",
            name=copy.name,
            place=copy.place,
            stamp=copy.stamp,
            modified_at=copy.modified_at,
            reason=reason,
            folder=copy.folder,
            left_out=copy.left_out,
            shortens=copy.number,
        )
        return self.enter(erased, lease)

    def as_delivered(self, task: str, part: str, report: SourceReport) -> SourceReport:
        """Return what a task's source holds as it came, with the rows that its copy lacks by now.

        Args:
            part: train or test.
            report: of the source as it is; that of a task of the YAML is returned as it is.

        Raises:
            StoreError: it is a copy in the store, and was changed.
        """
        entry = next((entry for entry in self.accepted if entry.name == task), None)
        if entry is None or report.digest == entry.digest(part):
            return report
        if report.digest not in _digests(entry, part):
            raise StoreError(
                f"{self.store.uri_for(str(entry.folder))}: the rows of the task {entry.name} are not "
                f"those that arrived on {entry.noted_at}; they were changed in the store. Put them "
                "back, from a backup or from the inbox"
            )
        lacks, digest = entry.left_out[part], entry.digest(part)
        assert digest is not None
        return replace(
            report,
            digest=digest,
            num_rows=report.num_rows + lacks.rows,
            num_duplicates=report.num_duplicates + lacks.repeated,
        )


def tick_folder(stream: str) -> str:
    """Return whose lease a stream's only tick holds, and whoever else adds to its register."""
    return f"streams/{stream}/tick"


def task_of(name: str, train: str, test: str | None, options: Mapping[str, Any]) -> TaskConfig:
    """Return a task made of an arrival.

    Raises:
        ConfigError: the name or an option is not allowed.
    """
    try:
        return TaskConfig.model_validate({**options, "name": name, "train": train, "test": test})
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, item['loc']))}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        )
        raise ConfigError(f"{found}; see the fields of tasks in `seekr schema`") from error


def names_of(tasks: Sequence[TaskConfig]) -> tuple[str, ...]:
    """Return the tasks' names, in order."""
    return tuple(task.name for task in tasks)


def _with_copy(arrival: Arrival, newest: Arrival) -> Arrival:
    return replace(arrival, folder=newest.folder, left_out=newest.left_out)


def _digests(entry: Arrival, part: str) -> tuple[str | None, ...]:
    """Return what the digest of a part may be: as it came, and as its copy is."""
    lacks = entry.left_out.get(part)
    return (entry.digest(part),) if lacks is None else (entry.digest(part), lacks.digest)


def _arrival(store: Store, number: int, entry: Mapping[str, Any]) -> Arrival:
    try:
        parsed: dict[str, Any] = {key: tuple(entry[key]) for key in ("bad_rows", "behind")}
        parsed["left_out"] = {
            part: LeftOut(**lacks) for part, lacks in entry.get("left_out", {}).items()
        }
        return Arrival(**{**entry, **parsed, "number": number})
    except (KeyError, TypeError) as error:
        raise StoreError(
            f"{store.location.shown}: entry {number} of the arrivals is not one ({error!r}); another "
            "version of seekr?"
        ) from None

"""The schedule of a stream on its cluster: applied, rested, woken, removed, and when it is due.

A schedule is a CronJob or a RayCronJob of the stream's name. Applying it anew never wakes one that was put
to rest by hand, and removing it leaves the runs that it has started.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cluster.kuberay import apply_all
from cluster.kubernetes_api import Kubernetes, Object
from cluster.submission import SubmissionError, Tell
from pipelines.cluster_values import cron_fields

KINDS = ("CronJob", "RayCronJob")
_TIMES = 3
# The 29th of February may be eight years away.
_DAYS = 9 * 366


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A schedule as it is on the cluster.

    Attributes:
        cron: five fields.
        last: when it last started something.
        due: when it will next, in its own zone; empty while it rests.
    """

    kind: str
    name: str
    cron: str
    time_zone: str
    suspended: bool
    last: datetime | None
    due: tuple[datetime, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a program to read."""
        values = asdict(self)
        values["last"] = None if self.last is None else self.last.isoformat()
        values["due"] = [moment.isoformat() for moment in self.due]
        return values

    def __str__(self) -> str:
        words = f"{self.kind} {self.name}: {self.cron!r} in {self.time_zone}"
        words += ", at rest" if self.suspended else ""
        last = (
            "never yet"
            if self.last is None
            else f"{self.last.astimezone(ZoneInfo('UTC')):%F %R} UTC"
        )
        lines = [words, f"  last started: {last}"]
        lines += [f"  due: {moment:%a %F %R %Z}" for moment in self.due]
        return "\n".join(lines)


def apply_schedule(
    kubernetes: Kubernetes,
    base: Sequence[Object],
    scheduled: Sequence[Object],
    *,
    force: bool,
    tell: Tell,
) -> Schedule:
    """Bring the schedule, and what its runs need, to what is rendered; one that rests goes on resting.

    Raises:
        SubmissionError: a schedule of the other kind would go on beside it.
    """
    (wanted,) = (item for item in scheduled if item["kind"] in KINDS)
    other = KINDS[1 - KINDS.index(wanted["kind"])]
    name = wanted["metadata"]["name"]
    if _live(kubernetes, other, name) is not None:
        raise SubmissionError(
            f"{other} {name} exists already, and the stream now asks for a {wanted['kind']}: both would "
            "start runs; remove it with seekr cluster schedule --delete, then schedule again"
        )
    live = kubernetes.get(wanted["kind"], name)
    rests = live is not None and bool(live["spec"].get("suspend"))
    if rests and not wanted["spec"].get("suspend"):
        tell(f"{wanted['kind']} {name} stays at rest; wake it with --resume")
        wanted = copy.deepcopy(wanted)
        wanted["spec"]["suspend"] = True
    others = [item for item in scheduled if item["kind"] not in KINDS]
    apply_all(kubernetes, [*base, *others, wanted], force=force, tell=tell)
    return show_schedule(kubernetes, name)


def show_schedule(kubernetes: Kubernetes, name: str) -> Schedule:
    """Return the schedule as it is.

    Raises:
        SubmissionError: there is none.
    """
    found = _find(kubernetes, name)
    spec, status = found["spec"], found.get("status") or {}
    zone = spec.get("timeZone") or "Etc/UTC"
    suspended = bool(spec.get("suspend"))
    last = status.get("lastScheduleTime")
    return Schedule(
        kind=found["kind"],
        name=name,
        cron=spec["schedule"],
        time_zone=zone,
        suspended=suspended,
        last=datetime.fromisoformat(last) if last else None,
        due=() if suspended else _due(spec["schedule"], zone),
    )


def rest(kubernetes: Kubernetes, name: str, *, suspended: bool) -> Schedule:
    """Put the schedule to rest, or wake it; runs that are under way go on."""
    kind = _find(kubernetes, name)["kind"]
    kubernetes.merge(kind, name, {"spec": {"suspend": suspended}})
    return show_schedule(kubernetes, name)


def remove(kubernetes: Kubernetes, name: str) -> str:
    """Delete the schedule and return its kind; what it has started stays."""
    kind = _find(kubernetes, name)["kind"]
    # A RayCronJob owns its RayJobs: deleted as usual, it would take those that run with it.
    kubernetes.delete(kind, name, propagation="Orphan" if kind == "RayCronJob" else "Background")
    return kind


def next_times(cron: str, zone: str, after: datetime, count: int = _TIMES) -> tuple[datetime, ...]:
    """Return when five fields next hold, in their zone; a time that a change of clocks leaves out never is.

    As the controllers have it, either of two days suffices where both kinds of days are restricted.
    """
    minutes, hours, days, months, weekdays = cron_fields(cron)
    words, place = cron.split(), ZoneInfo(zone)
    either = not any(_any(words[field]) for field in (2, 4))

    def holds(day: date) -> bool:
        of_month, of_week = day.day in days, day.isoweekday() % 7 in weekdays
        of_both = of_month or of_week if either else of_month and of_week
        return day.month in months and of_both

    first = after.astimezone(place).date()
    dates = (first + timedelta(days=ahead) for ahead in range(_DAYS))
    times = [time(hour, minute) for hour in sorted(hours) for minute in sorted(minutes)]
    moments = (
        datetime.combine(day, clock, tzinfo=place) for day in dates if holds(day) for clock in times
    )
    due = (item for item in moments if item > after and _exists(item, place))
    return tuple(itertools.islice(due, count))


def _any(word: str) -> bool:
    """Whether a field of days is unrestricted, as the controllers take it."""
    return any(part in ("*", "?", "*/1", "?/1") for part in word.split(","))


def _exists(moment: datetime, zone: ZoneInfo) -> bool:
    return moment.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == moment.replace(
        tzinfo=None
    )


def _due(cron: str, zone: str) -> tuple[datetime, ...]:
    try:
        return next_times(cron, zone, datetime.now(UTC))
    except (ValueError, ZoneInfoNotFoundError):  # written by hand in words that are not ours
        return ()


def _find(kubernetes: Kubernetes, name: str) -> Object:
    for kind in KINDS:
        if (found := _live(kubernetes, kind, name)) is not None:
            return found
    raise SubmissionError(
        f"no schedule of this stream is in namespace {kubernetes.namespace}; make one with seekr cluster "
        "schedule"
    )


def _live(kubernetes: Kubernetes, kind: str, name: str) -> Object | None:
    if kind == "RayCronJob" and not kubernetes.knows(kind):
        return None
    return kubernetes.get(kind, name)

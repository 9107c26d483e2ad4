"""A search opened: its YAML, its stream under every setting that it may have, and its ledger.

`open_search` says all there is to say against a search before anything runs, and starts nothing; `running`
has what computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipelines.load import Kind, apply_override, read_mapping
from seekr.errors import ConfigError
from tune.courses import Courses
from tune.ledger import Ledger
from tune.measures import known_measures
from tune.plan import Plan, Tell
from tune.search_config import SearchConfig, complaints
from tune.spaces import satisfying

_BY_STREAM_FIELD = ("changes", "space", "references")
_FILE = Kind(
    name="search",
    fields="name, stream, space and trials",
    example="concurrent=4",
    schema="seekr tune schema",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search of which nothing is known to be wrong, and its ledger."""

    config: SearchConfig
    courses: Courses
    ledger: Ledger

    def plan(self, lag: int = 1, tell: Tell = lambda _: None) -> Plan:
        """Return what decides; `lag` is how many trials run side by side."""
        return Plan(self.courses, self.ledger, lag=lag, tell=tell)


def load_search(path: Path, changes: Sequence[str] = ()) -> SearchConfig:
    """Read a search's YAML; its paths are relative to it.

    Args:
        changes: `field=value` with a YAML value; `goal.metric=bwt` changes one field of a section.

    Raises:
        ConfigError: naming every field that is wrong.
    """
    values = read_mapping(path, _FILE)
    for change in changes:
        _check_change(change)
        apply_override(values, change, _FILE)
    if isinstance(values.get("stream"), str):
        values["stream"] = str(path.parent.absolute() / Path(values["stream"]).expanduser())
    try:
        return SearchConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"search {path} cannot be run:", *complaints(error)]
        raise ConfigError("\n".join(lines)) from error


def _check_change(change: str) -> None:
    """Refuse a change below what is named by fields of the stream, which have dots of their own."""
    section, below, _ = change.partition("=")[0].partition(".")
    if below and section in _BY_STREAM_FIELD:
        raise ConfigError(
            f"--set {change!r}: {section} is changed as a whole, as the names in it are fields of the "
            f"stream: --set '{section}={{...}}'"
        )


def open_search(
    path: Path, changes: Sequence[str] = (), *, begin: bool = False, writable: bool = False
) -> Search:
    """Open a search and what is in its ledger; nothing is computed.

    Args:
        begin: make its folder if there is none; otherwise one is needed.

    Raises:
        ConfigError, DataError: what is wrong with it, its stream, its space or its folder.
    """
    config = load_search(path, changes)
    courses = Courses.of(config, writable=writable)
    _check(config, courses)
    ledger = Ledger(courses.base.store, config.name)
    ledger.open(config, courses.base, begin=begin)
    return Search(config=config, courses=courses, ledger=ledger)


def _check(config: SearchConfig, courses: Courses) -> None:
    """Say what is wrong with a search that is well-formed.

    Raises:
        ConfigError: a field of the space that does not exist, cannot have one of its values or changes
            nothing; a figure that no stage yields; an order of other tasks.
    """
    lines = [*_space_complaints(config, courses), *_figure_complaints(config, courses)]
    rule = config.scheduler
    if rule is not None and rule.first > courses.steps:
        lines.append(
            f"  scheduler.first: after {rule.first} tasks, and the stream has {courses.steps} to learn "
            "one after the other"
        )
    own = {task.name for task in courses.base.config.tasks}
    if config.confirm.order is not None and set(config.confirm.order) != own:
        lines.append(
            f"  confirm.order: {', '.join(config.confirm.order)}; the stream's tasks are "
            f"{', '.join(sorted(own))}, each once"
        )
    if lines:
        raise ConfigError("\n".join([f"search {config.name} cannot be run:", *lines]))


def _figure_complaints(config: SearchConfig, courses: Courses) -> list[str]:
    known = known_measures(courses.base.config)
    asked = [("goal", name) for name in config.goal.measures]
    asked += [("constraints", constraint.measure) for constraint in config.constraints]
    return [
        f"  {where}: no stage of the stream yields {name!r}; there are {', '.join(known)}"
        for where, name in asked
        if name not in known
    ]


def _space_complaints(config: SearchConfig, courses: Courses) -> list[str]:
    found: list[str] = []
    for field, allowed in config.space.items():
        above = satisfying(config.space, field)
        if above is None:
            found.append(
                f"  space.{field}: {allowed.when} never holds; give the field above such a value, or "
                "remove this one"
            )
            continue
        complaint = _field_complaint(config, courses, field, above)
        if complaint:
            found.append(f"  space.{field}: {complaint}")
    return found


def _field_complaint(
    config: SearchConfig, courses: Courses, field: str, above: dict[str, Any]
) -> str:
    """Try a field at its corners: they must be allowed, and some stage must differ between them."""
    graphs: set[str] = set()
    corners = config.space[field].corners()
    tasks = len(courses.base.config.tasks)
    for value in corners:
        try:
            course = courses.open([{**above, field: value}] * tasks, courses.base.config.seed)
        except ConfigError as error:
            return str(error).partition("\n")[2].strip() or str(error)
        graphs.add("".join(stage.fingerprint for stage in course.until(tasks)))
    if len(corners) > 1 and len(graphs) == 1:
        return (
            "no stage of the stream depends on it, so all trials would be the same; it says how or where "
            "something runs, or belongs to another method"
        )
    return ""

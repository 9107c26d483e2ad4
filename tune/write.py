"""A trial as a stream's YAML, to be run, changed and kept like any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from pipelines.load import PATH_FIELDS, put, read_mapping
from seekr.errors import ConfigError
from tune.ledger import Entry
from tune.plan import Plan


def best_stream(plan: Plan, entry: Entry, target: Path) -> str:
    """Return the search's stream with a trial's settings in it; paths in it are relative to `target`.

    Raises:
        ConfigError: the trial's settings changed from task to task, which a stream's YAML cannot say.
    """
    if any(settings != entry.settings for settings in entry.learnt):
        raise ConfigError(
            f"trial {entry.number} changed its settings after tasks {_changes(entry)}, and a stream has one "
            "set of settings; take those of its last task from `seekr tune best --json`, or search "
            "without pbt"
        )
    source = plan.courses.path
    values = read_mapping(source)
    for field, value in (plan.search.changes | entry.settings).items():
        put(values, field, value)
    _move(values, source.parent.absolute(), target.parent.absolute())
    head = (
        f"# Trial {entry.number} of search {plan.search.name}: "
        f"{plan.search.goal.title} {(plan.search.goal.values(entry.figures) or (0.0,))[0]:.4g}.\n"
    )
    return head + yaml.safe_dump(values, sort_keys=False)


def _changes(entry: Entry) -> str:
    return ", ".join(str(copied.tasks) for copied in entry.copied)


def _move(values: dict[str, Any], before: Path, after: Path) -> None:
    """Let relative paths mean from `after` what they mean from `before`."""
    if before == after:
        return
    values.setdefault("data_root", ".")
    for field in PATH_FIELDS:
        section, _, leaf = field.rpartition(".")
        holder = values.get(section) if section else values
        if isinstance(holder, dict) and isinstance(holder.get(leaf), str):
            path = Path(holder[leaf]).expanduser()
            holder[leaf] = (
                str(path) if path.is_absolute() else os.path.relpath(before / path, after)
            )

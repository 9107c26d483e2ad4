"""Names of stages that concern more than one task: how they are joined, and taken apart again."""

from __future__ import annotations

# A model that was trained on all tasks at once, and one that was trained on none.
ALL_TASKS = "all"
BASE = "base"
# What users serve; no task may have its name.
CHAMPION = "champion"
# Rows that are replayed in every training and learnt by none.
REVIEW = "review"
_AFTER, _BY, _BEFORE, _BORROWED = "--after--", "--by--", "--before", "--borrowed"


def retaught(task: str, after: str) -> str:
    """Name what is made anew for an earlier task after a later one."""
    return f"{task}{_AFTER}{after}"


def foretold(task: str, previous: str) -> str:
    """Name the targets on a new task's rows by the model that has learnt the tasks before it."""
    return f"{task}{_BY}{previous}"


def before(task: str) -> str:
    """Name the evaluation of a task that is about to be learnt."""
    return f"{task}{_BEFORE}"


def borrowed(task: str) -> str:
    """Name the rows, and their targets, that a task's inputs give for the replay of earlier tasks."""
    return f"{task}{_BORROWED}"


def is_before(label: str) -> bool:
    """Return whether it is the evaluation of a task that is about to be learnt."""
    return label.endswith(_BEFORE)


def about(label: str) -> str:
    """Return the task whose rows a stage is about; borrowed rows are about no task's own."""
    return label.split(_AFTER)[0].split(_BY)[0].removesuffix(_BEFORE)


def learnt(label: str) -> str:
    """Return the task whose arrival made a stage necessary."""
    return label.split(_AFTER)[-1].split(_BY)[0].removesuffix(_BEFORE).removesuffix(_BORROWED)

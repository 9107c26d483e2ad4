"""The kinds of stages there are, each with a version of what it computes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.stage import Stage

# Raise a number when the same inputs would give another output than before.
VERSIONS = {
    "ingest": 1,
    "sample": 1,
    "generate": 1,
    "rollout": 1,
    "borrow": 1,
    "train": 4,
    "fisher": 1,
    "score": 2,
    "select": 1,
    "teach": 2,
    "evaluate": 1,
    "general": 1,
    "probe": 1,
    "meta": 1,
    "weights": 1,
}


def stage_of(
    name: str,
    task: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Stage],
    sources: Mapping[str, str],
) -> Stage:
    """Return a stage of a kind, in the version that this code computes."""
    return Stage(
        name=name,
        version=VERSIONS[name],
        task=task,
        config=dict(settings),
        inputs=dict(inputs),
        sources=dict(sources),
    )

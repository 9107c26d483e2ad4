"""A stage that some stream wants. It is here, and not with what runs it, because that is slow to import."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.config import StreamConfig
from pipelines.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage, and the config of the stream that asks for it: where its sources lie, how it runs."""

    stage: Stage
    config: StreamConfig

"""The stages about single tokens: what they count, who says so, and which sentences are scored.

What a token counts is a property of its row and not of the training that sees it: computed once, found
by row id in every later training, whatever the method.
"""

from __future__ import annotations

from collections.abc import Iterator

from pipelines.config import StreamConfig
from pipelines.labels import BASE
from pipelines.section import identity
from pipelines.stage import Stage
from pipelines.stage_kinds import stage_of
from pipelines.survey import Facts


def probe_stages(config: StreamConfig, facts: Facts) -> Iterator[Stage]:
    """Yield a stage per set of sentences that every training scores."""
    for item in config.probes:
        settings = identity(item) | {"max_length": config.data.max_length}
        if item.rows is not None:
            settings["seed"] = config.seed
        sources = {"data": facts.probes[item.name], "tokenizer": facts.tokenizer_digest}
        yield stage_of("probe", item.name, settings, {}, sources)


def network_stage(config: StreamConfig, facts: Facts) -> Stage | None:
    """Return the training of Train-Attention, if one is to be trained."""
    weights = config.token_weights
    if weights is None or not weights.trains_network:
        return None
    settings = identity(weights.meta) | {"seed": config.seed}
    sources = {"model": facts.model_digest, **facts.weighing}
    return stage_of("meta", BASE, settings, {}, sources)


def weights_stage(
    config: StreamConfig, facts: Facts, data: Stage, network: Stage | None
) -> Stage | None:
    """Return what the tokens of a task's rows count, or were worth to a reference; None if all alike."""
    weights = config.token_weights
    if config.method.needs.reference:
        settings = {"by": "reference", "dtype": config.model.dtype}
        return stage_of(
            "weights", data.task, settings, {"data": data}, {"model": facts.model_digest}
        )
    if weights is None:
        return None
    inputs, settings = {"data": data}, {"by": weights.by}
    if weights.by == "focus":
        return stage_of("weights", data.task, settings, inputs, {})
    if network is not None:
        return stage_of("weights", data.task, settings, inputs | {"network": network}, {})
    return stage_of("weights", data.task, settings, inputs, facts.weighing)

"""The memory plan as a person reads it: what a worker needs, whether it is there, what would fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipelines.memory_plan import TOLERANCE, Alternative, MemoryPlan
from seekr.training.memory import GIB, MIB

_WHAT = {
    "parameters": "master weights and working copies",
    "gradients": "as they are accumulated",
    "optimizer": "state",
    "gathered": "whole layers, casts, buffers of reductions",
    "activations": "what backward reads, logits in chunks",
    "teacher": "targets of replayed rows, tiles of maps",
    "penalty": "earlier weights or adapters of a penalty",
    "checkpoint": "copy that is written while training goes on",
    "process": "before the first tensor",
}
_STYLES = {"fits": "green", "close": "yellow", "does not fit": "red", "unknown": "yellow"}


def memory_table(plan: MemoryPlan) -> Group:
    """Return the parts and the peak of a worker, the verdict, and settings that would fit."""
    table = Table(title=f"memory of a training worker\n{_setting(plan)}", title_justify="left")
    table.add_column("part")
    table.add_column("at the peak", justify="right")
    table.add_column("what")
    for name, value in asdict(plan.estimate.parts).items():
        if value:
            table.add_row(name, shown(value), _WHAT[name])
    table.add_section()
    table.add_row(
        Text("peak", "bold"), Text(shown(plan.estimate.peak), "bold"), _moment(plan.estimate.phase)
    )
    if plan.memory is not None:
        table.add_row("device", shown(plan.memory), _device(plan))
    if plan.estimate.host:
        table.add_row("host", shown(plan.estimate.host), "memory of the node, beside the device")
    parts: list[Any] = [table, Text(_verdict(plan), f"bold {_STYLES[plan.verdict]}")]
    if plan.alternatives:
        parts.append(_alternatives(plan.alternatives))
    return Group(*parts)


def shown(size: int) -> str:
    """Return bytes in MiB or GiB."""
    if size >= GIB:
        return f"{size / GIB:.1f} GiB"
    return f"{size / MIB:.0f} MiB" if size >= 10 * MIB else f"{size / MIB:.1f} MiB"


def _setting(plan: MemoryPlan) -> str:
    train, work = plan.train, plan.work
    strategy = train.strategy
    if strategy == "deepspeed":
        strategy = f"deepspeed, ZeRO-{train.zero_stage}"
    workers = f"{train.fewest_workers} worker" + "s" * (train.fewest_workers > 1)
    passes = f"passes of {work.task.rows} x {work.task.tokens} tokens"
    return f"{strategy}, {workers}, {plan.dtype}, {passes}"


def _moment(phase: str) -> str:
    known = {
        "losses": "when the losses are differentiated",
        "last layer": "in the backward pass of the last layer",
        "first layer": "in the backward pass of the first layer",
        "embedding": "at the embedding's gradient",
        "update": "at the optimizer's update",
        "export": "while the model is written",
    }
    return known[phase]


def _device(plan: MemoryPlan) -> str:
    if plan.train.device_memory is not None:
        return "train.device_memory"
    if plan.device == "cuda":
        return "as the device here says"
    return "a worker's share of this machine"


def _verdict(plan: MemoryPlan) -> str:
    rows = "the longest ingested row" if plan.rows.known else "data.max_length"
    basis = f"Calculated for {rows}; measurements on the CPU were within {TOLERANCE:.0%}."
    match plan.verdict:
        case "fits":
            return f"It fits. {basis}"
        case "close":
            return f"It may not fit: too close to tell. {basis}"
        case "unknown":
            return f"Whether it fits is not known: set train.device_memory (GiB). {basis}"
        case _ if plan.alternatives:
            return f"It does not fit. {basis}"
        case _:
            return f"It does not fit, and no setting was found that would. {basis}"


def _alternatives(found: tuple[Alternative, ...]) -> Table:
    table = Table(title="what would fit, least loss of speed first", title_justify="left")
    table.add_column("settings")
    table.add_column("peak", justify="right")
    table.add_column("result")
    for item in found:
        settings = ", ".join(f"{name}={_value(value)}" for name, value in item.changes.items())
        table.add_row(settings, shown(item.peak), "the same" if item.same_result else "another")
    return table


def _value(value: Any) -> str:
    """Return a value as `--set` takes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_value(item)}" for name, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)

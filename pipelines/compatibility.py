"""What of a stream's parts does not go together: a method and how it is trained, and replay.

What documents ask for is in `document_rules`.

Each part is right by itself; here they are looked at side by side. A combination that could not be given
as asked is refused, with what to change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from seekr.methods.recadam import RecAdam

if TYPE_CHECKING:
    from pipelines.config import StreamConfig


def check_together(config: StreamConfig) -> None:
    """Check that the parts of a stream go together.

    Raises:
        ValueError: naming the first two that do not.
    """
    _check_training(config)
    _check_replay(config)
    _check_gate(config)


def _check_training(config: StreamConfig) -> None:
    method, train = config.method, config.train
    single = method.needs.task_logits or method.needs.addition or method.needs.reference
    if train.pack_tokens is not None and single:
        raise ValueError(
            f"train.pack_tokens is {train.pack_tokens} and method {method.name} has targets or "
            "an addition for single rows; null is needed"
        )
    if method.needs.penalty and train.strategy == "deepspeed":
        raise ValueError(
            f"train.strategy is deepspeed, which keeps gradients to itself, and method "
            f"{method.name} adds to them; choose fsdp or ddp"
        )
    if isinstance(method, RecAdam) and method.pull_weight * train.learning_rate > 1:
        raise ValueError(
            f"train.learning_rate is {train.learning_rate:g} and method.pull_weight "
            f"{method.pull_weight:g}; their product is the share of the way back that a step goes, "
            "at most 1: lower one of them"
        )
    if method.needs.adapters and train.lora is None:
        raise ValueError(
            f"train.lora is null and method {method.name} is about adapters; set train.lora.rank"
        )
    if train.lora is not None and (method.needs.fisher or method.needs.addition):
        raise ValueError(
            f"train.lora is set and method {method.name} is not about adapters, under which the "
            "weights stay frozen; set train.lora to null"
        )
    if config.general.asked and method.needs.addition:
        raise ValueError(
            f"general.tasks is set and method {method.name} trains an addition to a frozen model, which "
            "lm-eval does not know how to use; leave general.tasks empty"
        )


def _check_replay(config: StreamConfig) -> None:
    method, replay = config.method, config.replay
    if replay.review is not None and (not method.needs.replay or method.needs.teacher):
        found = "has targets for what it replays" if method.needs.teacher else "replays nothing"
        raise ValueError(
            f"replay.review is set and method {method.name} {found}; replay and opr go with it: "
            "choose one, or leave replay.review out"
        )
    if method.needs.weights and (replay.borrowed is not None or replay.answers != "gold"):
        name = "borrowed" if replay.borrowed is not None else "answers"
        raise ValueError(
            f"replay.{name} is set and method {method.name} replays the prompts of kept rows alone, "
            f"without answers; leave replay.{name} out"
        )
    if replay.generator is None:
        return
    if not (method.needs.replay and method.replay_sees == "prompts"):
        raise ValueError(
            f"replay.generator is set, which writes prompts without answers, and method {method.name} "
            "does not replay prompts alone; set replay.generator to null, or use method sapt"
        )
    if replay.sampling != "random":
        raise ValueError(
            f"replay.sampling is {replay.sampling} and replay.generator is set, so no row is kept that "
            "could be chosen; leave replay.sampling out"
        )


def _check_gate(config: StreamConfig) -> None:
    """Every bound needs a figure that the stream's stages yield."""
    gate = config.gate
    if gate is None:
        return
    untested = next((task.name for task in config.tasks if not config.is_tested(task)), None)
    if untested is not None:
        raise ValueError(
            f"gate is set and task {untested} has no test, so there is nothing to judge a model by; "
            "give every task a test, or leave gate out and promote by hand"
        )
    if gate.min_new_gain is not None and not config.evaluate.forward_transfer:
        raise ValueError(
            "gate.min_new_gain is set, which compares with the model before a task, and "
            "evaluate.forward_transfer is false, so that one is not scored; set it to true"
        )
    if gate.max_general_loss is not None and not config.general.asked:
        raise ValueError(
            "gate.max_general_loss is set and general.tasks is empty, so nothing is measured; name the "
            "tasks, or set the bound to null"
        )
    if config.method.needs.all_tasks and gate.looks_back and gate.against == "best":
        raise ValueError(
            f"gate.against is best and method {config.method.name} learns all tasks at once, so there "
            "is no model in between to compare with; choose against: champion"
        )
    if config.method.needs.all_tasks and gate.min_new_gain is not None:
        raise ValueError(
            f"gate.min_new_gain is set and method {config.method.name} learns all tasks at once, so no "
            "model is scored before a task; set it to null"
        )

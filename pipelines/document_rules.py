"""What a stream about documents, or with weights of tokens, cannot have beside them.

Called while a config is validated: a ValueError becomes the message of its section.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.config import StreamConfig


def check_documents(config: StreamConfig) -> None:
    """Check a stream's tasks, method, probes and token weights against each other.

    Raises:
        ValueError: two of them do not go together.
    """
    documents = [t.name for t in config.tasks if config.options(t).columns.text is not None]
    _check_tests(config, documents)
    _check_weights(config)
    if (own := config.own_answers) and documents:
        raise ValueError(
            f"task {documents[0]} learns documents, which ask nothing, and {own} lets the model "
            "answer; choose gold answers and no borrowed rows"
        )
    for name, wanted in (("probes", config.probes), ("token_weights", config.token_weights)):
        if wanted and config.method.needs.addition:
            raise ValueError(
                f"{name} is set and method {config.method.name} trains an addition to a frozen model; "
                f"leave {name} out"
            )


def _check_tests(config: StreamConfig, documents: list[str]) -> None:
    """Only documents may come without rows to be tested on, and then no task has any."""
    untested = [task.name for task in config.tasks if not config.is_tested(task)]
    missing = sorted(set(untested) - set(documents))
    if missing:
        raise ValueError(
            f"task {missing[0]} has no test; one is needed for rows that are asked: give it one, or let "
            "evaluate.split be validation, which tests on rows held out of the training rows"
        )
    if untested and len(untested) < len(config.tasks):
        raise ValueError(
            f"task {untested[0]} has no test and other tasks have one; with some of them the final "
            "scores would leave out what that task did: give each a test, or none"
        )
    if documents and config.evaluate.split == "validation":
        raise ValueError(
            f"evaluate.split is validation and task {documents[0]} learns documents, which ask "
            "nothing; choose test"
        )


def _check_weights(config: StreamConfig) -> None:
    """Every row that is trained on has to have weights, and nobody else may set them."""
    weights, method = config.token_weights, config.method
    if weights is None:
        return
    if method.needs.reference:
        raise ValueError(
            f"token_weights is set and method {method.name} says itself which tokens count; "
            "leave token_weights out"
        )
    if own := config.own_answers:
        raise ValueError(
            f"token_weights is set and {own} makes answers of its own, whose tokens nobody has "
            "weighed; choose gold answers and no borrowed rows"
        )
    for task in config.sources if weights.by == "focus" else ():
        if config.options(task).columns.focus is None:
            what = f"task {task.name}" if task in config.tasks else "replay.review"
            raise ValueError(
                f"token_weights.by is focus and {what} has no columns.focus; set it, in data for all"
            )

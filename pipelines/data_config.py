"""The parts of a stream's YAML about data: tasks, how their rows are read, written as prompts, scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.labels import ALL_TASKS, BASE, CHAMPION, REVIEW
from pipelines.section import Section, execution

Metric = Literal["exact_match", "accuracy", "rouge_l", "edit_similarity", "bleu", "sari"]
Name = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80, description="A plain name.")
]


class Columns(Section):
    """Names of the source's columns; null finds the usual ones."""

    input: str | None = None
    """What the model is asked: input or prompt."""
    output: str | None = None
    """The answer, or a list of accepted ones: output or answer."""
    definition: str | None = None
    """The task in words, where the template wants it."""
    text: str | None = None
    """Documents: training rows are learnt whole, from their first token; test rows are asked as ever."""
    focus: str | None = None
    """The part of a document that matters, or a list of them; only for token_weights by focus."""

    @model_validator(mode="after")
    def _focus_is_of_documents(self) -> Columns:
        if self.focus is not None and self.text is None:
            raise ValueError("focus is set and text is null; focus is about documents: set text")
        return self


class TaskOptions(Section):
    """How a task's rows are read, written as a prompt and scored. Set for all tasks in `data`, and
    for one of them in `tasks`."""

    columns: Columns | None = None
    """Which columns of the files hold what."""
    template: str | None = None
    """Prompt with {input} and perhaps {definition}; null takes what belongs to the file's layout."""
    max_length: int | None = Field(default=None, ge=4)
    """Tokens of prompt and answer together; a longer input is cut, never the template."""
    max_answer_length: int | None = Field(default=None, ge=2)
    """Tokens reserved for the answer with its EOS; also the most that evaluation generates."""
    truncate: Literal["head", "tail"] | None = None
    """The end of a long input that is cut off."""
    metric: Metric | None = None
    """What a prediction is scored by, over all references of its row."""
    train_rows: int | None = Field(default=None, ge=1)
    """Keep this many training rows, drawn by hash; null keeps all."""
    test_rows: int | None = Field(default=None, ge=1)
    """The same for test rows."""
    validation_rows: int | None = Field(default=None, ge=1)
    """Training rows that are held out, drawn by hash: never trained on or replayed; null holds none."""


class DataConfig(TaskOptions):
    """Defaults for every task."""

    columns: Columns = Columns()  # type: ignore[assignment]
    """Which columns of the files hold what."""
    max_length: int = Field(default=1024, ge=4)  # type: ignore[assignment]
    """Tokens of prompt and answer together; a longer input is cut, never the template."""
    max_answer_length: int = Field(default=256, ge=2)  # type: ignore[assignment]
    """Tokens reserved for the answer with its EOS; also the most that evaluation generates."""
    truncate: Literal["head", "tail"] = "tail"  # type: ignore[assignment]
    """The end of a long input that is cut off."""
    metric: Metric = "rouge_l"  # type: ignore[assignment]
    """What a prediction is scored by, over all references of its row."""
    max_bad_share: float = execution(0.0, ge=0, lt=1)
    """Share of malformed rows that is quarantined instead of stopping the run."""


class TaskConfig(TaskOptions):
    """One task of the stream, in learning order."""

    name: Name
    """Names its stages and its column of the matrix; a folder name."""
    train: str = execution(..., min_length=1)
    """File, folder, glob or URI of training rows; relative paths start at data_root."""
    test: str | None = execution(None, min_length=1)
    """The same for the rows it is tested on; may be left out where documents are learnt, by all tasks."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the rows; train.epochs unless given."""


class ProbeConfig(Section):
    """Sentences with a gap that a model is asked to fill after every epoch, token by token."""

    name: Name
    """Names its curve; a folder name."""
    data: str = execution(..., min_length=1)
    """File, folder, glob or URI; relative paths start at data_root."""
    sentence: str = "sentence"
    """Column of the whole sentence."""
    answer: str = "answer"
    """Column of the part that is scored; its last occurrence in the sentence."""
    statements: bool = False
    """Rows have columns subject, relation and object instead (TemporalWiki), of which a sentence is made."""
    rows: int | None = Field(default=None, ge=1)
    """Keep this many, drawn by hash; null keeps all."""
    role: Literal["to_learn", "not_to_forget", "watched"] = execution("watched")
    """What the report makes of it: Top Acc and its epoch, NF Acc at that epoch, or a curve alone."""


def check_names(tasks: Sequence[TaskConfig]) -> None:
    """Check that tasks can be told apart, from one another and from what stages call their own.

    Raises:
        ValueError: naming the first that cannot.
    """
    seen: set[str] = set()
    for task in tasks:
        if task.name.lower() in seen:
            raise ValueError(f"the task name {task.name!r} occurs twice; give each its own")
        if task.name.lower() in {ALL_TASKS, BASE, REVIEW, CHAMPION}:
            raise ValueError(f"the task name {task.name!r} is reserved; choose another")
        if "--" in task.name:
            raise ValueError(
                f"the task name {task.name!r} has '--', which joins names of stages; use '-'"
            )
        seen.add(task.name.lower())

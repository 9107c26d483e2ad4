"""The schema of a stream's YAML: what is learnt, how, and on what machines.

Every field is typed, described, and either bears identity (it changes what is computed, so it enters
fingerprints) or concerns execution only (where, with how many workers, how often to checkpoint: never
in a fingerprint), see `section`. Unknown fields are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipelines.cluster_config import ClusterConfig
from pipelines.cluster_rules import check_cluster
from pipelines.compatibility import check_together
from pipelines.continual_config import AlertsConfig, GateConfig, InboxConfig
from pipelines.data_config import (
    DataConfig,
    Name,
    ProbeConfig,
    TaskConfig,
    TaskOptions,
    check_names,
)
from pipelines.document_rules import check_documents
from pipelines.labels import REVIEW
from pipelines.pool_config import EvaluateConfig, GeneralConfig, PoolConfig, TeachConfig
from pipelines.section import Section, execution
from pipelines.token_weights_config import TokenWeightsConfig
from pipelines.train_config import GeneratorConfig, TrainConfig
from seekr.methods.derpp import DERpp
from seekr.methods.ewc import EWC
from seekr.methods.l2p import L2P
from seekr.methods.lwf import LwF
from seekr.methods.mtl import MTL
from seekr.methods.olora import OLoRA
from seekr.methods.opr import OPR
from seekr.methods.pp import ProgressivePrompts
from seekr.methods.recadam import RecAdam
from seekr.methods.replay import Replay
from seekr.methods.rho1 import RHO1
from seekr.methods.sapt import SAPT
from seekr.methods.seekr import SEEKR
from seekr.methods.seqft import SeqFT

AnyMethod = Annotated[
    SeqFT
    | Replay
    | DERpp
    | SEEKR
    | OPR
    | LwF
    | EWC
    | RecAdam
    | OLoRA
    | L2P
    | ProgressivePrompts
    | SAPT
    | RHO1
    | MTL,
    Field(discriminator="name"),
]
# For editors: which of the two it is that brings tasks is otherwise known to a validator alone.
_TASKS_OR_INBOX: dict[str, JsonValue] = {
    "anyOf": [
        {"required": ["tasks"], "properties": {"tasks": {"minItems": 1}}},
        {"required": ["tasks_from"], "properties": {"tasks_from": {"type": "string"}}},
    ]
}
# Logical CPUs for Ray Data's own read and write tasks.
_TASK_CPUS = 2


class ModelConfig(Section):
    """The base model. Its identity is the digest of its files, wherever they lie."""

    path: Path = execution(...)
    """Folder in the Hugging Face layout: config.json, *.safetensors, tokenizer."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward pass and of the saved models; optimizer and master weights stay float32."""
    trust_remote_code: bool = execution(False)
    """Run Python code that lies in the model's folder. Off unless you say so."""


class ReplayConfig(Section):
    """Which old rows are kept, and how often they are seen."""

    ratio: float | None = Field(default=0.01, gt=0, le=1)
    """Share of a task's training rows that is kept."""
    rows: int | None = Field(default=None, ge=1)
    """Number of rows kept per task, instead of a ratio."""
    batch_ratio: float = Field(default=1.0, gt=0)
    """Replayed rows per new row in every optimizer step, once there is something to replay."""
    sampling: Literal["random", "surprise_before", "surprise_after"] = "random"
    """Which rows are kept: drawn by hash, or those whose answers the model finds least likely before,
    or after, it has learnt the task (SuRe)."""
    answers: Literal["gold", "on_policy"] = "gold"
    """`on_policy` replays the newest model's own answers to the kept prompts (OPR)."""
    accept: float = Field(default=1.0, gt=0, le=1)
    """Score by the task's metric from which an own answer is replayed."""
    rejected: Literal["gold", "drop"] = "gold"
    """What is replayed for a prompt without a good own answer: its gold answer, or nothing."""
    review: str | None = execution(None, min_length=1)
    """File, folder, glob or URI of rows that are replayed from the first task on, as the model has been
    trained on such before (Mix-review); read like the tasks' rows. Null replays kept rows alone."""
    borrowed: int | None = Field(default=None, ge=1)
    """Rows per earlier task made while a task is learnt: its inputs under the earlier task's
    instruction, with the newest model's answers. They are replayed too, and not kept; null makes
    none."""
    generator: GeneratorConfig | None = None
    """For methods that replay prompts alone: a model trained on a task's prompts writes those that are
    replayed, as many as rows would be kept; null keeps rows."""

    @model_validator(mode="before")
    @classmethod
    def _one_of_two(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("rows") is not None:
            if values.get("ratio") is not None:
                raise ValueError("ratio and rows are both set; keep one, set the other to null")
            return {**values, "ratio": None}
        return values

    @model_validator(mode="after")
    def _at_least_one(self) -> ReplayConfig:
        if self.ratio is None and self.rows is None:
            raise ValueError("ratio and rows are both null; set one of them")
        return self


class TrackingConfig(Section):
    """MLflow, a view of the records that can be rebuilt."""

    uri: str | None = execution(None)
    """Of the server; null is sqlite in the local storage folder, `off` tracks nothing."""

    @field_validator("uri", mode="before")
    @classmethod
    def _off_is_a_word(cls, uri: Any) -> Any:
        return "off" if uri is False else uri  # YAML 1.1 reads a bare off as false


class RayConfig(Section):
    """The Ray cluster."""

    address: str | None = execution(None)
    """Of a running cluster; null starts a local one."""
    num_cpus: int | None = execution(None, ge=1)
    """Logical CPUs of the local one."""
    parallel_stages: int = execution(2, ge=1)
    """Independent stages that may run at the same time."""
    patience: float = execution(600, ge=0)
    """Seconds that the cluster may have less than running stages need, or not answer, before the run ends:
    nodes that are gone may come back."""


class StreamConfig(Section):
    """A stream: a base model, a method, and an append-only list of tasks."""

    model_config = ConfigDict(json_schema_extra=_TASKS_OR_INBOX)

    name: Name
    """Names the stream in reports and MLflow."""
    benchmark: str | None = execution(None)
    """What data this is, for reports: benchmark, variant and order, such as `TRACE _Reasoning, order 1`."""
    seed: int = Field(default=0, ge=0)
    """Of replay draws, query rows and row order."""
    model: ModelConfig
    """The base model."""
    data_root: Path | None = execution(None)
    """Folder that the tasks' files are relative to; the YAML's own folder unless given."""
    data: DataConfig = DataConfig()
    """Defaults for every task."""
    tasks_from: str | None = execution(None, min_length=1)
    """Inbox (folder, glob or URI) whose files and folders become tasks behind these, as they arrive."""
    tasks: tuple[TaskConfig, ...] = Field(default=(), validate_default=True)
    """In learning order; append new ones at the end."""
    probes: tuple[ProbeConfig, ...] = ()
    """Sentences that are scored before and after every epoch of every training."""
    method: AnyMethod
    """Its name, and its own settings."""
    token_weights: TokenWeightsConfig | None = None
    """What each token of a document counts; null counts all alike."""
    replay: ReplayConfig = ReplayConfig()
    """Which old rows are kept and how often they are seen."""
    train: TrainConfig = TrainConfig()
    """Training of one task."""
    score: PoolConfig = PoolConfig()
    """The actors that score heads."""
    teach: TeachConfig = Field(default=TeachConfig(), validate_default=True)
    """The actors that write targets, and how."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """The actors that generate, and what else is measured."""
    general: GeneralConfig = GeneralConfig()
    """What the model can do besides its tasks."""
    storage: str = execution("seekr-store", min_length=1)
    """Folder or URI (s3://, gs://) of all artifacts; a relative folder is relative to where you are."""
    tracking: TrackingConfig = TrackingConfig()
    """Where MLflow is."""
    ray: RayConfig = RayConfig()
    """The Ray cluster."""
    inbox: InboxConfig = InboxConfig()
    """When something in the inbox is taken."""
    gate: GateConfig | None = execution(None)
    """What the newest model has to show to become the champion; null promotes by hand alone."""
    alerts: AlertsConfig | None = execution(None)
    """Whom ticks tell what happened; null tells nobody."""
    cluster: ClusterConfig | None = execution(None)
    """The Kubernetes cluster that `seekr cluster` lays out; null where the stream runs elsewhere."""

    @field_validator("tasks")
    @classmethod
    def _distinct_names(
        cls, tasks: tuple[TaskConfig, ...], info: ValidationInfo
    ) -> tuple[TaskConfig, ...]:
        if not tasks and info.data.get("tasks_from") is None:
            raise ValueError("at least 1 is needed, or tasks_from with an inbox they arrive in")
        check_names(tasks)
        return tasks

    @field_validator("teach")
    @classmethod
    def _whole_logits_where_needed(cls, teach: TeachConfig, info: ValidationInfo) -> TeachConfig:
        method = info.data.get("method")
        if method is None or not method.whole_logits or teach.logits_kept is None:
            return teach
        cause = PydanticCustomError(
            "value_error",
            "must be null, as the losses of method {method} compare whole logits",
            {"method": method.name},
        )
        # Not a ValueError, which would be told of the whole section.
        raise ValidationError.from_exception_data(
            "teach", [{"type": cause, "loc": ("logits_kept",), "input": teach.logits_kept}]
        )

    @field_validator("probes")
    @classmethod
    def _one_set_per_role(cls, probes: tuple[ProbeConfig, ...]) -> tuple[ProbeConfig, ...]:
        names = [item.name.lower() for item in probes]
        roles = [item.role for item in probes if item.role != "watched"]
        for kind, found in (("name", names), ("role", roles)):
            twice = next((value for value in found if found.count(value) > 1), None)
            if twice is not None:
                raise ValueError(
                    f"the {kind} {twice!r} occurs twice among the probes; give each its own"
                )
        return probes

    @model_validator(mode="after")
    def _parts_go_together(self) -> StreamConfig:
        check_together(self)
        check_documents(self)
        check_cluster(self)
        return self

    def with_tasks(self, arrived: Sequence[TaskConfig]) -> StreamConfig:
        """Return the stream with more tasks at its end.

        Raises:
            ValueError: one of them does not go with the others, or with the stream.
        """
        longer = self.model_copy(update={"tasks": (*self.tasks, *arrived)})
        check_names(longer.tasks)
        check_together(longer)
        check_documents(longer)
        return longer

    def is_tested(self, task: TaskConfig) -> bool:
        """Return whether a task has rows to be tested on: of its own, or held out of the others."""
        return task.test is not None or self.evaluate.split == "validation"

    @property
    def own_answers(self) -> str | None:
        """What lets the model answer replayed prompts itself; None where gold answers are replayed."""
        if not self.method.needs.replay:
            return None
        if self.method.needs.on_policy:
            return f"method {self.method.name}"
        if self.replay.answers != "gold":
            return "replay.answers"
        return None if self.replay.borrowed is None else "replay.borrowed"

    @property
    def required_cpus(self) -> float:
        """Logical CPUs that let a training run beside the actors of all pools."""
        pools = (self.score, self.teach, self.evaluate)
        training = self.train.most_workers * self.train.cpus_per_worker
        others = self.general.cpus if self.general.asked else 0
        if self.token_weights is not None and self.token_weights.trains_network:
            others += self.token_weights.meta.cpus
        return training + sum(pool.actors * pool.cpus for pool in pools) + others + _TASK_CPUS

    @property
    def virtual_tokens(self) -> int:
        """Trained vectors that stand before a row once all tasks are learnt."""
        addition = self.method.addition
        for task in self.tasks:
            addition = addition and addition.with_task(task.name)
        return addition.virtual_tokens if addition else 0

    @property
    def review(self) -> TaskConfig | None:
        """The rows of replay.review, as if they were a task's."""
        source = self.replay.review
        return None if source is None else TaskConfig(name=REVIEW, train=source)

    @property
    def sources(self) -> tuple[TaskConfig, ...]:
        """All whose rows are ingested: the tasks, and what is reviewed."""
        return self.tasks if self.review is None else (*self.tasks, self.review)

    def options(self, task: TaskConfig) -> DataConfig:
        """Return a task's options with the defaults filled in."""
        own = {
            name: getattr(task, name)
            for name in TaskOptions.model_fields
            if getattr(task, name) is not None
        }
        return self.data.model_copy(update=own)

"""Writes docs/configuration.md from the pydantic models, so that it cannot say anything else.

    python docs/write_configuration.py

A table per section of the YAML: the field, what it may be, its default, whether it bears identity,
and its meaning. `tests/test_docs.py` fails while the file differs from what this writes, and while a
field's kind differs from what the graph does with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines import (
    cluster_config,
    cluster_services,
    config,
    continual_config,
    data_config,
    token_weights_config,
    train_config,
)
from seekr.methods import METHODS

TARGET = Path(__file__).with_name("configuration.md")
# A section's heading and its model; `stream` is the YAML's top.
SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("stream", config.StreamConfig),
    ("model", config.ModelConfig),
    ("data", data_config.DataConfig),
    ("data.columns", data_config.Columns),
    ("tasks[]", data_config.TaskConfig),
    ("probes[]", data_config.ProbeConfig),
    *((f"method: {{name: {name}}}", model) for name, model in METHODS.items()),
    ("token_weights", token_weights_config.TokenWeightsConfig),
    ("token_weights.meta", token_weights_config.MetaConfig),
    ("token_weights.meta.columns", token_weights_config.PairColumns),
    ("replay", config.ReplayConfig),
    ("replay.generator", train_config.GeneratorConfig),
    ("train", config.TrainConfig),
    ("train.lora", train_config.LoraConfig),
    ("train.workers", train_config.WorkerRange),
    ("score", config.PoolConfig),
    ("teach", config.TeachConfig),
    ("evaluate", config.EvaluateConfig),
    ("general", config.GeneralConfig),
    ("tracking", config.TrackingConfig),
    ("ray", config.RayConfig),
    ("inbox", continual_config.InboxConfig),
    ("gate", continual_config.GateConfig),
    ("alerts", continual_config.AlertsConfig),
    ("cluster", cluster_config.ClusterConfig),
    ("cluster.head", cluster_config.HeadConfig),
    ("cluster.cpu_workers", cluster_config.CpuWorkersConfig),
    ("cluster.gpu_workers", cluster_config.GpuWorkersConfig),
    ("cluster.gpu_workers.tolerations[]", cluster_config.TolerationConfig),
    ("cluster.autoscaler", cluster_config.AutoscalerConfig),
    ("cluster.kueue", cluster_config.KueueConfig),
    ("cluster.job", cluster_config.JobConfig),
    ("cluster.job.deletion[]", cluster_config.DeletionRuleConfig),
    ("cluster.schedule", cluster_services.ScheduleConfig),
    ("cluster.storage", cluster_services.StorageConfig),
    ("cluster.storage.claim", cluster_services.ClaimConfig),
    ("cluster.storage.object_store", cluster_services.ObjectStoreConfig),
    ("cluster.storage.object_store.access_key", cluster_services.SecretKey),
    ("cluster.mlflow", cluster_services.MlflowConfig),
    ("cluster.mlflow.deploy", cluster_services.MlflowServerConfig),
    ("cluster.mlflow.deploy.postgres", cluster_services.PostgresConfig),
    ("cluster.redis", cluster_services.RedisConfig),
    ("cluster.network", cluster_services.NetworkConfig),
    ("cluster.network.egress[]", cluster_services.EgressConfig),
)
# The stream's name stands in no stage's payload: it names reports, MLflow runs and models.
LABELS = frozenset({("StreamConfig", "name")})
INTRODUCTION = """\
# Configuration

Written by `python docs/write_configuration.py`; edit the models in `pipelines/config.py` and
`seekr/methods/`, not this file. `seekr schema` prints the same as JSON schema.

A stream is one YAML file. Unknown fields are refused, with the nearest name. `--set field=value`
changes a field for one call: `--set train.epochs=2`, `--set tasks.0.train_rows=100`,
`--set method='{name: replay}'`. Paths in the file are relative to the file, paths in `--set` to the
current folder; `storage` is relative to the current folder in both.

The column *bears* says what a change of the field does:

- **identity**: it decides results. Stages that depend on it get another fingerprint and run again.
- **execution**: where and how the work is done. Finished stages stay finished. `model.path` and the
  tasks' `train` and `test` are execution, because the content they point at enters by digest.
- **label**: a name for people.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One field of the YAML, as text."""

    name: str
    allowed: str
    default: str
    kind: str
    meaning: str


def render() -> str:
    """Return the whole document."""
    sections = ["\n".join(_section(heading, model)) for heading, model in SECTIONS]
    return "\n".join([INTRODUCTION, *(section + "\n" for section in sections)])


def rows_of(model: type[BaseModel]) -> Iterator[Row]:
    """Yield the fields of a section that are values; sections below it have their own tables."""
    schemas = model.model_json_schema()["properties"]
    own = model.__annotations__
    for name, field in sorted(model.model_fields.items(), key=lambda item: item[0] not in own):
        if _is_section(schemas[name]):
            continue
        yield Row(
            name=name,
            allowed=_allowed(schemas[name]),
            default="required" if field.is_required() else _shown(field.default),
            kind=kind_of(model, name),
            meaning=" ".join(_meaning(model, name).split()),
        )


def kind_of(model: type[BaseModel], name: str) -> str:
    """Return `identity`, `execution` or `label`."""
    if (model.__name__, name) in LABELS:
        return "label"
    extra = model.model_fields[name].json_schema_extra
    return "execution" if isinstance(extra, dict) and extra.get("execution") else "identity"


def _section(heading: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"## {heading if heading == 'stream' else f'`{heading}`'}"
    yield ""
    yield " ".join((model.__doc__ or "").split())
    yield ""
    yield "| field | allowed | default | bears | meaning |"
    yield "|---|---|---|---|---|"
    for row in rows_of(model):
        cells = (f"`{row.name}`", row.allowed, row.default, row.kind, row.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _meaning(model: type[BaseModel], name: str) -> str:
    """A field's description; one that only changes an inherited default keeps the meaning."""
    for ancestor in model.__mro__:
        fields: dict[str, FieldInfo] = getattr(ancestor, "__pydantic_fields__", {})
        if name in fields and fields[name].description:
            return str(fields[name].description)
    return ""


def _is_section(schema: dict[str, Any]) -> bool:
    """Whether a field is a section, a choice of sections or a list of them."""
    if "items" in schema:
        return _is_section(schema["items"])
    return "$ref" in schema or any("$ref" in option for option in schema.get("oneOf", ()))


def _allowed(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_allowed(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return "a section"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "prefixItems" in schema:
        return "[" + ", ".join(_allowed(item) for item in schema["prefixItems"]) + "]"
    if schema.get("type") == "array":
        return f"a list of {_allowed(schema['items'])}"
    if schema.get("type") == "object":
        return f"names, each with {_allowed(schema['additionalProperties'])}"
    words = {"string": "text", "boolean": "true, false"}
    kind: str = schema["type"]
    text = "path" if schema.get("format") == "path" else words.get(kind, kind)
    bounds = [
        f"{sign} {_number(schema[key])}"
        for key, sign in (
            ("exclusiveMinimum", ">"),
            ("minimum", ">="),
            ("exclusiveMaximum", "<"),
            ("maximum", "<="),
        )
        if key in schema
    ]
    return f"{text} {', '.join(bounds)}" if bounds else text


def _shown(value: Any) -> str:
    """A default as one writes it in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "`[]`" if not value else f"`{list(value)}`"
    if isinstance(value, dict):
        return "`{}`"
    return f"`{_number(value) if isinstance(value, float) else value}`"


def _number(value: float) -> str:
    return re.sub(r"e([+-])0*", r"e\1", f"{value:g}")


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")

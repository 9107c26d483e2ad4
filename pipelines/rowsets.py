"""Tokenised rows as Parquet: the schema, and the ways in and out through Ray Data and pyarrow.

Stages read and write with Ray Data; training workers and actors that need a few rows by id read with
pyarrow alone. Either way the schema is this one, and order never carries meaning.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from ray.data import Dataset, SaveMode

from pipelines.artifact import Artifact
from pipelines.workspace import Workspace
from seekr.prompts import TokenizedRow

ROW_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("input", pa.string()),
        ("references", pa.list_(pa.string())),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
    ]
)
REPLAY = "replay"
TRAIN, TEST = "train", "test"


def read_rows(artifact: Artifact, folder: str, columns: list[str] | None = None) -> Dataset:
    """Return an artifact's Parquet folder as a dataset."""
    return ray.data.read_parquet(
        artifact.full_path(folder), filesystem=artifact.store.filesystem, columns=columns
    )


def write_rows(rows: Dataset, workspace: Workspace, folder: str) -> None:
    """Write a dataset as a Parquet folder of a stage, replacing what a dead attempt left."""
    rows.write_parquet(
        workspace.full_path(folder),
        filesystem=workspace.store.filesystem,
        mode=SaveMode.OVERWRITE,
    )


def load_table(artifact: Artifact, folder: str, columns: list[str] | None = None) -> pa.Table:
    """Read an artifact's Parquet folder into memory, sorted by row id."""
    table = pq.read_table(
        artifact.full_path(folder), filesystem=artifact.store.filesystem, columns=columns
    )
    return table.sort_by("row_id")


def rows_of(table: pa.Table) -> list[TokenizedRow]:
    """Turn a table with (at least) the row schema's columns into rows."""
    records: list[dict[str, Any]] = table.select(ROW_SCHEMA.names).to_pylist()
    return [TokenizedRow.from_record(record) for record in records]

"""Tokenised rows as Parquet: the schema, and the ways in and out through Ray Data and pyarrow.

Stages read and write with Ray Data; training workers and actors that need a few rows by id read with
pyarrow alone. Either way the schema is this one, and order never carries meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from pyarrow.dataset import field as column
from ray.data import Dataset, SaveMode

from pipelines.artifact import Artifact
from pipelines.workspace import Workspace
from seekr.prompts import TokenizedRow
from seekr.sampling import draw, priority, replay_size

ROW_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("input", pa.string()),
        ("references", pa.list_(pa.string())),
        ("input_ids", pa.list_(pa.int32())),
        ("prompt_length", pa.int32()),
    ]
)
# Folder of ingested rows, with a folder per kind below it.
ROWS = "rows"
TRAIN, TEST, VALIDATION, BAD = "train", "test", "validation", "bad"
REPLAY = "replay"
# Column of documents alone: places of the tokens that matter.
FOCUS = "focus"


def kind_folder(kind: str) -> str:
    """Return the folder of an ingest stage's train or test rows."""
    return f"{ROWS}/kind={kind}"


def read_rows(artifact: Artifact, folder: str, columns: list[str] | None = None) -> Dataset:
    """Return an artifact's Parquet folder as a dataset, a block or more per file.

    Not `ray.data.read_parquet`: it looks at every file's metadata in fresh processes first, which
    costs seconds per call. What these files hold is known.
    """
    store, chosen = artifact.store, columns or ROW_SCHEMA.names
    prefix = artifact.path(folder) + "/"
    files = [
        file.path for file in store.list(artifact.path(folder)) if file.path.startswith(prefix)
    ]

    def read(items: pa.Table) -> Iterator[pa.Table]:
        for path in items["path"].to_pylist():
            with store.filesystem.open_input_file(store.full_path(path)) as source:
                file = pq.ParquetFile(source)
                for index in range(file.num_row_groups):
                    yield file.read_row_group(index, columns=chosen)

    items = ray.data.from_items([{"path": path} for path in files])
    return items.map_batches(read, batch_size=1, batch_format="pyarrow")


def write_rows(rows: Dataset, workspace: Workspace, folder: str) -> None:
    """Write a dataset as a Parquet folder of a stage, replacing what a dead attempt left."""
    rows.write_parquet(
        workspace.full_path(folder),
        filesystem=workspace.store.filesystem,
        mode=SaveMode.OVERWRITE,
    )


def write_table(rows: pa.Table, workspace: Workspace, folder: str) -> None:
    """Write a table, sorted by row id, as a Parquet folder with one file, also if it has no row."""
    filesystem = workspace.store.filesystem
    filesystem.create_dir(workspace.full_path(folder))
    with filesystem.open_output_stream(f"{workspace.full_path(folder)}/rows.parquet") as sink:
        pq.write_table(rows.sort_by("row_id"), sink)


def replayed(data: Artifact, settings: Mapping[str, Any]) -> int:
    """Return how many rows are kept of a task: of what it had before any were forgotten, if there are
    so many. A forgotten row's place goes to the next one, and a ratio still means what it meant."""
    left = int(data.record.stats["train_rows"])
    before = left + int(data.record.stats.get(f"{TRAIN}_rows_forgotten", 0))
    return min(left, replay_size(before, settings["ratio"], settings["rows"]))


def smallest(rows: Dataset, kind: str | None, size: int, seed: int) -> pa.Array:
    """Return the ids of the `size` rows with the smallest hash of (seed, row id), all if there are less.

    Each block hands in its own smallest, so nothing is shuffled and the answer is exact.

    Args:
        kind: Look only at rows of this kind; None where there is no such column.
    """

    def of_block(table: pa.Table) -> pa.Table:
        if kind is not None:
            table = table.filter(column("kind") == kind)
        ids = sorted(set(table["row_id"].to_pylist()), key=lambda i: (priority(seed, i), i))
        return pa.table({"row_id": pa.array(ids[:size], pa.string())})

    found = rows.map_batches(of_block, batch_format="pyarrow", batch_size=None).take_all()
    ids = [row["row_id"] for row in found]
    kept = draw(ids, min(size, len(ids)), seed) if ids else []
    return pa.array(kept, pa.string())


def load_table(artifact: Artifact, folder: str, columns: list[str] | None = None) -> pa.Table:
    """Read an artifact's Parquet folder into memory, sorted by row id."""
    table = pq.read_table(
        artifact.full_path(folder),
        filesystem=artifact.store.filesystem,
        columns=columns,
        partitioning=None,  # pyright: ignore[reportArgumentType]
    )
    return table.sort_by("row_id")


def load_rows_table(artifact: Artifact, folder: str) -> pa.Table:
    """Read tokenised rows into memory, sorted by row id, with exactly the row schema."""
    return load_table(artifact, folder, ROW_SCHEMA.names).cast(ROW_SCHEMA)


def rows_of(table: pa.Table) -> list[TokenizedRow]:
    """Turn a table with (at least) the row schema's columns into rows."""
    records: list[dict[str, Any]] = table.select(ROW_SCHEMA.names).to_pylist()
    return [TokenizedRow.from_record(record) for record in records]

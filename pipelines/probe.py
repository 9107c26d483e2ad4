"""Probe: sentences with an answer inside become tokens, with the places of the answer's tokens.

Trainings score them before the first step and after every epoch (`seekr.fact_probes`). They are few
and read in this process; a row whose answer is not in its sentence is put aside with its reason.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipelines.artifact import Artifact
from pipelines.config import StreamConfig
from pipelines.data_config import ProbeConfig
from pipelines.forgotten import ForgottenRows
from pipelines.monitor import Reporter
from pipelines.readers import BadRow, read_source
from pipelines.rows import SourceRow
from pipelines.rowsets import load_table, write_table
from pipelines.stage import StageOutcome
from pipelines.survey_documents import probe_columns
from pipelines.workspace import Workspace
from seekr.errors import DataError
from seekr.fact_probes import Probe, make_probe
from seekr.lama_ckl import schematic_sentence
from seekr.models import load_tokenizer
from seekr.sampling import draw

PROBES = "probes"
QUARANTINE = "quarantine.json"
PROBE_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("answer", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("positions", pa.list_(pa.int64())),
    ]
)


def probe(workspace: Workspace, config: StreamConfig, name: str, report: Reporter) -> StageOutcome:
    """Run the stage; writes probes/ and quarantine.json."""
    item = next(item for item in config.probes if item.name == name)
    folder = Path(config.model.path)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    found: dict[str, tuple[Probe, str]] = {}
    bad: list[dict[str, str | int]] = []
    forgotten = ForgottenRows.load(workspace.store)
    for row in read_source(item.data, probe_columns(item)):
        try:
            if isinstance(row, BadRow):
                raise DataError(row.reason)
            made = make_probe(tokenizer, _sentence(row, item), row.references[0])
            if forgotten.holds(made.row_id):
                continue
            length = len(made.input_ids)
            if length > config.data.max_length:
                raise DataError(f"{length} tokens, and data.max_length is {config.data.max_length}")
            found[made.row_id] = made, row.references[0]
        except DataError as error:
            bad.append({"file": row.file, "line": row.line, "reason": str(error)})
    workspace.write_json(QUARANTINE, bad)
    total = len(found) + len(bad)
    if not found or len(bad) > config.data.max_bad_share * total:
        raise DataError(
            f"probes.{name}: {len(bad)} of {total} rows cannot be scored, the first reason is: "
            f"{bad[0]['reason'] if bad else 'none was read'}; data.max_bad_share allows "
            f"{config.data.max_bad_share:.2%}: mend the rows or allow more"
        )
    kept = sorted(found)
    if item.rows is not None:
        kept = draw(kept, min(item.rows, len(kept)) if forgotten.dates else item.rows, config.seed)
    records = [
        {
            "row_id": row_id,
            "answer": found[row_id][1],
            "input_ids": found[row_id][0].input_ids.tolist(),
            "positions": found[row_id][0].positions.tolist(),
        }
        for row_id in kept
    ]
    write_table(pa.Table.from_pylist(records, schema=PROBE_SCHEMA), workspace, PROBES)
    report.post(force=True, rows_done=len(records))
    return StageOutcome(rows=len(records), stats={"quarantined": len(bad)})


def _sentence(row: SourceRow, item: ProbeConfig) -> str:
    if not item.statements:
        return row.input
    if row.definition is None:
        raise DataError("the relation is empty")
    return schematic_sentence(row.input, row.definition, row.references[0])


def load_probes(artifact: Artifact) -> list[Probe]:
    """Read a set of probes, sorted by id."""
    table = load_table(artifact, PROBES)
    columns = (table[name].to_numpy(zero_copy_only=False) for name in ("input_ids", "positions"))
    return [
        Probe(row_id=row_id, input_ids=ids, positions=positions)
        for row_id, ids, positions in zip(table["row_id"].to_pylist(), *columns, strict=True)
    ]

"""Taking things out: a model as a Hugging Face folder with a note of where it came from, and a look
at where a report shall go."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from pipelines.artifact import Artifact, StageRecord, verify
from pipelines.labels import CHAMPION
from pipelines.lineage import gather, walk
from pipelines.pool import MODEL_FOLDER
from pipelines.promotion import champion_of
from pipelines.stage import find
from pipelines.stream import Stream
from seekr.errors import ConfigError

ORIGIN = "seekr-origin.json"


def export_model(stream: Stream, task: str | None, folder: Path) -> Path:
    """Copy the model after `task` (the last task by default), or the champion, into a new folder.

    Raises:
        ConfigError: no such task, not learnt yet, or the folder is not empty.
        StoreError: the stored model is not what its record says.
    """
    record = _champion(stream) if task == CHAMPION else _learnt(stream, task or stream.last_model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out {folder} exists and is not an empty folder; choose another")
    verify(stream.store, record)
    artifact = Artifact(store=stream.store, record=record)
    try:
        shutil.copytree(artifact.local(MODEL_FOLDER), folder, dirs_exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error}; choose another") from error
    origin = walk(gather(stream.store, record.ref), record.fingerprint)
    note = {"stream": stream.config.name, "task": record.task, "lineage": origin.to_json()}
    note["weights"] = [asdict(output) for output in record.outputs]
    (folder / ORIGIN).write_text(json.dumps(note, indent=2))
    return folder.absolute()


def _champion(stream: Stream) -> StageRecord:
    return StageRecord.load(stream.store, champion_of(stream).key)


def _learnt(stream: Stream, name: str) -> StageRecord:
    trainings = {stage.task: stage for stage in stream.stages if stage.name == "train"}
    if name not in trainings:
        raise ConfigError(
            f"task {name!r} is not in the stream; there are {', '.join(trainings)}: choose one"
        )
    record = find(stream.store, trainings[name])
    if record is None:
        raise ConfigError(
            f"task {name!r} has not been learnt with these settings yet; run the stream first: "
            f"seekr run {stream.path}"
        )
    return record


def check_target(file: Path, option: str) -> None:
    """Refuse, before any work, a file that could not be written after it.

    Raises:
        ConfigError: it is a folder, or lies where no file can be made.
    """
    folder = next(place for place in file.absolute().parents if place.exists())
    if file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{option} {file} cannot be written; give the name of a file to write")

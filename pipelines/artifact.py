"""Stages that have run: the record beside every output, and reading what it vouches for.

An artifact is a folder `{stage}/{task}/{fingerprint}` with a `record.json`, which is written last:
no record, no artifact. The record says what was hashed (the payload), what was read, what was
written with digests, and under which circumstances, so every byte can be traced and checked.

A finished artifact never changes, with one exception: rows that are to be forgotten (`pipelines.erase`).
Its record then says so, and has the digests of the files as they are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal

from pipelines.fingerprint import fingerprint
from pipelines.store import Store
from pipelines.transfer import OutputFile
from seekr.errors import StoreError

RECORD: Final = "record.json"
Depth = Literal["sizes", "digests"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRef:
    """Names one artifact."""

    stage: str
    task: str
    fingerprint: str

    @property
    def key(self) -> str:
        """Its folder, relative to the store's root."""
        return f"{self.stage}/{self.task}/{self.fingerprint}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """What one request to forget rows has done to an artifact, or says of it.

    Attributes:
        request: its id, see `forgotten.Request`.
        at: when it was made, ISO 8601, UTC.
        rows: how many rows the artifact's files have lost.
        learnt: marks (`forgotten.mark_of`) of the rows that a model was trained on. Its weights are
            as they were.
        replaced: the files as they were before.
        done: False while files are being replaced: until then each of them is as before, or as the
            record says.
    """

    request: str
    at: str
    rows: int
    learnt: tuple[str, ...] = ()
    replaced: tuple[OutputFile, ...] = ()
    done: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """The content of `record.json`.

    Attributes:
        stage, version, task, fingerprint: which stage this is.
        payload: what the fingerprint was taken over.
        inputs: the artifacts that were read, by the name the stage gives them.
        outputs: every file that was written, paths relative to the artifact's folder.
        rows: number of rows, where that means something.
        stats: free numbers of the stage.
        seeds: every seed that was used.
        started_at, finished_at: ISO 8601, UTC.
        seconds: wall time of the attempt that finished.
        peak_memory_bytes: growth of the driver's process tree, see `provenance.PeakMemory`.
        attempts: how often it was begun, the successful time included.
        host, user, argv, git_commit, versions: circumstances, see `provenance.Provenance`.
        forgotten: rows that were taken out, or that a model has learnt and the store has forgotten,
            from the oldest request to the newest.
    """

    stage: str
    version: int
    task: str
    fingerprint: str
    payload: dict[str, Any]
    inputs: dict[str, StageRef]
    outputs: tuple[OutputFile, ...]
    rows: int | None
    stats: dict[str, Any]
    seeds: dict[str, int]
    started_at: str
    finished_at: str
    seconds: float
    peak_memory_bytes: int | None
    attempts: int
    host: str
    user: str
    argv: tuple[str, ...]
    git_commit: str | None
    versions: dict[str, str]
    forgotten: tuple[Erasure, ...] = ()

    @property
    def key(self) -> str:
        """The artifact's folder, relative to the store's root."""
        return self.ref.key

    @property
    def ref(self) -> StageRef:
        """Its name."""
        return StageRef(stage=self.stage, task=self.task, fingerprint=self.fingerprint)

    def save(self, store: Store) -> None:
        """Writes the record: from now on the artifact exists."""
        value = asdict(self)
        if not self.forgotten:
            del value["forgotten"]
        store.write_json(f"{self.key}/{RECORD}", value)

    def accepted(self, output: OutputFile) -> list[OutputFile]:
        """Return what a file may be: as recorded or, while rows are taken out, as it was before."""
        before = (old for erasure in self.forgotten if not erasure.done for old in erasure.replaced)
        return [output, *(old for old in before if old.path == output.path)]

    @classmethod
    def load(cls, store: Store, key: str) -> StageRecord:
        """Reads the record of the artifact in the folder `key`.

        Raises:
            StoreError: it is missing, is not a record, or is not the record of this folder.
        """
        path = f"{key}/{RECORD}"
        try:
            record = cls._from_json(store.read_json(path))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(store, key, f"is not a stage record ({error!r})") from None
        except StoreError as error:
            if store.stat(path) is None:
                raise
            raise _damaged(store, key, f"cannot be read ({error})") from None
        if record.key != key:
            raise _damaged(store, key, f"belongs to {record.key}")
        if fingerprint(record.payload) != record.fingerprint:
            raise _damaged(store, key, "holds a payload that does not hash to its fingerprint")
        return record

    @classmethod
    def _from_json(cls, value: Any) -> StageRecord:
        names = {f.name for f in fields(cls)}
        if not isinstance(value, dict) or value.keys() | {"forgotten"} != names:
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(
                f"found {found}, expected the fields {sorted(names)}; another version of seekr?"
            )
        inputs = {name: StageRef(**ref) for name, ref in value["inputs"].items()}
        outputs = tuple(OutputFile(**output) for output in value["outputs"])
        lists = {"outputs": outputs, "argv": tuple(value["argv"])}
        forgotten = tuple(_erasure(erasure) for erasure in value.get("forgotten", ()))
        return cls(**value | lists | {"inputs": inputs, "forgotten": forgotten})


def _erasure(value: Any) -> Erasure:
    replaced = tuple(OutputFile(**output) for output in value["replaced"])
    return Erasure(**value | {"replaced": replaced, "learnt": tuple(value["learnt"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished stage's folder, for reading."""

    store: Store = field(compare=False)
    record: StageRecord

    def path(self, name: str) -> str:
        """Path of one of its files, relative to the store's root."""
        return f"{self.record.key}/{name}"

    def full_path(self, name: str) -> str:
        """Path of one of its files on `store.filesystem`, for pyarrow and Ray readers."""
        return self.store.full_path(self.path(name))

    def local(self, prefix: str = "") -> Path:
        """A local path of the file or folder `prefix` (default: everything), downloaded if need be.

        Raises:
            StoreError: the artifact has no such output, or a download does not match its digest.
        """
        chosen = [
            output
            for output in self.record.outputs
            if not prefix or output.path == prefix or output.path.startswith(f"{prefix}/")
        ]
        if not chosen:
            raise StoreError(
                f"{self.store.uri_for(self.record.key)}: no output {prefix!r}. "
                f"There are: {', '.join(output.path for output in self.record.outputs) or 'none'}."
            )
        return self.store.local(self.record.key, chosen) / prefix

    def read_json(self, name: str) -> Any:
        """Content of one of its JSON files."""
        return self.store.read_json(self.path(name))


def verify(store: Store, record: StageRecord, depth: Depth = "digests") -> None:
    """Checks that the files of an artifact are what its record says.

    Where rows were taken out that is what is left: a record has the digests of the newest files. Those
    that read them name their input by its fingerprint, which stays, so they are not concerned.

    Args:
        store: where it lies.
        record: what is expected.
        depth: `sizes` looks at existence and size, `digests` also reads every byte, once per
            process.

    Raises:
        StoreError: naming the first file that differs, what was found, and what to remove.
    """
    sizes = {file.path: file.size for file in store.list(record.key)}
    for output in record.outputs:
        size = sizes.get(f"{record.key}/{output.path}")
        if size not in {file.size for file in record.accepted(output)}:
            found = "no such file" if size is None else f"{size} bytes"
            raise _changed(store, record, output, f"{output.size} bytes", found)
    if depth == "sizes" or record.key in store.verified:
        return
    for output in record.outputs:
        digest = store.digest(f"{record.key}/{output.path}")
        if digest not in {file.sha256 for file in record.accepted(output)}:
            raise _changed(store, record, output, f"sha256 {output.sha256}", f"sha256 {digest}")
    store.verified.add(record.key)


def _changed(
    store: Store, record: StageRecord, output: OutputFile, expected: str, found: str
) -> StoreError:
    return StoreError(
        f"{store.uri_for(f'{record.key}/{output.path}')}: expected {expected}, found {found}. It "
        f"was changed after {record.stage}/{record.task} was committed at {record.finished_at}. "
        f"{_remedy(store, record.key)}"
    )


def _damaged(store: Store, key: str, what: str) -> StoreError:
    return StoreError(f"{store.uri_for(f'{key}/{RECORD}')}: {what}. {_remedy(store, key)}")


def _remedy(store: Store, key: str) -> str:
    return (
        f"Remove the folder {store.uri_for(key)} and run again: only this stage is computed anew."
    )

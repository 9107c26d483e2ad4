"""The ledger of a search: one small JSON file per trial in the stream's storage, written after every step.

It is all that a search remembers. Whoever goes on with a search, or shows it, reads it; nothing else of Ray
Tune's is kept. `search.json` says which search the folder belongs to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipelines.store import Store
from pipelines.stream import Stream
from seekr.errors import ConfigError
from tune.measures import Figures, Value
from tune.search_config import SearchConfig

Kind = Literal["trial", "reference", "confirm"]
State = Literal["open", "finished", "stopped", "failed", "refused"]
SEARCH = "search.json"
REPORT = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What is known of an entry after some tasks.

    Attributes:
        stages: keys of the stages that its courses have by then, over all seeds.
        ran: those that were computed for this entry, in this step; the others were in the store, or
            another trial computed them.
    """

    tasks: int
    figures: Figures
    stages: tuple[str, ...]
    ran: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """That a member of a population went on from another one's model after some tasks."""

    tasks: int
    source: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A trial, a reference, or what is run once more to confirm.

    Attributes:
        key: its file's name without the ending.
        number: of a trial; of a confirmation the trial's that it repeats, -1 for the stream as it is.
        settings: laid over the stream from now on.
        learnt: settings under which each task so far was learnt.
        decided: after how many tasks it was last decided whether, and with what, it goes on.
        order: of the tasks, if not the stream's.
        reason: why it has ended, if not because all tasks are learnt.
    """

    key: str
    kind: Kind
    number: int
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    learnt: tuple[dict[str, Any], ...] = ()
    copied: tuple[Copied, ...] = ()
    decided: int = 0
    order: tuple[str, ...] | None = None
    results: tuple[Result, ...] = ()
    state: State = "open"
    reason: str = ""

    @property
    def tasks(self) -> int:
        """How many tasks it has learnt."""
        return len(self.learnt)

    @property
    def ended(self) -> bool:
        """Whether nothing more is run of it."""
        return self.state != "open"

    @property
    def figures(self) -> Figures:
        """The newest figures."""
        return self.results[-1].figures if self.results else {}

    @property
    def stages(self) -> frozenset[str]:
        """Keys of all stages it has ever had, those it left behind to copy another included."""
        return frozenset(key for result in self.results for key in result.stages)

    def after(self, tasks: int) -> Result | None:
        """Return what is known of it after so many tasks."""
        return next((result for result in self.results if result.tasks == tasks), None)

    def settings_by_task(self, tasks: int) -> list[dict[str, Any]]:
        """Return the settings for each of a number of tasks."""
        return [*self.learnt, *[self.settings] * (tasks - len(self.learnt))]

    def ended_as(self, state: State, reason: str = "") -> Entry:
        """Return the entry when it has ended."""
        return replace(self, state=state, reason=reason)


class Ledger:
    """The entries of a search, and the files that hold them.

    Args:
        store: the stream's.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store, self.folder = store, f"searches/{name}"
        self.entries: dict[str, Entry] = {}

    def open(self, search: SearchConfig, base: Stream, *, begin: bool) -> None:
        """Read what is there.

        Args:
            base: the search's stream; its last stage stands for all that it is made of.
            begin: make the folder if there is nothing.

        Raises:
            ConfigError: the folder belongs to another search, or there is none and `begin` is false.
        """
        path = f"{self.folder}/{SEARCH}"
        own: dict[str, Any] = json.loads(json.dumps(search.bearing))
        own["stream"] = base.stages[-1].fingerprint
        if self.store.stat(path) is None:
            if not begin:
                raise ConfigError(
                    f"search {search.name}: there is nothing in {self.store.uri_for(self.folder)}; "
                    "begin it first: seekr tune SEARCH"
                )
            self.store.write_json(path, own)
        else:
            self._check(search, self.store.read_json(path), own)
        for entry in self._read():
            self.entries[entry.key] = entry

    def put(self, entry: Entry) -> Entry:
        """Write an entry, whole or not at all."""
        self.entries[entry.key] = entry
        self.store.write_json(f"{self.folder}/entries/{entry.key}.json", asdict(entry))
        return entry

    def of(self, kind: Kind) -> list[Entry]:
        """Return the entries of a kind, in the order of their numbers and names."""
        found = [entry for entry in self.entries.values() if entry.kind == kind]
        return sorted(found, key=lambda entry: (entry.number, entry.key))

    def seconds(self) -> dict[str, float]:
        """Return the seconds that each stage of any entry took, by the stage's key."""
        keys = {key for entry in self.entries.values() for key in entry.stages}
        found: dict[str, float] = {}
        for key in sorted(keys):
            if self.store.stat(f"{key}/record.json") is not None:
                found[key] = float(self.store.read_json(f"{key}/record.json")["seconds"])
        return found

    def _read(self) -> Iterator[Entry]:
        for file in self.store.list(f"{self.folder}/entries"):
            if file.path.endswith(".json"):
                yield _entry(self.store.read_json(file.path))

    def _check(self, search: SearchConfig, found: Any, own: Mapping[str, Any]) -> None:
        different = sorted(n for n in {*found, *own} if found.get(n) != own.get(n))
        if not different:
            return
        raise ConfigError(
            f"search {search.name}: {self.store.uri_for(self.folder)} belongs to another search, with "
            f"another {', '.join(different)}; give this one a name of its own, or put it back"
        )


def _entry(content: dict[str, Any]) -> Entry:
    results = tuple(
        Result(
            tasks=result["tasks"],
            figures={
                name: Value(values=tuple(value["values"]), mean=value["mean"], error=value["error"])
                for name, value in result["figures"].items()
            },
            stages=tuple(result["stages"]),
            ran=tuple(result["ran"]),
        )
        for result in content["results"]
    )
    changed: dict[str, Any] = {
        "results": results,
        "seeds": tuple(content["seeds"]),
        "learnt": tuple(content["learnt"]),
        "copied": tuple(Copied(**copied) for copied in content["copied"]),
        "order": None if content["order"] is None else tuple(content["order"]),
    }
    return Entry(**(content | changed))

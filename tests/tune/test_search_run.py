"""Searches that really run: shared stages, freed resources, kills, populations, and the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from pipelines.artifact import StageRecord
from seekr.errors import ConfigError
from tests.pipelines.running import end_shared_cluster, shared_cluster
from tests.tune.searching import WEIGHT, computed, make_search, opened, table
from tune.plan import Plan
from tune.running import room_for, run_search
from tune.sharing import Sharing

pytestmark = pytest.mark.ray
slow = pytest.mark.slow
ASHA = {"by": "asha", "reduction": 2, "first": 2}
# Longer than any search here takes on two busy cores, and short of the time that a test has: waiting for
# lost cores would take for ever.
SECONDS = 540


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    path: Path
    plan: Plan
    told: list[str]
    free_before: float
    free_after: float
    seconds: float


def free_cpus() -> float:
    return float(ray.available_resources().get("CPU", 0.0))


def settled(wanted: float) -> float:
    """Return the free cores, once they are as many as wanted or have had time to be."""
    deadline = time.monotonic() + 30
    while free_cpus() < wanted and time.monotonic() < deadline:
        time.sleep(0.5)
    return free_cpus()


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A search over a distillation weight with more trials than there are places for."""
    folder = tmp_path_factory.mktemp("search")
    space = {WEIGHT: {"log_uniform": [0.1, 1000]}}
    path = make_search(folder, space=space, trials=5, scheduler=ASHA, concurrent=2)
    end_shared_cluster()
    shared_cluster(folder / "stream.yaml")
    before, told, begun = free_cpus(), list[str](), time.monotonic()
    search = opened(path)
    run_search(search, tell=told.append)
    seconds = time.monotonic() - begun
    yield Done(
        path=path,
        plan=search.plan(),
        told=told,
        free_before=before,
        free_after=settled(before),
        seconds=seconds,
    )
    end_shared_cluster()


def test_two_trials_run_and_share_their_first_task(tmp_path: Path) -> None:
    space = {WEIGHT: {"choice": [1.0, 100.0]}}
    path = make_search(
        tmp_path, tasks=2, space=space, trials=2, search={"by": "grid"}, concurrent=1
    )
    shared_cluster(tmp_path / "stream.yaml")
    search, told = opened(path), list[str]()
    run_search(search, tell=told.append)
    plan = search.plan()
    assert [trial.state for trial in plan.ledger.of("trial")] == ["finished", "finished"]
    assert len(told) == 2 and all("all tasks learnt, op" in line for line in told)
    first, second = (trial.results[-1].stages for trial in plan.ledger.of("trial"))
    assert len([key for key in first if key.startswith("train/")]) == 2
    different = {key.partition("/")[0] for key in set(first) ^ set(second)}
    # What the last task leaves for a next one is not begun.
    assert different == {"train", "evaluate"}
    assert len(computed(plan)) == len(set(first) | set(second))


@slow
def test_trials_end_and_give_back_what_they_had(done: Done) -> None:
    trials = done.plan.ledger.of("trial")
    assert len(trials) == 5 and all(trial.state in ("finished", "stopped") for trial in trials)
    assert done.free_after == done.free_before > 0
    assert done.seconds < SECONDS
    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} == {"REMOVED"}


@slow
def test_what_trials_share_was_computed_once_side_by_side(done: Done) -> None:
    keys = computed(done.plan)
    assert len(keys) == len(set(keys))
    store = done.plan.ledger.store
    records = {key: StageRecord.load(store, key) for key in keys}
    assert all(record.attempts == 1 for record in records.values())
    files = {
        str(path.parent.relative_to(store.location.root)) for path in find_records(done.path.parent)
    }
    assert set(keys) == files
    found = Sharing.of_ledger(done.plan.ledger)
    assert found.stages == found.computed == len(keys) < found.asked and found.again == 0
    # Three of five trials at most learn the third task, and the first is learnt once.
    assert found.saved is not None and found.saved > 0.4


def find_records(folder: Path) -> list[Path]:
    return sorted((folder / "store").glob("*/*/*/record.json"))


@slow
def test_the_command_line_shows_the_search_its_best_and_a_stream_to_run(done: Done) -> None:
    status = seekr("tune", "status", str(done.path), "--json")
    entries = {entry["key"]: entry for entry in json.loads(status)["entries"]}
    assert len(entries) == 5 and {e["state"] for e in entries.values()} <= {"finished", "stopped"}
    table_shown = seekr("tune", "status", str(done.path))
    assert "trial 4" in table_shown and "stages stood for" in table_shown
    target = done.path.parent / "elsewhere" / "best.yaml"
    target.parent.mkdir()
    shown = seekr("tune", "best", str(done.path), "--write", str(target))
    best = done.plan.best()[0]
    assert f"trial {best.number} of search weights" in shown
    values = yaml.safe_load(target.read_text())
    assert values["method"]["attention_weight"] == best.settings[WEIGHT]
    # It is the very stream that the trial was: all is there but what a next task will need.
    planned = json.loads(seekr("plan", str(target), "--json"))["stages"]
    missing = {(stage["name"], stage["task"]) for stage in planned if stage["state"] != "reused"}
    last = yaml.safe_load(target.read_text())["tasks"][-1]["name"]
    assert {name for name, _ in missing} == {"sample", "score", "select", "teach"}
    assert all(last in task for _, task in missing)
    page = done.path.parent / "page.html"
    seekr("tune", "report", str(done.path), "--out", str(page))
    assert "<svg" in page.read_text() and "weights" in page.read_text()


@slow
def test_running_a_finished_search_again_computes_nothing(done: Done) -> None:
    before = {path: path.stat().st_mtime_ns for path in find_records(done.path.parent)}
    search = opened(done.path)
    known = table(search.plan())
    told: list[str] = []
    run_search(search, tell=told.append)
    assert told == [] and table(search.plan()) == known
    assert {path: path.stat().st_mtime_ns for path in find_records(done.path.parent)} == before


def seekr(*arguments: str) -> str:
    command = [sys.executable, "-m", "pipelines.cli", *arguments]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"}
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def start(path: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pipelines.cli", "tune", *words, str(path)]
    log = (path.parent / "search.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)


@slow
@pytest.mark.timeout(3 * SECONDS)  # two whole searches, and one that is begun three times
def test_a_search_whose_driver_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    end_shared_cluster()
    values: dict[str, Any] = {
        "trials": 4,
        "scheduler": ASHA,
        "search": {"by": "tpe", "startup": 2},
        "confirm": {"seeds": [3]},
        # Of which a random model has some, so that the tables have something to differ in.
        "changes": {"data.metric": "edit_similarity"},
    }
    whole, cut = make_search(tmp_path / "whole", **values), make_search(tmp_path / "cut", **values)
    assert start(whole).wait(timeout=SECONDS) == 0
    kills, words = 0, ()
    untouched: dict[Path, int] = {}
    for entries in (1, 2, 4):
        run = start(cut, *words)
        while run.poll() is None and len(trained(cut)) < 2 * entries:
            time.sleep(0.2)
        if run.poll() is not None:
            break
        time.sleep(1.0)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        kills, words = kills + 1, ("resume",)
        now = {path: path.stat().st_mtime_ns for path in find_records(cut.parent)}
        assert untouched.items() <= now.items(), "a finished stage was computed again"
        untouched = now
    assert kills == 3
    assert start(cut, "resume").wait(timeout=SECONDS) == 0, (
        tmp_path / "cut/search.log"
    ).read_text()
    after = {path: path.stat().st_mtime_ns for path in find_records(cut.parent)}
    assert untouched.items() <= after.items()
    assert table(opened(cut).plan()) == table(opened(whole).plan())


def trained(path: Path) -> list[Path]:
    return list((path.parent / "store").glob("train/*/*/record.json"))


@slow
def test_a_population_trains_on_from_the_best_ones_models(tmp_path: Path) -> None:
    end_shared_cluster()
    space = {
        "train.learning_rate": {"log_uniform": [1e-5, 3e-2]},
        WEIGHT: {"log_uniform": [0.1, 100]},
    }
    path = make_search(
        tmp_path,
        space=space,
        trials=4,
        scheduler={"by": "pbt", "quantile": 0.25},
        changes={"train.epochs": 4, "data.metric": "edit_similarity"},
    )
    assert start(path).wait(timeout=SECONDS) == 0, (tmp_path / "search.log").read_text()
    plan = opened(path).plan()
    copiers = [entry for entry in plan.ledger.of("trial") if entry.copied]
    assert copiers
    for entry in copiers:
        copied = entry.copied[-1]
        course = plan.courses.open(list(entry.learnt), 0)
        (train,) = [stage for stage in course.stages[copied.tasks] if stage.name == "train"]
        record = StageRecord.load(plan.ledger.store, train.key)
        source = plan.ledger.of("trial")[copied.source].after(copied.tasks)
        assert source is not None
        ref = record.inputs["model"]
        assert f"{ref.stage}/{ref.task}/{ref.fingerprint}" in source.stages


@slow
def test_on_a_cluster_that_is_not_ours_a_search_leaves_nothing_and_asks_for_no_more_than_there_is(
    tmp_path: Path,
) -> None:
    end_shared_cluster()
    context = ray.init(address="local", num_cpus=3, include_dashboard=True, dashboard_port=None)
    try:
        address = context.address_info["gcs_address"]
        space = {WEIGHT: {"choice": [1.0, 100.0]}}
        values: dict[str, Any] = {"space": space, "trials": 2, "search": {"by": "grid"}}
        path = make_search(tmp_path, tasks=2, changes={"ray.address": address}, **values)
        search = opened(path)
        assert room_for(search.courses.base.config) == 1  # a pool's actor, and a task that reads
        run_search(search, tell=lambda _: None)
        states = [trial.state for trial in search.plan().ledger.of("trial")]
        assert states == ["finished", "finished"]
        kept = {file.name for file in (tmp_path / "store/searches/weights").iterdir()}
        # A lease leaves its folder and nothing in it; Tune's own files are gone.
        assert kept == {"search.json", "entries", ".lease"}
        assert list((tmp_path / "store/searches/weights/.lease").iterdir()) == []
        assert settled(3.0) == 3.0
        for changes, told in (
            ({"train.workers": 8}, "the stream needs 8 CPUs at once and the Ray cluster has 3"),
            ({"name": "other"}, "driver_resource: no node has 'nowhere'"),
        ):
            values["changes"] = {"ray.address": address} | changes
            other = make_search(
                tmp_path, tasks=2, name=f"s{len(told)}", driver_resource="nowhere", **values
            )
            with pytest.raises(ConfigError, match=told):
                run_search(opened(other), tell=lambda _: None)
    finally:
        ray.shutdown()

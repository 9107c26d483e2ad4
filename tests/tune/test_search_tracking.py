"""A search in MLflow: a run per entry below the search's own, whatever happens to the server."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.tune.searching import WEIGHT, make_search, opened, run_plan
from tune.ledger import Ledger
from tune.tracking import SearchTracker

# For a few runs in a sqlite file, and for a refused connection to be tried again, on a busy machine.
SECONDS = 400


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A search of which trials were stopped, finished and confirmed."""
    asha = {"by": "asha", "reduction": 2, "first": 2}
    confirm = {"seeds": [5], "best": 1}
    plan = opened(
        make_search(tmp_path_factory.mktemp("search"), trials=4, scheduler=asha, confirm=confirm)
    ).plan()
    run_plan(plan)
    assert {trial.state for trial in plan.ledger.of("trial")} == {"finished", "stopped"}
    return plan.ledger


def runs_of(uri: str) -> list[Run]:
    client = MlflowClient(tracking_uri=uri)
    return client.search_runs([found.experiment_id for found in client.search_experiments()])


def test_mlflow_has_a_run_per_entry_below_the_search_s(ledger: Ledger, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for _ in range(2):  # the second time changes nothing
        tracker = SearchTracker(uri, search="weights", store=ledger.store, warn=pytest.fail)
        tracker.note(ledger.entries)
        assert tracker.close(SECONDS)
    client, runs = MlflowClient(tracking_uri=uri), runs_of(uri)
    (parent,) = [run for run in runs if run.data.tags["seekr.kind"] == "search"]
    assert parent.info.status == "FINISHED"
    children = {
        run.data.tags["seekr.kind"] + " " + str(run.info.run_name): run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert len(children) == len(runs) - 1 == len(ledger.entries) == 6
    for trial in ledger.of("trial"):
        run = children[f"trial trial {trial.number}"]
        assert float(run.data.params[WEIGHT]) == pytest.approx(trial.settings[WEIGHT])
        history = client.get_metric_history(run.info.run_id, "op")
        assert [(m.step, m.value) for m in history] == [
            (result.tasks, result.figures["op"].mean) for result in trial.results
        ]
        assert run.info.status == ("FINISHED" if trial.state == "finished" else "KILLED")
        assert run.data.tags["seekr.state"] == trial.state
        assert run.data.tags.get("seekr.reason", "") == trial.reason
    (as_it_is,) = [run for name, run in children.items() if "the stream as it is" in name]
    assert as_it_is.data.tags["seekr.order"] == "first, reverse, upper"


def test_a_server_that_is_not_there_costs_one_warning(ledger: Ledger) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        uri = f"http://ada:hunter2@127.0.0.1:{closed.getsockname()[1]}"
    warnings: list[str] = []
    tracker = SearchTracker(uri, search="weights", store=ledger.store, warn=warnings.append)
    tracker.note(ledger.entries)
    tracker.note(ledger.entries)
    assert tracker.close(SECONDS) is False
    (warning,) = warnings
    assert "seekr tune resume" in warning and "hunter2" not in warning


def test_a_search_of_which_nothing_is_noted_leaves_no_run(ledger: Ledger, tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    tracker = SearchTracker(
        f"sqlite:///{path}", search="weights", store=ledger.store, warn=pytest.fail
    )
    assert tracker.close()
    assert not path.exists()

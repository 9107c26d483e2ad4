"""Training steps on their way to MLflow while the training runs, and a profile of some of them."""

from __future__ import annotations

import gzip
import json
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from committed import commit_stream
from mlflow import MlflowClient

from pipelines.live_steps import LiveSteps
from pipelines.mlflow_writer import MlflowWriter
from pipelines.monitor import Reporter, start_monitor
from pipelines.profiling import FOLDER, StepProfiler
from pipelines.stage import Stage
from pipelines.store import Store
from pipelines.watching import progress_text
from tests.pipelines.running import end_shared_cluster


def stage_of(record: Any) -> Stage:
    """The stage behind a committed record, inputs apart."""
    stage = Stage(name=record.stage, task=record.task)
    object.__setattr__(stage, "fingerprint", record.fingerprint)
    return stage


def test_steps_logged_live_are_not_logged_again_at_the_stages_end(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "store")
    view = commit_stream(tmp_path / "store", ["sort"], steps=30)
    artifact = next(view.of("train")).artifact
    steps = [
        step | {"at": 1000.0 + step["step"]} for step in artifact.read_json("history.json")["steps"]
    ]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    warnings: list[str] = []
    half = len(steps) // 2
    for attempt, part in enumerate((steps[:half], steps[half - 1 : half + 2])):
        # The second writer is a run that resumed one step back: it logs what is new alone.
        writer = MlflowWriter(uri, stream="demo", store=store.location.shown, warn=warnings.append)
        writer.log_steps(stage_of(artifact.record), part)
        assert attempt or half > 1
    writer.log_stage(artifact)
    client = MlflowClient(tracking_uri=uri)
    (run,) = [
        r
        for r in client.search_runs([e.experiment_id for e in client.search_experiments()])
        if r.data.tags.get("seekr.fingerprint") == artifact.record.fingerprint
    ]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == [step["step"] for step in steps]
    assert [metric.value for metric in history] == [step["loss"] for step in steps]
    assert history[0].timestamp == round((1000 + steps[0]["step"]) * 1000)
    assert run.info.status == "FINISHED" and not warnings


@pytest.mark.ray
def test_steps_reach_the_driver_in_order_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.live_steps._FETCH_SECONDS", 0.0)
    monkeypatch.setattr("pipelines.monitor.STEPS_INTERVAL", 0.01)
    end_shared_cluster()
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        monitor = start_monitor()
        report, live = Reporter(monitor, "train/a/1"), LiveSteps()
        found: list[int] = []
        deadline = time.monotonic() + 30
        sent = 0
        while len(found) < 20 and time.monotonic() < deadline:
            report.add_step({"step": sent, "loss": 1.0})
            sent += 1
            time.sleep(0.02)
            found += [step["step"] for step in live.fetch(monitor).get("train/a/1", [])]
        assert len(found) >= 20 and found == list(range(len(found)))
        assert live.fetch(None) == {}
    finally:
        ray.shutdown()


def test_a_trace_is_stored_beside_the_stages(tmp_path: Path) -> None:
    import torch

    store = Store.open(tmp_path)
    profiler = StepProfiler(store, "train/a/1", (1, 2))
    for step in range(5):
        profiler.before(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        profiler.after(step, 5)
    (path,) = (tmp_path / FOLDER / "train/a/1").iterdir()
    assert path.name == "steps-1-2.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::matmul" for event in events) == 2


def test_a_training_says_how_fast_and_how_large_it_is() -> None:
    numbers = {
        "steps_done": 3,
        "steps": 10,
        "loss": 2.0,
        "grad_norm": 0.512,
        "learning_rate": 1e-5,
        "tokens_per_second": 1234.5,
        "mfu": 0.456,
        "memory_bytes": 3 << 30,
    }
    assert progress_text(numbers, 6.0) == (
        "step 3/10, loss 2.000, norm 0.51, rate 1.0e-05, 1234 tokens/s, MFU 46%, 3 GiB, 6 s, "
        "about 14 s to go"
    )

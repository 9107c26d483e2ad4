"""Ticks on a real Ray: what arrives is learnt once and in order, and the gate keeps back what forgot."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient

from pipelines import cli, tracking
from pipelines.decisions import DecisionLog
from pipelines.stream import open_stream, records_of
from pipelines.watching import Watcher
from tests.pipelines.inboxes import Arriving, arriving
from tests.pipelines.remembered import forms
from tests.pipelines.running import shared_cluster
from tests.pipelines.streams import make_stream
from tests.pipelines.webhook_server import WebhookServer, webhook_server

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
VARIABLE = "SEEKR_TEST_WEBHOOK"
Call = Callable[..., tuple[int, str]]


def rows(name: str, answer: str) -> list[dict[str, str]]:
    """Rows that all have one answer, which a small model learns in seconds, and forgets as fast."""
    source = random.Random(name)
    words = ("".join(source.choices("abcdefgh", k=5)) for _ in range(48))
    return [{"input": f"{name} {word}: ", "output": answer} for word in dict.fromkeys(words)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebhookServer]:
    with webhook_server() as running:
        monkeypatch.setenv(VARIABLE, running.url)
        yield running


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Arriving:
    """No task in the YAML, tests on held-out rows, a gate, alerts, and MLflow in sqlite."""
    for name, value in tracking.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    shared_cluster(make_stream(tmp_path / "other", tasks=1))
    return arriving(
        tmp_path / "stream",
        tasks=0,
        method={"name": "seqft"},
        data={"metric": "exact_match", "validation_rows": 8},
        evaluate={"split": "validation"},
        train={"learning_rate": 0.01, "epochs": 6},
        gate={"min_new_score": 0.9, "max_forgetting": 0.2, "max_mean_forgetting": 0.1},
        alerts={"url_env": VARIABLE, "attempts": 1},
        tracking={"uri": None},
    )


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs `seekr` here; it returns the exit code and what was said, in one line."""

    def call(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["seekr", *map(str, words)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        found = capsys.readouterr()
        assert "warning" not in found.err, found.err
        return code, " ".join(found.out.split())

    return call


def aliases(stream: Arriving) -> dict[str, str]:
    uri = tracking.tracking_uri(None, stream.store)
    assert uri is not None
    client = MlflowClient(tracking_uri=uri)
    return {
        alias: client.get_model_version("small", str(number)).tags["seekr.task"]
        for alias, number in client.get_registered_model("small").aliases.items()
    }


def ran(stream: Arriving) -> list[str]:
    return [key for key in stream.store.read_json("streams/small/last_run.json")["ran"]]


def trained(stream: Arriving) -> dict[str, int]:
    """How often each task was trained, and in which order."""
    found = records_of(open_stream(stream.path))
    return {s.task: record.attempts for s, record in found.items() if s.name == "train"}


@pytest.mark.slow
def test_five_ticks_with_a_malformed_a_duplicate_an_overlap_a_model_that_forgot_and_a_rollback(
    stream: Arriving, server: WebhookServer, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = call("tick", stream.path)
    assert code == 0 and "nothing has arrived in" in said

    # 1: the first task, whose model is the first champion.
    stream.inbox.put_rows("alpha.jsonl", rows("alpha", "aa"))
    code, said = call("tick", stream.path)
    assert code == 0, said
    assert "alpha: accepted, 48 training rows" in said and "it is the first champion" in said
    assert aliases(stream) == {"champion": "alpha", "newest": "alpha"}

    # 2: one more, a duplicate and a malformed one, and another tick while this one is at work.
    stream.inbox.put_rows("beta.jsonl", rows("beta", "aa"))
    stream.inbox.put_rows("alpha-again.jsonl", rows("alpha", "aa"))
    stream.inbox.put("delta.jsonl", '{"input": "a", "output": "b"}\n{"input": "a"')
    overlaps: list[tuple[int, str]] = []
    watch = Watcher.__call__

    def watch_and_tick(self: Watcher, *args: Any) -> None:
        if not overlaps:
            overlaps.append(tick_elsewhere(stream))
        watch(self, *args)

    monkeypatch.setattr(Watcher, "__call__", watch_and_tick)
    code, said = call("tick", stream.path)
    assert code == 0, said
    assert "alpha-again: duplicate" in said and "delta.jsonl:2: malformed JSON" in said
    ((other, told),) = overlaps
    assert other == 0 and "another tick of small is at work" in told, told
    assert [key.split("/")[:2] for key in ran(stream)] == [
        ["ingest", "beta"], ["train", "beta"], ["evaluate", "beta"],
    ]  # fmt: skip
    assert aliases(stream)["champion"] == "beta"

    # 3: what it learns makes it forget the others. Held back; users keep the champion.
    stream.inbox.put_rows("gamma.jsonl", rows("gamma", "zz"))
    code, said = call("tick", stream.path, "--json")
    found = json.loads(said[said.index("{ ") :])
    assert code == 3 and found["decision"]["champion"] == found["decision"]["previous"]
    failed = {(c["bound"], c["of"]) for c in found["decision"]["checks"] if c["holds"] is False}
    assert failed == {
        ("max_forgetting", "alpha"), ("max_forgetting", "beta"), ("max_mean_forgetting", ""),
    }  # fmt: skip
    assert aliases(stream) == {"champion": "beta", "newest": "gamma"}

    # 4: nothing new.
    before = {file.path: file.mtime for file in stream.store.list("train")}
    code, said = call("tick", stream.path)
    assert code == 0 and "nothing new: 3 tasks, all of them learnt" in said
    assert {file.path: file.mtime for file in stream.store.list("train")} == before

    # 5: the malformed file was corrected, and goes behind all that has arrived meanwhile.
    stream.inbox.put_rows("delta.jsonl", rows("delta", "zz"))
    code, said = call("tick", stream.path)
    assert code == 3 and "delta: accepted" in said
    assert trained(stream) == {"alpha": 1, "beta": 1, "gamma": 1, "delta": 1}
    assert stream.verdicts() == [
        ("alpha", "accepted"), ("beta", "accepted"), ("alpha-again", "duplicate"),
        ("delta", "quarantined"), ("gamma", "accepted"), ("delta", "accepted"),
    ]  # fmt: skip
    assert server.events == [
        "promoted", "quarantined", "promoted", "held_back", "held_back",
    ]  # fmt: skip

    by_hand(stream, call)
    code, said = call("tick", stream.path)
    assert code == 0 and server.events[-3:] == ["promoted"] * 3, "told by the next tick"
    assert aliases(stream)["champion"] == "alpha", "the gate undoes nothing"
    forget_a_row(stream, call)


def by_hand(stream: Arriving, call: Call) -> None:
    """Back to a former champion, forward to a model that was held back, and what all commands say."""
    assert call("rollback", stream.path, "--reason", "users complain")[0] == 0
    assert aliases(stream) == {"champion": "alpha", "newest": "delta"}
    assert call("rollback", stream.path, "--reason", "further")[0] == 2, "there is no other"
    assert call("promote", stream.path, "gamma", "--reason", "alpha was retired")[0] == 0
    assert aliases(stream)["champion"] == "gamma"
    code, said = call("promote", stream.path, "gamma", "--reason", "again")
    assert code == 0 and "is the champion already" in said
    code, said = call("champion", stream.path, "--json")
    found = json.loads(said)
    assert found["champion"].startswith("train/gamma/") and len(found["decisions"]) == 6
    assert Path(found["model"]).is_dir()
    code, said = call("status", stream.path)
    assert "champion: the model after gamma" in said and "alpha was retired" in said
    assert "quarantined" in said
    folder = stream.path.parent / "exported"
    assert call("export", stream.path, "champion", "--out", folder)[0] == 0
    note = json.loads((folder / "seekr-origin.json").read_text())
    assert note["task"] == "gamma" and note["lineage"]["root"] == found["champion"]
    code, said = call("lineage", stream.path, "champion")
    assert code == 0 and "gamma arrived from" in said and "held back:" in said
    assert "it is the champion" in said
    page = stream.store.read_bytes("streams/small/report.html").decode()
    assert "<h2>Promotion</h2>" in page and "<h2>Arrivals</h2>" in page
    assert call("rollback", stream.path, "--to", "alpha", "--reason", "after all")[0] == 0
    client = MlflowClient(tracking_uri=tracking.tracking_uri(None, stream.store))
    client.delete_registered_model_alias("small", "champion")
    assert call("lineage", stream.path, "--rebuild")[0] == 0
    assert aliases(stream) == {"champion": "alpha", "newest": "delta"}


def forget_a_row(stream: Arriving, call: Call) -> None:
    """No byte of the store has it afterwards, lineage says so, and nothing is learnt again."""
    found = json.loads(call("rows", stream.path, "--find", "alpha ", "--json")[1])["rows"]
    row = next(row for row in found if row["kind"] == "train")
    secrets = [row["row_id"].encode(), row["text"].partition(": ")[0].encode()]

    def holding() -> set[str]:
        return {
            file.path.partition("/")[0]
            for file in stream.store.list_all()
            for form in forms(file.path, stream.store.read_bytes(file.path))
            if any(secret in form for secret in secrets)
        }

    assert holding() == {"ingest", "streams"}
    before = trained(stream)
    code, said = call("forget", stream.path, row["row_id"], "--yes", "--reason", "asked")
    assert code == 0, said
    assert holding() == set()
    code, said = call("lineage", stream.path, "champion")
    assert "trained on 1 row forgotten on" in said
    assert "alpha: 1 row of the copy forgotten on" in said
    code, said = call("tick", stream.path)
    assert code == 0 and "nothing new: 4 tasks, all of them learnt" in said
    assert trained(stream) == before and holding() == set()
    page = stream.store.read_bytes("streams/small/report.html").decode()
    assert "Rows forgotten" in page and "erased" in page


def tick_elsewhere(stream: Arriving) -> tuple[int, str]:
    """A tick in a process of its own, as a second scheduler would start it."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "tick", str(stream.path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_a_tick_that_fails_is_told_and_the_next_one_goes_on(
    stream: Arriving, server: WebhookServer, call: Call
) -> None:
    stream.inbox.put_rows("alpha.jsonl", rows("alpha", "aa"))
    code, _ = call(
        "tick", stream.path, "--set", "train.learning_rate=1.0e+30", "--set", "train.epochs=1"
    )
    assert code == 1 and server.events == ["failed"]
    assert stream.verdicts() == [("alpha", "accepted")]
    code, said = call("tick", stream.path)
    assert code == 0 and server.events == ["failed", "promoted"], said
    assert DecisionLog(stream.store, "small").read().champion is not None
    assert ray.is_initialized(), "the cluster of the tests was not its own to end"

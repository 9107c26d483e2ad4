"""A look into the inbox, killed anywhere: the next one goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipelines.inboxes import arriving
from tests.pipelines.streams import task_rows

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_killed_between_any_two_steps_of_an_arrival_the_next_look_goes_on(tmp_path: Path) -> None:
    stream = arriving(tmp_path / "stream")
    stream.inbox.put_task("second", "reverse")
    stream.inbox.put("bad.jsonl", '{"input": "a"\n')
    stream.inbox.put_task("third", "first")
    stream.inbox.put_rows("again.jsonl", task_rows("reverse", 50)[:40])
    command = [sys.executable, "-m", "tests.pipelines.crashing_arrivals", str(tmp_path / "stream")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    # Four files copied (opened, filled, named: two steps around each of two calls), four entries.
    assert len(found) == 4 * 4 + 4 * 2 + 1
    for state in found:
        assert state["verdicts"] == [
            ["second", "accepted"], ["bad", "quarantined"], ["third", "accepted"], ["again", "duplicate"],
        ]  # fmt: skip
        assert state["tasks"] == ["upper", "second", "third"]
        assert state["digests"] == found[-1]["digests"]
        assert state["stray"] == [], "whatever was half copied was finished under the same name"
    last = found[-1]
    assert last["temporary"] == [] and last["digests"].count(None) == 2

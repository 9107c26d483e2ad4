"""The planted-fact benchmark's streams, figures and pictures; running it takes minutes and is no test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.planted_facts import show, suite
from pipelines.load import load_config

KNOWN: dict[str, Any] = yaml.safe_load((suite.HERE / "configurations.yaml").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[suite.Run]:
    """All configurations, opened as if the random model had been taught."""
    out = tmp_path_factory.mktemp("planted")
    (lessons,) = suite.write_lessons(out, [3])
    assert load_config(lessons.path).seed == 3
    return suite.write_streams(out, KNOWN, {3: out / "models" / "seed-3"})


def test_every_configuration_opens_as_a_stream_of_its_own(runs: list[suite.Run]) -> None:
    assert [run.configuration for run in runs] == list(KNOWN)
    assert len({run.stream.stages[-1].fingerprint for run in runs}) == len(KNOWN)
    kinds = {run.configuration: {s.name for s in run.stream.stages} for run in runs}
    assert "meta" in kinds["taalm"] and "meta" not in kinds["oracle"]
    assert {"weights"} <= kinds["taalm"] & kinds["oracle"] & kinds["rho1"]
    assert "sample" in kinds["mix-review"]


def test_no_configuration_but_review_trains_on_facts_not_to_forget(runs: list[suite.Run]) -> None:
    for run in runs:
        trained = {
            name
            for stage in run.stream.stages
            if stage.name == "train"
            for name in stage.inputs
            if name.startswith(("data.", "replay."))
        }
        review = {"replay.review"} if run.configuration.endswith("mix-review") else set[str]()
        assert trained == {"data.to_learn"} | review


def row(runs: list[suite.Run], to_learn: list[float], kept: list[float]) -> dict[str, Any]:
    figures = {"to_learn": to_learn, "not_to_forget": kept, "top_accuracy": max(to_learn)}
    figures |= {"epoch": 1, "nf_accuracy": kept[1], "final_accuracy": to_learn[-1]}
    return suite.row_of(runs[0], figures | {"final_nf_accuracy": kept[-1]}, 7, 12.34)


def test_a_level_is_reached_at_the_first_epoch_that_has_it(runs: list[suite.Run]) -> None:
    found = row(runs, [0.1, 0.35, 0.3, 0.5], [0.9, 0.8, 0.7, 0.6])["reached"]
    assert found["0.3"] == {"steps": 7, "not_to_forget": 0.8}
    assert found["0.4"] == found["0.5"] == {"steps": 21, "not_to_forget": 0.6}
    assert row(runs, [0.1, 0.2], [0.9, 0.8])["reached"]["0.3"]["steps"] is None


def test_the_table_says_how_many_seeds_reached_a_level(
    runs: list[suite.Run], tmp_path: Path
) -> None:
    rows = [row(runs, [0.1, 0.45], [0.9, 0.8]), row(runs, [0.1, 0.3], [0.9, 0.6])]
    line = show.markdown(rows).splitlines()[2]
    assert line.startswith("| finetune | 2 | 37.5 ± 7.5 |")
    assert "| 7.0 ± 0.0 | 70.0 ± 10.0 | 7.0 (1 of 2) | 80.0 (1 of 2) | never | never |" in line
    show.curves(rows, tmp_path / "curves.svg")
    show.token_weights([{"tokens": ["a", "b"], "weights": [0.1, 0.9]}], tmp_path / "weights.svg")
    assert all("<svg" in (tmp_path / f"{n}.svg").read_text() for n in ("curves", "weights"))

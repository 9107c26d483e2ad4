"""Streams of published benchmarks: orders and epochs as in the papers, files found, nothing mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from pipelines.benchmarks import benchmark_stream, known_benchmarks, stream_text
from pipelines.cli import app
from pipelines.load import load_config
from pipelines.survey import survey
from seekr.errors import ConfigError, DataError
from tests.pipelines.streams import make_model

HEADER = {"Definition": ["Answer in a word."], "Positive Examples": [], "Negative Examples": []}


def publish(folder: Path, name: str, order: str, suffix: str = "") -> Path:
    """Write files as the benchmark's authors lay them out, with three rows each."""
    for task in known_benchmarks()[name]["orders"][order]["tasks"]:
        place = folder / f"{task}{suffix}"
        place.mkdir(parents=True)
        for part in ("train", "test", "eval"):
            rows = [{"input": f"{part} {task} {i}", "output": f"{i}"} for i in range(3)]
            content: object = HEADER | {"Instances": rows}
            if name == "trace":
                content = [{"prompt": row["input"], "answer": row["output"]} for row in rows]
            (place / f"{part}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", max_positions=2048)


CASES = [(name, order) for name, facts in known_benchmarks().items() for order in facts["orders"]]


@pytest.mark.parametrize(("name", "order"), CASES)
def test_a_written_stream_opens_with_all_tasks_in_order(
    name: str, order: str, tmp_path: Path, model: Path
) -> None:
    facts = known_benchmarks()[name]
    variant = next(iter(facts.get("variants", {})), None)
    root = tmp_path / "data"
    publish(root / facts["variants"][variant] if variant else root, name, order)
    found = benchmark_stream(name, order, root, model, "seqft", variant=variant)
    path = tmp_path / "stream.yaml"
    path.write_text(stream_text(name, found))
    config = load_config(path)
    survey(config)  # everything in it fits together
    assert [task.name for task in config.tasks] == facts["orders"][order]["tasks"]
    assert {task.name for task in config.tasks} == facts["tasks"].keys()
    assert not [t for t in config.tasks if "eval" in t.train + t.test]
    assert config.benchmark is not None and f"order {order}" in config.benchmark
    assert (variant is None) or (f"variant {variant}" in config.benchmark)


def test_trace_has_the_papers_epochs_and_metrics(tmp_path: Path, model: Path) -> None:
    data = publish(tmp_path / "LLM-CL-Benchmark_Reasoning", "trace", "1")
    tasks = benchmark_stream("trace", "1", data, model, "seekr")["tasks"]
    assert [task["epochs"] for task in tasks] == [5, 5, 5, 5, 5, 5, 10, 5]
    metrics = {task["name"]: task["metric"] for task in tasks}
    assert metrics["20Minuten"] == "sari" and metrics["Py150"] == "edit_similarity"
    assert metrics["MeetingBank"] == "rouge_l" and metrics["FOMC"] == "accuracy"


def test_one_number_of_epochs_for_a_whole_order_is_one_field(tmp_path: Path, model: Path) -> None:
    data = publish(tmp_path / "data", "superni-sapt", "1")
    found = benchmark_stream("superni-sapt", "1", data, model, "replay")
    assert isinstance(known_benchmarks()["superni-sapt"]["orders"]["1"]["epochs"], int)
    assert found["train"]["epochs"] == known_benchmarks()["superni-sapt"]["orders"]["1"]["epochs"]
    assert not any("epochs" in task for task in found["tasks"])
    path = tmp_path / "stream.yaml"
    path.write_text(stream_text("superni-sapt", found))
    fewer = load_config(path, ["train.epochs=3"])
    assert fewer.train.epochs == 3 and {task.epochs for task in fewer.tasks} == {None}


def test_seekrs_budgets_fit_the_model(tmp_path: Path, model: Path) -> None:
    data = publish(tmp_path / "data", "superni-sapt", "1")
    method = benchmark_stream("superni-sapt", "1", data, model, "seekr")["method"]
    assert method == {"name": "seekr", "layer_budget": 2, "head_budget": 8}


def test_variants_are_never_guessed_or_mixed(tmp_path: Path, model: Path) -> None:
    reasoning = publish(tmp_path / "LLM-CL-Benchmark_Reasoning", "trace", "1")
    with pytest.raises(ConfigError, match="holds reasoning; choose one with --variant"):
        benchmark_stream("trace", "1", tmp_path, model, "seekr")
    with pytest.raises(ConfigError, match="holds variant reasoning and 5000 is asked for"):
        benchmark_stream("trace", "1", reasoning, model, "seekr", variant="5000")
    with pytest.raises(DataError, match="16 files of TRACE are not below"):
        benchmark_stream("trace", "1", tmp_path, model, "seekr", variant="5000")
    with pytest.raises(ConfigError, match="'200' is no variant of trace; there are reasoning"):
        benchmark_stream("trace", "1", tmp_path, model, "seekr", variant="200")


def test_superni_folders_with_long_names_are_found(tmp_path: Path, model: Path) -> None:
    data = publish(tmp_path / "data", "superni-sapt", "1", suffix="_with_a_long_name")
    tasks = benchmark_stream("superni-sapt", "1", data, model, "replay", first=5)["tasks"]
    assert len(tasks) == 5 and all("_with_a_long_name/" in task["train"] for task in tasks)


def test_tasks_that_are_not_there_are_all_told_and_can_be_left_out(
    tmp_path: Path, model: Path
) -> None:
    data = publish(tmp_path / "data", "long-sequence", "3")
    for gone in ("yahoo/train.json", "yahoo/test.json", "imdb/test.json"):
        (data / gone).unlink()
    with pytest.raises(DataError, match=r"3 files .* imdb: .*/imdb/test.json; yahoo: .*--without"):
        benchmark_stream("long-sequence", "3", data, model, "seekr")
    found = benchmark_stream("long-sequence", "3", data, model, "seekr", without=("imdb", "yahoo"))
    assert len(found["tasks"]) == 13 and "13 of its 15 tasks" in found["benchmark"]
    with pytest.raises(ConfigError, match="'nosuch' is no task of long-sequence"):
        benchmark_stream("long-sequence", "3", data, model, "seekr", without=("nosuch",))


def test_the_command_writes_a_stream_and_refuses_what_is_not_there(
    tmp_path: Path, model: Path
) -> None:
    data = publish(tmp_path / "data", "superni-seekr", "4")
    to = tmp_path / "out.yaml"
    arguments = ["--order", "4", "--data", str(data), "--model", str(model), "--out", str(to)]
    done = CliRunner().invoke(app, ["benchmark", "superni-seekr", *arguments])
    assert done.exit_code == 0, done.output
    assert yaml.safe_load(to.read_text())["tasks"][0]["name"] == "task748"
    refused = CliRunner().invoke(
        app, ["benchmark", "superni-seekr", "--order", "1", *arguments[2:]]
    )
    assert isinstance(refused.exception, ConfigError)
    assert "'1' is no order of superni-seekr; there are 3, 4" in str(refused.exception)
    to.unlink()
    refused = CliRunner().invoke(
        app, ["benchmark", "superni-seekr", *arguments, "--method", "nosuch"]
    )
    assert "'nosuch' is no method; there are seqft" in str(refused.exception)
    assert not to.exists()

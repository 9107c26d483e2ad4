"""What travels with a run to a Ray cluster, what has to be there, and what never goes along."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import runtime_env
from cluster.runtime_env import Luggage, luggage, pins
from pipelines.load import load_config
from pipelines.stream_values import local_paths, read_values
from seekr.errors import ConfigError
from tests.cluster.submitting import seekr_cluster
from tests.pipelines.streams import stream_values, write_task, write_yaml

ROOT = Path(__file__).parents[2]


def packed(stream: Path, *changes: str) -> Luggage:
    values = read_values(stream, changes)
    return luggage(stream, values, local_paths(values))


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    """A stream whose rows lie beside it and whose model lies elsewhere."""
    return stream_in(tmp_path / "here")


def stream_in(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    write_task(folder / "data" / "upper", "upper", train=4, test=2)
    (folder / "seekr-store").mkdir()
    (folder / "seekr-store" / "big").write_bytes(b"x" * 10_000)
    values = stream_values(tasks=1, method={"name": "seqft"})
    model = {"model": {"path": "/models/llama"}}
    return write_yaml(folder / "stream.yaml", values | {"storage": "/mnt/store"} | model | changes)


def test_relative_files_travel_and_absolute_ones_are_expected(stream: Path, tmp_path: Path) -> None:
    found = packed(stream)
    assert set(found.files) == {"data/upper/train.jsonl", "data/upper/test.jsonl"}
    assert found.expected == ("/models/llama",)
    folder = found.pack(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl")} >= set(
        found.files
    )
    config = load_config(folder / "stream.yaml")
    assert config.ray.address == "auto"
    assert Path(config.tasks[0].train) == folder / "data/upper/train.jsonl"
    before = load_config(stream)
    assert config.model_dump(exclude={"ray", "tasks", "data_root"}) == before.model_dump(
        exclude={"ray", "tasks", "data_root"}
    )


def test_rows_are_looked_for_where_the_stream_has_its_data_root(tmp_path: Path) -> None:
    inside = stream_in(
        tmp_path / "inside",
        data_root="data",
        tasks=[{"name": "upper", "train": "upper/train.jsonl", "test": "upper/*.jsonl"}],
    )
    assert set(packed(inside).files) == {"data/upper/train.jsonl", "data/upper/test.jsonl"}
    outside = stream_in(tmp_path / "outside", data_root="/data")
    found = packed(outside)
    assert found.files == {}
    assert "/data/data/upper/train.jsonl" in found.expected


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": {"path": "model"}}, "model.path: model is not in the stream's folder"),
        ({"model": {"path": "../model"}}, "model.path: ../model leads out of the stream's folder"),
        (
            {"storage": "seekr-store"},
            "storage: seekr-store is a relative folder, which would vanish",
        ),
        ({"storage": None}, "storage: seekr-store is a relative folder"),
        ({"tracking": {"uri": "sqlite:///runs.db"}}, "tracking.uri: .* four slashes"),
    ],
)
def test_what_would_not_be_there_is_refused(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        packed(stream_in(tmp_path / "here", **changes))


def test_what_is_too_large_to_travel_is_told_by_name(
    stream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_env, "MOST_BYTES", 100)
    with pytest.raises(ConfigError, match=r"data/upper/train.jsonl has 0; 0 MiB travel"):
        packed(stream)


def test_changes_on_the_command_line_travel_too(stream: Path) -> None:
    found = packed(stream, "train.epochs=3", "model.path=/other/model")
    assert found.values["train"]["epochs"] == 3
    assert found.expected == ("/other/model",)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("storage=s3://KEY:SECRET@bucket/prefix", "storage"),
        ("tracking.uri=https://me:word@mlflow.example", "tracking.uri"),
        ("tasks.0.train=s3://bucket/rows.jsonl?secret_key=abc", "tasks.0.train"),
    ],
)
def test_a_stream_with_a_credential_is_not_submitted(stream: Path, change: str, field: str) -> None:
    told = seekr_cluster("submit", stream, "--address", "http://127.0.0.1:9", "--set", change)
    assert told.code == 2
    assert f"{field} holds what looks like a credential" in told.err
    assert change.partition("=")[2] not in told.err


def test_the_environment_holds_code_stream_and_no_secret(
    stream: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "0123456789abcdef"
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    env = runtime_env.runtime_env(packed(stream).pack(tmp_path / "packed"), grace=30, pip=["a==1"])
    assert token not in yaml.safe_dump(env)
    assert env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "45"}
    assert env["pip"] == ["a==1"]
    assert [Path(item).name for item in env["py_modules"]] == [
        "seekr",
        "pipelines",
        "tune",
        "cluster",
    ]
    for item in env["py_modules"]:
        spec = importlib.util.find_spec(Path(item).name)
        assert spec is not None
        assert Path(str(spec.origin)).parent == Path(item)
    command = runtime_env.entrypoint(30)
    assert command == "exec python -m pipelines.cli run stream.yaml --grace 30"


def test_pins_are_the_versions_that_are_tested(tmp_path: Path) -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    tested = {
        re.sub(r"[-_.]+", "-", name).lower(): version
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE)
    }
    found = dict(item.split("==") for item in pins())
    assert {"torch", "transformers", "pyarrow", "mlflow", "pydantic"} <= set(found)
    assert "ray" not in found
    assert {name: tested.get(name) for name in found} == found


def test_pip_finds_the_pins_complete_and_without_contradiction(tmp_path: Path) -> None:
    path = tmp_path / "pins.txt"
    path.write_text("\n".join(pins()))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "-r", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Would install" not in result.stdout


@pytest.mark.parametrize(
    "address", ["head:8265", "ray://head:10001", "http://", "http://a:b@head:8265"]
)
def test_an_address_that_is_none_of_a_dashboard_is_refused(stream: Path, address: str) -> None:
    told = seekr_cluster("submit", stream, "--address", address)
    assert told.code == 2
    assert "a:b" not in told.err
    assert "--address" in told.err

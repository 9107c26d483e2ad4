"""The stream that pods read: every path is where they find it, and what they could not find is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.render import read_stream, render
from seekr.errors import ConfigError
from tests.cluster.rendered import rendered, stream, values_of

IMAGE = {"cluster": {"storage": {"claim": None}, "image_folders": ["/opt/models"]}}
TASK = {"name": "a", "train": "a.jsonl", "test": "b.jsonl"}


def placed(name: str = "cpu dev", /, **changes: Any) -> dict[str, Any]:
    """The YAML that pods read."""
    for item in rendered(name, **changes).of_kind("ConfigMap"):
        if "stream.yaml" in item["data"]:
            return yaml.safe_load(item["data"]["stream.yaml"])
    raise AssertionError("no stream is rendered")


def test_relative_paths_start_at_the_clusters_folder() -> None:
    found = placed(general={"folder": "evals", "tasks": ["own"]}, cluster={"folder": "/data"})
    assert found["model"]["path"] == "/data/models/llama"
    assert found["general"]["folder"] == "/data/evals"
    assert found["storage"] == "/data/seekr-store"
    assert found["data_root"] == "/data"
    assert found["tasks"][0]["train"] == "data/a/train.jsonl"


def test_a_data_root_is_placed_and_sources_stay_below_it() -> None:
    found = placed(data_root="inbox/2026")
    assert found["data_root"] == "/mnt/seekr/inbox/2026"
    assert found["tasks"][0]["train"] == "data/a/train.jsonl"


def test_addresses_stay_as_they_are() -> None:
    found = placed("elastic_spot.yaml")
    assert found["tasks"][0]["train"] == "s3://ml-platform/tasks/law/train.parquet"
    assert found["storage"] == "s3://ml-platform/seekr/elastic"
    assert found["model"]["path"] == "/opt/models/llama-13b"
    assert "data_root" not in found
    assert found["tracking"]["uri"] == "https://mlflow.example.com"


def test_a_store_on_the_claim_may_be_absolute() -> None:
    assert placed(storage="/mnt/seekr/store")["storage"] == "/mnt/seekr/store"
    assert placed(storage="file:///mnt/seekr/store")["storage"] == "/mnt/seekr/store"


def test_a_local_clusters_size_is_left_behind() -> None:
    assert placed(ray={"num_cpus": 4, "parallel_stages": 3})["ray"] == {
        "address": "auto",
        "parallel_stages": 3,
    }


def test_overrides_are_in_what_pods_read(tmp_path: Path) -> None:
    path = tmp_path / "stream.yaml"
    path.write_text(yaml.safe_dump(values_of("cpu dev")), encoding="utf-8")
    config, text = read_stream(path, ["train.epochs=7", "cluster.cpu_workers.cpu=6"])
    found = render(config, text)
    (stream_map,) = [i for i in found.of_kind("ConfigMap") if "stream.yaml" in i["data"]]
    values = yaml.safe_load(stream_map["data"]["stream.yaml"])
    assert values["train"]["epochs"] == 7
    groups = found.ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert groups[0]["rayStartParams"]["num-cpus"] == "6"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a model on this machine": (
        {"model": {"path": "/home/me/llama"}},
        "model.path is '/home/me/llama'.*Folders that pods have: /mnt/seekr.*image_folders",
    ),
    "a model at home": ({"model": {"path": "~/llama"}}, "model.path is '~/llama'"),
    "a model above the folder": (
        {"model": {"path": "../../llama"}},
        "model.path is '../../llama', which is /llama for the pods",
    ),
    "rows on this machine": (
        {"tasks": [TASK | {"train": "/data/a.jsonl"}]},
        "tasks.0.train is '/data/a.jsonl'",
    ),
    "rows that are relative without a claim": (
        IMAGE | {"model": {"path": "/opt/models/llama"}, "storage": "s3://bucket/x"},
        "data_root is '.', which is /mnt/seekr for the pods.*Folders that pods have: /opt/models",
    ),
    "a store that would die with its pod": (
        IMAGE | {"model": {"path": "/opt/models/llama"}, "data_root": "/opt/models"},
        "storage is 'seekr-store', a folder, and pods share none",
    ),
    "a store that is not on the claim": (
        {"storage": "/var/store"},
        "storage is '/var/store', which is not on the claim at /mnt/seekr",
    ),
    "credentials in the store's address": (
        {"storage": "s3://AKIA:abc%2Fdef@bucket/x"},
        "storage has credentials in its address.*object_store",
    ),
    "credentials among the options": (
        {"storage": "s3://bucket/x?region=a&secret_key=b"},
        "storage has credentials in its address",
    ),
    "credentials in MLflow's address": (
        {"tracking": {"uri": "https://me:secret@mlflow.example.com"}},
        "tracking.uri has credentials.*cluster.secret_env",
    ),
    "tracking in a file": (
        {"tracking": {"uri": "sqlite:///mlflow.db"}},
        "tracking.uri is 'sqlite:///mlflow.db', a file that pods do not share",
    ),
    "no tracking with MLflow": (
        {"tracking": {"uri": "off"}, "cluster": {"mlflow": {"uri": "https://mlflow.example.com"}}},
        "tracking.uri is off and cluster.mlflow is set",
    ),
    "a stream that is too long": (
        {
            "tasks": [
                {"name": f"t{i}", "train": f"{'a' * 200}/{i}", "test": "b"} for i in range(5000)
            ]
        },
        "bytes of YAML and a ConfigMap holds 1000000",
    ),
    "no cluster section": ({"cluster": None}, "has no cluster section.*docs/cluster.md"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pods_could_not_use_is_refused(case: str) -> None:
    changes, expected = REFUSED[case]
    config, text = stream("cpu dev", **changes)
    with pytest.raises(ConfigError) as error:
        render(config, text)
    assert re.search(expected, str(error.value)), error.value
    assert "abc%2Fdef" not in str(error.value)

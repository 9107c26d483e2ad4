"""`seekr cluster render`: files that kustomize takes, replaced by the next rendering, others left alone."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli import app
from cluster.kubernetes_api import MANAGER
from cluster.kustomize import MARK
from cluster.render import Manifests
from seekr.errors import ConfigError
from tests.cluster.rendered import EXAMPLE_NAMES, EXAMPLES, NAMES, manifests_of, stream, values_of

runner = CliRunner()


def by_name(items: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(item["kind"], item["metadata"]["name"]): item for item in items}


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def listed(folder: Path) -> list[dict[str, Any]]:
    """The objects of a kustomization, resources of resources included."""
    values = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    found: list[dict[str, Any]] = []
    for name in values["resources"]:
        path = folder / name
        text = "" if path.is_dir() else path.read_text(encoding="utf-8")
        found += listed(path) if path.is_dir() else [yaml.safe_load(text)]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_overlay_on_the_disk_holds_the_base_and_its_own(name: str, tmp_path: Path) -> None:
    found = manifests_of(name)
    files = found.write(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in files) == list(
        files_of(tmp_path)
    )
    assert all(text.startswith(f"{MARK}\n") for text in files_of(tmp_path).values())
    for overlay, own in found.overlays.items():
        expected = by_name([*found.base, *own])
        assert by_name(listed(tmp_path / "overlays" / overlay)) == expected


@pytest.mark.parametrize("name", ["elastic with spot", "weekly_7b.yaml", "RayCronJob"])
def test_kubectl_builds_the_same_from_every_overlay(name: str, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    found = manifests_of(name)
    found.write(tmp_path)
    for overlay, own in found.overlays.items():
        command = [kubectl, "kustomize", str(tmp_path / "overlays" / overlay)]
        built = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert by_name(list(yaml.safe_load_all(built))) == by_name([*found.base, *own])


def test_rendering_again_changes_nothing(tmp_path: Path) -> None:
    manifests_of("weekly_7b.yaml").write(tmp_path)
    before = files_of(tmp_path)
    manifests_of("weekly_7b.yaml").write(tmp_path)
    assert files_of(tmp_path) == before


def test_what_is_not_needed_any_more_goes_and_what_others_wrote_stays(tmp_path: Path) -> None:
    manifests_of("CronJob").write(tmp_path)
    own = tmp_path / "overlays" / "production" / "kustomization.yaml"
    own.parent.mkdir()
    own.write_text("resources: [../schedule]\n", encoding="utf-8")
    beside = tmp_path / "base" / "notes.yaml"
    beside.write_text("# mine\n", encoding="utf-8")
    manifests_of("cpu dev").write(tmp_path)
    left = files_of(tmp_path)
    assert left.pop("overlays/production/kustomization.yaml") == "resources: [../schedule]\n"
    assert left.pop("base/notes.yaml") == "# mine\n"
    assert not (tmp_path / "overlays" / "schedule").exists()
    fresh = tmp_path / "fresh"
    manifests_of("cpu dev").write(fresh)
    assert left == files_of(fresh)


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path) -> None:
    manifests_of("cpu dev").write(tmp_path)
    taken = tmp_path / "overlays" / "job" / "rayjob-weekly.yaml"
    taken.write_text("kind: RayJob  # by hand\n", encoding="utf-8")
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=r"rayjob-weekly\.yaml is in the way"):
        manifests_of("CronJob").write(tmp_path)
    assert files_of(tmp_path) == before


def test_a_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file; name a folder"):
        manifests_of("cpu dev").write(tmp_path / "out")


@pytest.mark.parametrize("name", EXAMPLE_NAMES)
def test_the_command_renders_every_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["render", str(EXAMPLES / name), "--out", "manifests"])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert (
        f"kubectl apply --server-side --field-manager={MANAGER} -k manifests/overlays/job" in said
    )
    assert ("overlays/schedule" in result.output) == bool(manifests_of(name).scheduled)
    expected = tmp_path / "expected"
    manifests_of(name).write(expected)
    assert files_of(tmp_path / "manifests") == files_of(expected)


def test_the_command_takes_overrides_and_tells_the_secrets(tmp_path: Path) -> None:
    path = tmp_path / "stream.yaml"
    path.write_text(yaml.safe_dump(values_of("external MLflow")), encoding="utf-8")
    out = tmp_path / "out"
    arguments = ["render", str(path), "--out", str(out), "--set", "cluster.name=other"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert (out / "overlays" / "job" / "rayjob-other.yaml").is_file()
    assert "Secret ray-token must exist, with auth_token" in result.output


def test_a_stream_that_cannot_be_rendered_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "stream.yaml"
    values = values_of("cpu dev", model={"path": "/home/me/llama"})
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    result = runner.invoke(app, ["render", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, ConfigError)
    assert not (tmp_path / "out").exists()


def test_the_command_is_one_of_seekrs() -> None:
    project = tomllib.loads((EXAMPLES.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    points = project["project"]["entry-points"]["seekr.commands"]
    assert EntryPoint("cluster", points["cluster"], "seekr.commands").load() is app


def test_manifests_are_found_by_kind() -> None:
    found = manifests_of("CronJob")
    assert isinstance(found, Manifests)
    assert found.of_kind("RayJob") == (found.ray_job,)
    assert [item["kind"] for item in found.scheduled] == ["ConfigMap", "CronJob"]
    assert stream("CronJob")[0].name == "weekly"

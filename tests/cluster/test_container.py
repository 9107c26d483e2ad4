"""The image: what its Dockerfile must say is read here everywhere; building and using it needs an engine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
SECRET = re.compile(r"token|secret|passw|credential|api_?key|access_?key", re.IGNORECASE)
# Files of the build's context that nobody but the image needs would be a leak, or make it large.
KEPT_OUT = (
    *(".git/config", ".venv/bin/python", "tests/conftest.py", "examples/superni_tiny.yaml"),
    *("seekr-store/train/x/model.safetensors", "benchmarks/machine.py", "docs/methods.md", ".env"),
    *("pipelines/__pycache__/config.cpython-311.pyc", "mlflow.db"),
)


@dataclass(frozen=True, slots=True)
class Instruction:
    word: str
    rest: str
    stage: int


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a Dockerfile, continued lines joined, each with the number of its stage."""
    kept = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(kept))
    stage = 0
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        stage += word == "FROM"
        yield Instruction(word, rest.strip(), stage)


FOUND = list(instructions(DOCKERFILE.read_text(encoding="utf-8")))
LAST = max(found.stage for found in FOUND)


def of(word: str, stage: int | None = None) -> list[str]:
    return [i.rest for i in FOUND if i.word == word and stage in (None, i.stage)]


def arguments() -> dict[str, set[str]]:
    """Defaults of the build's arguments; one that is declared in several stages may have several."""
    found: dict[str, set[str]] = {}
    for rest in of("ARG"):
        name, _, default = rest.partition("=")
        found.setdefault(name, set()).add(default)
    return found


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_every_base_image_is_one_argument_with_a_full_version() -> None:
    assert LAST > 1, "tools that build must not be in the image"
    assert {rest.split()[0] for rest in of("FROM")} == {"${BASE}"}
    (base,) = arguments()["BASE"]
    assert re.fullmatch(r"python:\d+\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", base)


def test_python_is_one_that_the_package_and_its_pins_are_for() -> None:
    (base,) = arguments()["BASE"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    version = re.search(r":(\d+\.\d+)\.", base)
    assert version is not None
    assert project["requires-python"] == f">={version[1]}"
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"Python {version[1]}" in pinned.splitlines()[0]


def test_rays_version_is_the_pinned_one_in_every_stage() -> None:
    assert arguments()["RAY_VERSION"] == {pins()["ray"]}


def test_the_manifests_ask_for_the_same_ray_user_and_home() -> None:
    manifests = pytest.importorskip("cluster.versions", reason="no manifests are rendered yet")
    names = pytest.importorskip("cluster.names")
    settings = pytest.importorskip("pipelines.cluster_config")
    assert arguments()["RAY_VERSION"] == {manifests.VERSIONS.ray}
    assert f"HOME={names.HOME}" in " ".join(of("ENV", LAST)).split()
    assert of("USER", LAST)[-1].split(":")[0] == str(
        settings.ClusterConfig.model_fields["user"].default
    )


def test_all_that_is_installed_is_pinned() -> None:
    installs = [run for run in of("RUN") if "pip install" in run]
    assert installs
    for run in installs:
        for command in re.findall(r"pip install[^&;]*", run):
            assert "-c constraints.txt" in command


def test_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = arguments()["EXTRAS"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"]) - {"dev", "benchmarks"}


def test_it_runs_as_a_user_with_a_number_who_is_not_root() -> None:
    *_, user = of("USER", LAST)
    uid, gid = map(int, user.split(":"))  # Kubernetes can judge numbers alone
    assert uid > 0 and gid > 0
    made = " ".join(of("RUN", LAST))
    assert f"--uid {uid}" in made and f"--gid {gid}" in made
    last_run = max(n for n, found in enumerate(FOUND) if found.word in ("RUN", "COPY"))
    last_user = max(n for n, found in enumerate(FOUND) if found.word == "USER")
    assert last_user > last_run


def test_no_secret_goes_into_it() -> None:
    for rest in of("ARG") + of("ENV") + of("LABEL"):
        names = [name for name, _ in re.findall(r"([\w.]+)=(\"[^\"]*\"|\S*)", rest)]
        assert not [name for name in names if SECRET.search(name)]
        assert "://" not in rest or "@" not in rest


def test_nothing_is_taken_in_its_newest_version_or_from_an_address_without_a_check() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert "latest" not in text and not of("ADD")
    assert not re.search(r"\b(curl|git clone)\b|wget +-", text)


def test_what_is_copied_is_there_and_in_the_builds_context() -> None:
    copied = [rest for rest in of("COPY") if not rest.startswith("--from=")]
    sources = [source for rest in copied for source in rest.split()[:-1]]
    assert {"pyproject.toml", "constraints.txt", "seekr", "pipelines", "tune", "cluster"} <= set(
        sources
    )
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source


@pytest.mark.parametrize("path", KEPT_OUT)
def test_what_the_image_is_not_made_of_stays_out_of_the_context(path: str) -> None:
    assert ignored(path)


def ignored(path: str) -> bool:
    """Whether .dockerignore leaves a file out: the last pattern that fits it or a folder of it decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(.*/)?")
        if re.fullmatch(pattern.replace(r"\*", "[^/]*") + "(/.*)?", path):
            out = not line.startswith("!")
    return out


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_a_stream_runs_in_the_image_without_rights_and_with_a_read_only_root() -> None:
    engine = os.environ.get("ENGINE", "docker")
    if shutil.which(engine) is None:
        pytest.skip(f"no {engine} here; ENGINE names another one")
    asked = subprocess.run([engine, "info"], capture_output=True, text=True, check=False)
    if asked.returncode:
        pytest.skip(f"{engine} does not answer: {(asked.stderr or asked.stdout).strip()[-200:]}")
    done = subprocess.run(
        ["cluster/smoke_test.sh"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

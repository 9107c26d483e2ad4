"""The page for whoever is on call, held against the code: its YAML, its commands, its names, its messages."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import typer
import yaml

from cluster.needed import needed_secrets
from cluster.render import Manifests, read_stream, render
from cluster.versions import VERSIONS
from pipelines.cli import app
from tests.cluster.test_cluster_policy import of_pod

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
KUBERNETES = "1.33"
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
MANIFESTS = [block for block in map(yaml.safe_load, BLOCKS) if "apiVersion" in block]
# What ends a command on its line; `...` stands for a verb.
ENDS = {"|", "&&", ";", ">", "&", "||"}
# What of a message differs from one time to the next, or is put together where it is printed.
STANDS_FOR = re.compile(
    r"\.\.\.|\bN\b|(?:train/)?week-2026-49|s3://|\bseekr\b|weekly|\d[\d.]*|[Rr]unning|GPUs?|Tried|"
    r"progress\.json|_SUCCESS|is held back"
)
# Words of messages that Kubernetes, KubeRay, Ray or torch print.
NOT_OURS = re.compile(
    r"Insufficient|exceeded quota|violates|unbound|not found$|have been failing|Watchdog|has passed|"
    r"EmptyDir|KubeRay|Deadline|Submission|AppFailed"
)


def commands(text: str) -> Iterator[list[str]]:
    """Arguments of every `seekr ...` in a block, and of those between backticks that name a stream."""
    blocks = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^ {4}(?:.*? )?(seekr .*)$", blocks, re.MULTILINE)
    for line in (*lines, *re.findall(r"`(?:desk )?(seekr [^`]*[.]yaml[^`]*)`", text)):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in lexer:
            if word in ENDS:
                break
            words.append(word)
        if "..." not in words:
            yield words[1:]


def command_line() -> Any:
    """The command line, with the commands that other packages add."""
    found: Any = typer.main.get_command(app)
    for point in entry_points(group="seekr.commands"):
        found.commands[point.name] = typer.main.get_command(point.load())
    return found


def parse(command: Any, words: list[str]) -> None:
    """Parse a command's arguments as the command line does, and run nothing."""
    context = command.make_context("seekr", list(words))
    if hasattr(command, "commands"):
        _, inner, rest = command.resolve_command(context, words)
        parse(inner, rest)


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page's stream, as a file."""
    (text,) = (block for block in BLOCKS if "apiVersion" not in yaml.safe_load(block))
    path = tmp_path_factory.mktemp("operations") / "weekly.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def manifests(stream: Path) -> Manifests:
    return render(*read_stream(stream))


def test_every_command_of_the_page_is_one() -> None:
    found = list(commands(PAGE))
    assert len(found) > 40
    whole = command_line()
    for words in found:
        parse(whole, words)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    for words in (["cluster", "submit", "weekly.yaml", "--forever"], ["tidy", "weekly.yaml"]):
        with pytest.raises(Exception, match=r"No such (option|command)"):
            parse(command_line(), words)


def test_the_stream_has_all_that_a_week_needs_and_ticks(manifests: Manifests) -> None:
    assert manifests.ray_job["spec"]["entrypoint"].startswith("seekr tick ")
    assert set(manifests.overlays) == {"job", "cluster", "schedule"}
    for path in re.findall(r"`manifests/(\S+\.yaml)`", PAGE):
        part, name = path.split("/")[0], path.rpartition("/")[2]
        items = manifests.base if part == "base" else manifests.overlays[path.split("/")[1]]
        assert name in {f"{i['kind'].lower()}-{i['metadata']['name']}.yaml" for i in items}, path


def test_the_page_makes_the_secrets_that_are_needed_with_their_keys(manifests: Manifests) -> None:
    text = re.sub(r"\\\n\s*", " ", PAGE)
    made = {
        name: tuple(sorted(re.findall(r"--from-literal=([\w-]+)=", rest)))
        for name, rest in re.findall(r"create secret generic (\S+) (.*)", text)
    }
    made |= dict.fromkeys(
        re.findall(r"create secret docker-registry (\S+)", text), (".dockerconfigjson",)
    )
    assert made == needed_secrets(manifests.all)


def test_kubernetes_takes_the_pages_own_manifests() -> None:
    assert [item["kind"] for item in MANIFESTS] == ["PersistentVolumeClaim", "Pod"]
    for item in MANIFESTS:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


def test_the_desk_has_no_rights_and_sees_what_the_runs_pods_see(manifests: Manifests) -> None:
    desk = MANIFESTS[1]
    assert list(of_pod("desk", desk["spec"])) == []
    head = manifests.ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    own, there = desk["spec"]["containers"][0], head["containers"][0]
    assert desk["metadata"]["namespace"] == manifests.ray_job["metadata"]["namespace"]
    assert own["image"] == there["image"]
    assert desk["spec"]["securityContext"] == head["securityContext"]
    assert desk["spec"]["imagePullSecrets"] == head["imagePullSecrets"]
    assert {"name": desk["spec"]["serviceAccountName"]}.items() <= {
        "name": manifests.of_kind("ServiceAccount")[1]["metadata"]["name"]
    }.items()
    assert all(item in there["env"] for item in own["env"])
    places = {item["name"]: item["mountPath"] for item in there["volumeMounts"]}
    for item in own["volumeMounts"]:
        if item["name"] != "scratch":
            assert places[item["name"]] == item["mountPath"]
    volumes = {item["name"]: item for item in head["volumes"]}
    assert all(volumes[v["name"]] == v for v in desk["spec"]["volumes"] if v["name"] != "scratch")


def test_the_pages_versions_and_objects_are_those_that_are_rendered(manifests: Manifests) -> None:
    postgres = VERSIONS.postgres.partition("-")[0]
    for version in (VERSIONS.ray, VERSIONS.kuberay, VERSIONS.mlflow, postgres):
        assert re.search(rf"(?<![\d.]){re.escape(version)}(?![\d.])", PAGE), version
    assert set(re.findall(r"--version (\S+)", PAGE)) == {VERSIONS.kuberay}
    names = {f"{item['kind'].lower()}/{item['metadata']['name']}" for item in manifests.all}
    told = set(re.findall(r"\b(deployment|statefulset|service)/(weekly[\w-]*)", PAGE))
    assert told
    assert {f"{kind}/{name}" for kind, name in told} <= names
    build = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    arguments = set(re.findall(r"^ARG (\w+)", build, re.MULTILINE))
    assert {"VARIANT", "BASE", "EXTRAS", "TORCH_CPU_INDEX"} <= arguments
    assert set(re.findall(r"--build-arg (\w+)=", PAGE)) <= arguments


def test_the_messages_that_the_page_quotes_are_printed_somewhere() -> None:
    folders = ("pipelines", "cluster", "seekr")
    sources = [path.read_text() for name in folders for path in (ROOT / name).rglob("*.py")]
    code = " ".join(re.sub(r'"\s*\n\s*f?"', "", text) for text in sources)
    section = PAGE.partition("## 5. ")[2].partition("## 6. ")[0]
    cells = [row.split("|")[1] for row in section.splitlines() if row.startswith("| ")]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    words = [text for text in quoted if len(text.split()) > 4 and not NOT_OURS.search(text)]
    assert len(words) > 30
    for text in words:
        parts = STANDS_FOR.split(text)
        longest = max((part.strip(" ().,;:") for part in parts), key=len)
        assert longest in code, f"{text!r}: nothing prints {longest!r}"

"""The rules of the layout that a reviewer would otherwise have to remember.

Imports are read from the syntax tree, those inside functions and under TYPE_CHECKING included, so
that a rule cannot be passed by importing late.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("seekr", "pipelines", "tune", "cluster")
FORBIDDEN = {
    "seekr": ("ray", "mlflow", "pyarrow", "pipelines", "tune", "cluster"),
    "pipelines": ("ray.tune", "tune", "cluster"),
    "tune": ("cluster",),
    "cluster": ("ray", "tune"),
}
# The YAML's schema, and what is read off it: nothing that needs Ray.
CLUSTER_MAY_IMPORT = (
    *("pipelines.config", "pipelines.load", "pipelines.section", "pipelines.demand"),
    *("pipelines.cluster_config", "pipelines.cluster_services", "pipelines.cluster_values"),
    *("pipelines.cluster_rules", "pipelines.cluster_layout", "pipelines.stream_values"),
    *("pipelines.continual_config", "pipelines.provenance"),
)
# The client of Ray's Jobs API, imported where a command asks for it.
CLUSTER_MAY_USE_OF_RAY = ("ray.job_submission", "ray.exceptions")
MAX_LINES = 350
# A folder of the machine this is developed on. Spelt so that this file does not contain it.
MACHINE_PATH = re.compile(r"(?<![\w.}~-])/" + r"work/")

MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; `from a import b` may mean the module a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violations(source: str, package: str) -> list[str]:
    """Imports in `package`'s code that point the wrong way."""
    top = package.partition(".")[0]
    found = []
    for line, name in imports_of(source, package):
        wrong = any(is_within(name, module) for module in FORBIDDEN[top])
        if top == "cluster" and is_within(name, "pipelines"):
            wrong = not any(is_within(name, module) for module in CLUSTER_MAY_IMPORT)
        if top == "cluster" and is_within(name, "ray"):
            wrong = not any(is_within(name, module) for module in CLUSTER_MAY_USE_OF_RAY)
        if wrong:
            found.append(f"line {line}: {name}")
    return found


def tracked_files() -> list[Path]:
    """What git tracks or would track."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_there_are_modules_to_check() -> None:
    assert {path.relative_to(ROOT).parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_imports_point_one_way(path: Path) -> None:
    package = ".".join(path.relative_to(ROOT).parent.parts)
    assert violations(path.read_text(encoding="utf-8"), package) == []


@pytest.mark.parametrize("path", MODULES, ids=shown)
def test_a_module_says_why_it_exists_and_stays_small(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)), "no module docstring"
    assert len(source.splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("package", "source", "wrong"),
    [
        ("seekr", "import pyarrow.parquet as pq", "line 1: pyarrow.parquet"),
        ("seekr.methods", "def f():\n    from ray import data", "line 2: ray.data"),
        ("seekr", "from pipelines import store", "line 1: pipelines.store"),
        ("seekr", "import rayon, pyarrows", None),
        ("pipelines", "from ray import train, tune", "line 1: ray.tune"),
        ("pipelines", "import ray.tune.search", "line 1: ray.tune.search"),
        ("pipelines", "import ray, mlflow\nfrom seekr import errors", None),
        ("pipelines", "from . import tune", None),
        ("tune", "from ray import tune\nfrom pipelines import graph", None),
        ("tune", "import cluster.manifests", "line 1: cluster.manifests"),
        ("cluster", "from pipelines.config import Stream", None),
        ("cluster", "from pipelines import config", None),
        ("cluster", "from pipelines import store", "line 1: pipelines.store"),
        ("cluster", "import pipelines", "line 1: pipelines"),
        ("cluster", "import ray", "line 1: ray"),
        ("cluster", "from ray import job_submission, data", "line 1: ray.data"),
    ],
)
def test_the_walk_sees_what_it_should(package: str, source: str, wrong: str | None) -> None:
    assert violations(source, package) == ([wrong] if wrong else [])


def test_cluster_is_imported_where_ray_is_not_installed() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if path.is_relative_to(ROOT / "cluster")
    ]
    code = f"import sys; sys.modules['ray'] = None\nimport {', '.join(names)}"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_who_only_looks_at_a_stream_or_a_search_does_not_wait_for_what_computes() -> None:
    looking = "pipelines.stream, pipelines.tables, pipelines.report, tune.search, tune.tables"
    slow = ("ray", "mlflow", "peft", "deepspeed", "nltk")
    code = f"import sys, {looking}\nprint(*sorted(sys.modules.keys() & {set(slow)}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, ""), result.stderr


def test_the_commands_about_clusters_are_there_without_ray_and_torch() -> None:
    heavy = ["ray", "torch", "kubernetes"]
    code = (
        f"import sys, cluster.cli, cluster.trigger\nprint([m for m in {heavy} if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    found = [
        shown(path)
        for path in tracked_files()
        if MACHINE_PATH.search(path.read_text(encoding="utf-8", errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize(
    ("text", "hit"), [("cd /{}/main", True), ("'/{}/x'", True), ("s3://b/{}/x", False)]
)
def test_the_machines_path_is_told_from_others(text: str, hit: bool) -> None:
    assert bool(MACHINE_PATH.search(text.format("work"))) is hit

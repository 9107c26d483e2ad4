"""What the documents say, held against the code: files, commands, fields, and which fields bear identity.

The graph is the judge of identity: a field of the YAML is changed in a real small stream, and the
stages' fingerprints either move or do not.
"""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.planted_facts.model import word_tokenizer
from pipelines.cli import app
from pipelines.config import StreamConfig
from pipelines.load import load_config
from pipelines.stream import open_stream
from seekr.methods import METHODS
from seekr.methods.seekr import SEEKR
from seekr.taalm.network import TrainAttention
from tests.pipelines.documents import ATTENTION, make_documents
from tests.pipelines.streams import make_stream
from tune.measures import known_measures
from tune.search_config import SearchConfig

ROOT = Path(__file__).parents[1]
PACKAGES = ("seekr", "pipelines", "tune", "cluster")
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SETTINGS = runpy.run_path(str(ROOT / "docs" / "write_configuration.py"))
FIELDS = [
    pytest.param(heading, row, id=f"{heading}/{row.name}")
    for heading, model in SETTINGS["SECTIONS"]
    for row in SETTINGS["rows_of"](model)
    if not heading.startswith("cluster")  # all of it at once, as stream/cluster
]
# Another value of the fields that hold text or nothing; {folder} is a copy of the stream's data.
OTHERS = {
    "stream/name": "other",
    "stream/data_root": "{folder}",
    "stream/storage": "{folder}/elsewhere",
    "model/path": "{folder}/model",
    "method: {name: sapt}/targets": "[k_proj]",
    "data/template": "'{input} ?'",
    "data.columns/input": "input",
    "data.columns/output": "output",
    "data.columns/definition": "input",
    "tasks[]/name": "other",
    "tasks[]/train": "{folder}/data/upper/train.jsonl",
    "tasks[]/test": "{folder}/data/upper/test.jsonl",
    "tasks[]/columns": {"input": "input"},
    "tasks[]/template": "'{input} ?'",
    "tasks[]/truncate": "head",
    "tasks[]/metric": "accuracy",
    "replay/generator": {"epochs": 2},
    "train/lora": {"rank": 4},
    "train/profile_steps": [1, 2],
    "tracking/uri": "sqlite:///other.db",
    "stream/cluster": {"image": "seekr:1", "storage": {"claim": {"size": "1Gi"}}},
    "ray/address": "auto",
    "stream/benchmark": "another",
    "general/tasks": ["boolq"],
    "general/folder": "{folder}/data",
    "data.columns/text": "task_descriptive",
    "data.columns/focus": "subject",
    "probes[]/name": "other",
    "probes[]/data": "{folder}/data/new.jsonl",
    "probes[]/sentence": "task_schematic",
    "probes[]/answer": "subject",
    "probes[]/role": "watched",
    "stream/token_weights": {"by": "focus"},
    "token_weights/network": "{folder}/network",
    "token_weights/model": "{folder}/model",
    "token_weights.meta/pairs": "{folder}/data/meta.jsonl",
    "token_weights.meta/exclude": ["{folder}/data/new.jsonl"],
    "token_weights.meta/lora": {"rank": 2},
    "token_weights.meta/inner_lora": {"rank": 2},
    "token_weights.meta.columns/document": "masked_evidence",
    "token_weights.meta.columns/sentence": "task_descriptive",
    "token_weights.meta.columns/answer": "subject",
    "replay/review": "{folder}/data/upper/train.jsonl",
    "stream/tasks_from": "{folder}/data/*",
    "stream/gate": {"min_new_score": 0.5},
    "stream/alerts": {"url_env": "ALERTS"},
    "gate/against": "champion",
    "alerts/url_env": "OTHER_ALERTS",
    "alerts/url_file": "{folder}/secret",
    "alerts/events": ["failed"],
}
# What a stream has to have before a field bears anything, by section or field; {own} is its folder.
BASES = {
    "general": ["general.tasks=[piqa]", "general.folder={own}/data"],
    "evaluate/split": ["data.validation_rows=5"],
    "replay/borrowed": ["data.template='say {input}'"],
    "replay/review": ["replay.review={own}/data/upper/train.jsonl"],
    "token_weights/network": [
        "token_weights={by: train_attention, network: '{own}/network'}",
    ],
    "token_weights/model": ["token_weights.model={own}/model"],
    "token_weights.meta/exclude": ["token_weights.meta.exclude=['{own}/data/new.jsonl']"],
    "gate": ["gate.max_forgetting=0.5"],
    "gate/max_general_loss": ["gate.max_forgetting=0.5", "general.tasks=[piqa]"],
    "gate/min_new_gain": ["gate.max_forgetting=0.5", "evaluate.forward_transfer=true"],
    "alerts": ["alerts.url_env=ALERTS"],
    "alerts/url_file": ["alerts.url_file={own}/secret"],
}


# Sections that a stream lacks by default: what they are given as a whole.
OPTIONAL = {
    "replay.generator": {"epochs": 2, "temperature": 0.5},
    "train.lora": {"rank": 4, "alpha": 3.0, "dropout": 0.1, "targets": ["q_proj"]},
    "train.workers": {"min": 1, "max": 2},
}

# Fields and sections that bear nothing on most methods, and a stream that they bear on.
BEARING = {
    "replay/accept": "opr",
    "replay/rejected": "opr",
    "replay/review": "replay",
    "replay/generator": "sapt",
    "replay.generator": "sapt",
    "stream/token_weights": "plain documents",
} | dict.fromkeys(
    (
        *("data.columns/text", "data.columns/focus", "probes[]"),
        *("token_weights", "token_weights.meta", "token_weights.meta.columns"),
    ),
    "documents",
)


def files_in_tree() -> Iterator[tuple[str, str]]:
    """Path and text of every line of README's tree; folders end in a slash."""
    block = README.partition("## Files")[2].split("```")[1]
    folders: list[str] = []
    for line in block.strip().splitlines()[1:]:
        found = re.fullmatch(r"((?:│   |    )*)[├└]── (\S+)(?: +(.*))?", line)
        assert found, line
        indent, name, text = found.groups()
        folders = folders[: len(indent) // 4]
        yield "".join(folders) + name, text or ""
        if name.endswith("/"):
            folders.append(name)


def yaml_blocks() -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)]


def changes(heading: str, row: Any, config: StreamConfig, folder: Path) -> list[str]:
    """Overrides that give one field another valid value."""
    if heading.startswith("method") and row.name == "name":
        return [f"method={{name: {'replay' if config.method.name == 'seqft' else 'seqft'}}}"]
    if heading in OPTIONAL:
        return [f"{heading}={json.dumps(OPTIONAL[heading])}"]
    section = f"{heading.partition(':')[0].replace('[]', '.0')}." if heading != "stream" else ""
    value: Any = config
    for part in f"{section}{row.name}".split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part)
    other = OTHERS.get(f"{heading}/{row.name}", another(value, row.allowed))
    text = (other if isinstance(other, str) else json.dumps(other)).replace("{folder}", str(folder))
    override = f"{section}{row.name}={text}"
    return ["replay.ratio=null", override] if override.startswith("replay.rows") else [override]


def another(value: Any, allowed: str) -> Any:
    """Another value than this of a choice, a switch or a number; 9 or 0.25 in place of null."""
    if isinstance(value, bool):
        return not value
    if choices := re.findall(r"`(\w+)`", allowed):
        other = next(choice for choice in choices if choice != str(value))
        return int(other) if isinstance(value, int) else other
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float) and value:
        return value / 2
    return 9 if allowed.startswith("integer") else 0.25


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """One stream per method and two about documents, each with the folder of a copy of its data."""
    folder = tmp_path_factory.mktemp("streams")
    small = {
        "seekr": {"layer_budget": 1, "head_budget": 2, "query_budget": 8},
        "recadam": {"pull_weight": 100.0},
    }
    found = {
        name: make_stream(
            folder / name,
            method={"name": name} | small.get(name, {}),
            teach={"logits_kept": None} if name == "derpp" else None,  # logit_loss may be mse
            train={"lora": {"rank": 2}} if name == "olora" else {},
            # Prompts take positions, of which the model has 64.
            data={"max_length": 24} if METHODS[name].needs.addition else {},
        )
        for name in METHODS
    }
    copy = make_stream(folder / "copy").parent
    pairs = {name: (path, copy) for name, path in found.items()}
    for name, changes in (("documents", {"token_weights": ATTENTION}), ("plain documents", {})):
        paths = make_documents(folder / name, **changes), make_documents(folder / f"{name} copy")
        for path in paths:
            network = TrainAttention.start(path.parent / "model")
            network.save(path.parent / "network")
            word_tokenizer().save_pretrained(path.parent / "network")
        pairs[name] = paths[0], paths[1].parent
    return pairs


def test_the_configuration_page_is_up_to_date() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == SETTINGS["render"](), "run: python docs/write_configuration.py"


def test_the_tables_of_the_training_page_are_up_to_date() -> None:
    tables = runpy.run_path(str(ROOT / "docs" / "write_training_tables.py"))
    written = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert set(re.findall(r"<!-- table: (\w+) -->", written)) == set(tables["TABLES"])
    assert written == tables["render"](written), "run: python docs/write_training_tables.py"


def test_the_configuration_page_has_a_table_for_every_section() -> None:
    sections = {model.__name__ for _, model in SETTINGS["SECTIONS"]}
    defined = set(StreamConfig.model_json_schema()["$defs"]) | {"StreamConfig"}
    assert sections == defined


@pytest.mark.parametrize(("heading", "row"), FIELDS)
def test_a_field_bears_what_the_page_says(
    heading: str, row: Any, streams: dict[str, tuple[Path, Path]]
) -> None:
    name = heading.partition("{name: ")[2].rstrip("}")
    name = name or BEARING.get(f"{heading}/{row.name}", BEARING.get(heading, "seekr"))
    path, folder = streams[name]
    basis = BASES.get(f"{heading}/{row.name}", BASES.get(heading, []))
    basis = [text.replace("{own}", str(path.parent)) for text in basis]
    before = open_stream(path, basis)
    after = open_stream(path, [*basis, *changes(heading, row, before.config, folder)])
    moved = {stage.fingerprint for stage in before.stages} != {s.fingerprint for s in after.stages}
    assert before.config != after.config
    assert moved == (row.kind == "identity")


def test_nothing_about_a_cluster_bears_identity() -> None:
    sections = [pair for pair in SETTINGS["SECTIONS"] if pair[0].startswith("cluster")]
    kinds = {row.kind for _, model in sections for row in SETTINGS["rows_of"](model)}
    assert len(sections) > 15
    assert kinds == {"execution"}


def test_the_cluster_sections_in_the_documents_are_valid() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert len(blocks) == 2
    stream = yaml_blocks()[0]
    for block in blocks:
        assert StreamConfig.model_validate(stream | block).cluster is not None


def test_every_file_in_the_tree_of_the_readme_exists_and_is_described() -> None:
    for path, text in files_in_tree():
        assert text, f"{path} has no description"
        found = ROOT / path
        assert found.is_dir() if path.endswith("/") else found.is_file(), f"{path} does not exist"


def test_every_module_is_in_the_tree_of_the_readme() -> None:
    listed = {path for path, _ in files_in_tree()}
    folders = (*PACKAGES, "docs", "examples", "benchmarks")
    modules = {str(p.relative_to(ROOT)) for name in folders for p in (ROOT / name).rglob("*.py")}
    assert modules - listed == set()


def test_the_readme_names_every_command_and_no_other() -> None:
    commands = {
        command.callback.__name__ for command in app.registered_commands if command.callback
    }
    commands |= {point.name for point in entry_points(group="seekr.commands")}
    rows = set(re.findall(r"^\| `(\w+)` \|[^|]*\| `seekr ", README, re.MULTILINE))
    assert rows == commands
    named = {word for text in DOCUMENTS for word in re.findall(r"`seekr (\w+)", text.read_text())}
    assert named <= commands


def test_the_streams_in_the_readme_are_valid() -> None:
    blocks = yaml_blocks()
    assert StreamConfig.model_validate(blocks[0]).method == SEEKR()
    official = SEEKR.model_validate(blocks[1]["method"])
    stated = set(
        re.findall(r"^\| `(\w+)` \|.*\| .*\| .*\|$", README.partition("the paper |")[2], re.M)
    )
    assert set(blocks[1]["method"]) - {"name"} == stated
    assert official.model_fields_set - {"name"} == stated


def test_the_search_in_the_documents_is_valid_and_names_every_figure(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "tune.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    search = SearchConfig.model_validate(yaml.safe_load(block))
    assert set(SearchConfig.model_fields) - {"driver_resource"} == search.model_fields_set
    path = make_stream(tmp_path, tasks=2, evaluate={"forward_transfer": True})
    for name in known_measures(load_config(path)):
        assert f"`{re.sub(r'^score[.].*', 'score.TASK', name)}`" in page


def test_links_between_the_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        word
        for text in DOCUMENTS
        for word in re.findall(r"(?:`|    )make ([\w-]+)", text.read_text())
    }
    assert named <= targets

"""The command line before anything was run: it teaches, it answers in JSON, it starts nothing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from pipelines import cli
from pipelines import stream as streams
from pipelines.config import StreamConfig
from pipelines.load import load_config
from tests.pipelines.streams import RULES, make_stream

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(
    file for file in (ROOT / "examples").rglob("*.yaml") if "tasks:" in file.read_text()
)
COMMANDS = [
    *("run", "plan", "status", "explain", "report", "lineage", "export", "doctor", "schema"),
    *("tick", "withdraw", "promote", "rollback", "champion"),
]
WITH_JSON = ["plan", "status", "explain"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of which nothing was run; the tests only read it."""
    return make_stream(tmp_path_factory.mktemp("stream"))


@pytest.fixture
def call(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Return a function that runs `seekr` and returns exit code, stdout and stderr."""
    monkeypatch.chdir(path.parent)
    capsys.readouterr()

    def call(*words: str) -> tuple[int, str, str]:
        before = sorted(path.parent.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["seekr", *words])
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        assert not ray.is_initialized()
        assert sorted(path.parent.rglob("*")) == before
        return code, *capsys.readouterr()

    return call


def test_help_lists_every_command_with_what_it_is_for(call: Call) -> None:
    code, out, err = call("--help")
    assert (code, err) == (0, "")
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert all(len(lines[command].split()) > 5 for command in COMMANDS)


def test_no_command_shows_the_help_and_is_wrong_usage(call: Call) -> None:
    code, out, err = call()
    assert code == 2 and "Commands:" in out + err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_an_example_and_explains_every_option(
    command: str, call: Call
) -> None:
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"Example: seekr {command} " in out
    options = out.partition("Options:")[2].splitlines()
    for line in options:
        if line.strip().startswith("--"):
            assert len(line.split()) > 2, line


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["fly"], "No such command 'fly'"),
        (["plan"], "Missing argument 'STREAM'"),
        (["plan", "stream.yaml", "--jsn"], "--json"),
        (["plan", "stream.yaml", "another.yaml"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_ends_with_2_and_points_to_the_help(
    words: list[str], fragment: str, call: Call
) -> None:
    code, out, err = call(*words)
    assert code == 2 and out == ""
    assert fragment in err and "--help" in err


@pytest.mark.parametrize("command", WITH_JSON)
def test_json_is_all_that_goes_to_stdout(command: str, call: Call) -> None:
    code, out, err = call(command, "stream.yaml", "--json")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["stages"]) == 15


def test_plan_says_that_everything_would_run(call: Call) -> None:
    stages = json.loads(call("plan", "stream.yaml", "--json")[1])["stages"]
    assert {stage["state"] for stage in stages} == {"missing"}
    code, out, _ = call("plan", "stream.yaml")
    assert code == 0 and "15 to run, 0 reused" in out


def test_plan_follows_an_override(call: Call) -> None:
    def found(*words: str) -> dict[tuple[str, str], str]:
        stages = json.loads(call("plan", "stream.yaml", "--json", *words)[1])["stages"]
        return {(stage["name"], stage["task"]): stage["fingerprint"] for stage in stages}

    plain, other = found(), found("--set", "method.attention_weight=7")
    assert plain.keys() == other.keys()
    changed = {key for key in plain if plain[key] != other[key]}
    assert ("train", "reverse") in changed and ("train", "upper") not in changed
    assert len(found("--set", "method={name: seqft}")) == 6


def test_status_names_the_stream(call: Call) -> None:
    assert json.loads(call("status", "stream.yaml", "--json")[1])["stream"] == "small"
    out = call("status", "stream.yaml")[1]
    assert out.count("missing") == 15


@pytest.mark.parametrize(
    ("stage", "count"), [(None, 15), ("train", 2), ("train/upper", 1), ("upper", 7)]
)
def test_explain_tells_why_of_what_is_asked(stage: str | None, count: int, call: Call) -> None:
    code, out, _ = call("explain", "stream.yaml", *([stage] if stage else []))
    assert code == 0
    assert len(out.splitlines()) == count
    assert all("would run: nothing of this kind" in line for line in out.splitlines())


def test_explain_of_an_unknown_stage_lists_the_stages(call: Call) -> None:
    code, out, err = call("explain", "stream.yaml", "trian/upper")
    assert code == 2 and out == ""
    assert "'trian/upper' is not in the stream" in err and "train/upper" in err


@pytest.mark.parametrize(
    "words",
    [
        ["report", "stream.yaml"],
        ["report", "stream.yaml", "--compare", "stream.yaml"],
        ["lineage", "stream.yaml"],
        ["lineage", "stream.yaml", "upper", "--json"],
        ["lineage", "stream.yaml", "--rebuild", "--set", "tracking.uri=null"],
        ["export", "stream.yaml"],
        ["export", "stream.yaml", "upper", "--out", "made"],
    ],
    ids=" ".join,
)
def test_what_needs_results_says_to_run_the_stream_first(words: list[str], call: Call) -> None:
    code, out, err = call(*words)
    assert code == 2 and out == ""
    assert "seekr run stream.yaml" in err


def test_export_of_an_unknown_task_lists_the_tasks(call: Call) -> None:
    code, _, err = call("export", "stream.yaml", "uper")
    assert code == 2
    assert "'uper' is not in the stream" in err and all(name in err for name in list(RULES)[:2])


def test_doctor_examines_the_machine_and_the_stream(call: Call) -> None:
    code, out, err = call("doctor", "stream.yaml", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert err == ""
    assert {"python", "ray", "torch", "devices", "memory", "disk"} <= checks.keys()
    assert code == (0 if all(check["ok"] for check in checks.values()) else 1)
    assert checks["model and data"]["ok"]
    assert (
        "2 tasks, 80 training rows; model of 2 layers x 4 heads"
        in (checks["model and data"]["text"])
    )
    assert checks["storage"]["ok"] and checks["tracking"]["text"] == "off"


def test_doctor_finds_everything_that_is_wrong_with_a_stream(call: Call) -> None:
    wrong = ["method.layer_budget=9", "storage=ftp://x/y", "tracking.uri=http://u:pw@127.0.0.1:9"]
    code, out, _ = call(
        "doctor", "stream.yaml", "--json", *(word for item in wrong for word in ("--set", item))
    )
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 1
    assert "method.layer_budget is 9" in checks["model and data"]["text"]
    assert "ftp" in checks["storage"]["text"]
    assert not any(checks[name]["ok"] for name in ("model and data", "storage", "tracking"))
    assert "pw" not in checks["tracking"]["text"]


def test_doctor_of_a_broken_yaml_says_what_is_wrong_with_it(call: Call) -> None:
    code, out, _ = call("doctor", "stream.yaml", "--set", "tran=1", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 1
    assert not checks["stream"]["ok"] and "did you mean 'train'?" in checks["stream"]["text"]


def test_doctor_knocks_at_the_tracking_server(call: Call) -> None:
    words = ["--set", "tracking.uri=http://name:secret-word@127.0.0.1:9"]
    code, out, _ = call("doctor", "stream.yaml", "--json", *words)
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 1
    assert "127.0.0.1" in checks["tracking"]["text"] and "refused" in checks["tracking"]["text"]
    assert "secret-word" not in out


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return StreamConfig.model_json_schema()


def test_schema_prints_a_valid_json_schema(call: Call, schema: dict[str, Any]) -> None:
    code, out, err = call("schema")
    assert (code, err) == (0, "")
    assert json.loads(out) == schema
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_are_valid_for_the_schema_and_for_seekr(
    example: Path, schema: dict[str, Any]
) -> None:
    jsonschema.validate(yaml.safe_load(example.read_text()), schema)
    assert load_config(example).tasks


def test_there_is_an_example() -> None:
    assert EXAMPLES


@pytest.mark.parametrize(
    "change",
    [
        {"tran": {}},
        {"train": {"epochs": "two"}},
        {"train": {"strategy": "megatron"}},
        {"method": {"name": "sekr"}},
        {"method": {"name": "replay", "head_budget": 2}},
        {"tasks": []},
        {"replay": {"ratio": 2}},
    ],
    ids=str,
)
def test_an_editor_with_the_schema_sees_what_seekr_refuses(
    change: dict[str, Any], path: Path, schema: dict[str, Any]
) -> None:
    values = yaml.safe_load(path.read_text())
    jsonschema.validate(values, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(values | change, schema)


def test_the_schema_describes_what_its_names_do_not_say(schema: dict[str, Any]) -> None:
    sections = schema["$defs"]
    assert "EOS" in sections["TaskConfig"]["properties"]["max_answer_length"]["description"]
    assert "quarantined" in sections["DataConfig"]["properties"]["max_bad_share"]["description"]
    assert all(section.get("description") for section in sections.values())


def test_ctrl_c_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streams, "open_stream", interrupted)
    code, out, err = call("plan", "stream.yaml")
    assert code == 130 and out == ""
    assert "run the same command again" in err


def test_what_is_printed_is_not_read_as_markup(call: Call, tmp_path: Path) -> None:
    place = tmp_path / "[bold]"
    code, _, err = call("plan", "stream.yaml", "--set", f"model.path={place}")
    assert code == 2 and str(place) in err

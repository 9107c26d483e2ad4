"""Wrong input is refused before any compute: exit code 2, a message that teaches, nothing touched."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from pipelines import cli
from seekr.models import save_model, tiny_llama
from tests.pipelines.streams import make_model, make_stream, write_rows

Change = Callable[[dict[str, Any], Path], None]
CASES: dict[str, tuple[Change, list[str]]] = {}
GOOD = [{"input": f"say {i}", "output": str(i)} for i in range(20)]


def case(*fragments: str) -> Callable[[Change], Change]:
    """Name a way to break a good stream, and what the message must hold."""

    def keep(change: Change) -> Change:
        CASES[change.__name__.removeprefix("_")] = (change, list(fragments))
        return change

    return keep


@case("tran", "did you mean 'train'")
def _misspelt_section(values: dict[str, Any], folder: Path) -> None:
    values["tran"] = {"epochs": 2}


@case("method.atention_weight", "did you mean 'attention_weight'")
def _misspelt_method_field(values: dict[str, Any], folder: Path) -> None:
    values["method"]["atention_weight"] = 1


@case("tasks.0.metrc", "did you mean 'metric'")
def _misspelt_task_field(values: dict[str, Any], folder: Path) -> None:
    values["tasks"][0]["metrc"] = "rouge_l"


@case("train.epochs", "integer", "'two'")
def _wrong_type(values: dict[str, Any], folder: Path) -> None:
    values["train"]["epochs"] = "two"


@case("train.batch_size", "greater than or equal to 1", "0")
def _batch_of_nothing(values: dict[str, Any], folder: Path) -> None:
    values["train"]["batch_size"] = 0


@case("train.learning_rate", "finite")
def _learning_rate_that_is_no_number(values: dict[str, Any], folder: Path) -> None:
    values["train"]["learning_rate"] = float("nan")


@case("model", "missing", "seekr schema")
def _missing_section(values: dict[str, Any], folder: Path) -> None:
    del values["model"]


@case("method.name", "'sekr'", "seqft, mtl, replay, derpp, seekr")
def _unknown_method(values: dict[str, Any], folder: Path) -> None:
    values["method"] = {"name": "sekr"}


@case("train.strategy", "'ddp' or 'fsdp'", "'deepspeed'")
def _strategy_that_is_not_there(values: dict[str, Any], folder: Path) -> None:
    values["train"]["strategy"] = "deepspeed"


@case("tasks.upper.train", "absent.jsonl does not exist")
def _missing_file(values: dict[str, Any], folder: Path) -> None:
    values["tasks"][0]["train"] = "data/absent.jsonl"


@case("tasks.upper.test", "is empty")
def _empty_file(values: dict[str, Any], folder: Path) -> None:
    (folder / "data/upper/test.jsonl").write_text("")


@case("tasks.upper.train", "train.jsonl:3:", "max_bad_share")
def _malformed_line(values: dict[str, Any], folder: Path) -> None:
    lines = [json.dumps(row) for row in GOOD]
    lines[2] = '{"input": "x", '
    (folder / "data/upper/train.jsonl").write_text("\n".join(lines))


@case("tasks.upper.train", "question", "input")
def _missing_columns(values: dict[str, Any], folder: Path) -> None:
    rows = [{"question": row["input"], "output": row["output"]} for row in GOOD]
    write_rows(folder / "data/upper/train.jsonl", rows)


@case("tasks.upper.train", "promt", "prompt")
def _named_column_that_is_not_there(values: dict[str, Any], folder: Path) -> None:
    rows = [{"prompt": row["input"], "answer": row["output"]} for row in GOOD]
    write_rows(folder / "data/upper/train.jsonl", rows)
    values["tasks"][0]["columns"] = {"input": "promt", "output": "answer"}


@case("tasks.upper.train", "train.jsonl:21:", "empty")
def _empty_answer(values: dict[str, Any], folder: Path) -> None:
    write_rows(folder / "data/upper/train.jsonl", [*GOOD, {"input": "x", "output": ""}])


@case("tasks.upper.train", "no usable row")
def _no_good_row_at_all(values: dict[str, Any], folder: Path) -> None:
    write_rows(folder / "data/upper/train.jsonl", [{"input": "x", "output": ""}])


@case("tasks", "'upper' occurs twice")
def _duplicate_task(values: dict[str, Any], folder: Path) -> None:
    values["tasks"][1]["name"] = "upper"


@case("tasks.0.name", "'../upper'")
def _task_name_with_separators(values: dict[str, Any], folder: Path) -> None:
    values["tasks"][0]["name"] = "../upper"


@case("'all' is reserved")
def _reserved_task_name(values: dict[str, Any], folder: Path) -> None:
    values["tasks"][0]["name"] = "all"


@case("tasks", "at least 1")
def _no_tasks(values: dict[str, Any], folder: Path) -> None:
    values["tasks"] = []


@case("method.layer_budget is 3", "2 layers", "1..2")
def _layer_budget_above_the_model(values: dict[str, Any], folder: Path) -> None:
    values["method"]["layer_budget"] = 3


@case("method.head_budget is 9", "8 heads", "1..8")
def _head_budget_above_the_model(values: dict[str, Any], folder: Path) -> None:
    values["method"] |= {"layer_budget": 2, "head_budget": 9}


@case("method.query_budget", "greater than or equal to 1")
def _query_budget_of_nothing(values: dict[str, Any], folder: Path) -> None:
    values["method"]["query_budget"] = 0


@case("replay.ratio", "greater than 0")
def _ratio_zero(values: dict[str, Any], folder: Path) -> None:
    values["replay"] = {"ratio": 0}


@case("replay.ratio", "less than or equal to 1", "1.5")
def _ratio_above_one(values: dict[str, Any], folder: Path) -> None:
    values["replay"] = {"ratio": 1.5}


@case("replay", "ratio and rows are both set")
def _ratio_and_rows(values: dict[str, Any], folder: Path) -> None:
    values["replay"] = {"ratio": 0.1, "rows": 5}


@case("task upper", "0.001 of 40 rows rounds to 0", "0.0125")
def _replay_set_of_nothing(values: dict[str, Any], folder: Path) -> None:
    values["replay"] = {"ratio": 0.001}


@case("task upper", "41", "40")
def _more_replay_rows_than_there_are(values: dict[str, Any], folder: Path) -> None:
    values["replay"] = {"rows": 41}


@case("end-of-sequence")
def _tokenizer_without_eos(values: dict[str, Any], folder: Path) -> None:
    path = folder / "model/tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["eos_token"] = None
    path.write_text(json.dumps(settings))


@case("model.path", "nowhere", "is not a folder")
def _model_that_does_not_exist(values: dict[str, Any], folder: Path) -> None:
    values["model"]["path"] = "nowhere"


@case("model.path", "safetensors", "pickled")
def _pickled_weights(values: dict[str, Any], folder: Path) -> None:
    (folder / "model/model.safetensors").rename(folder / "model/pytorch_model.bin")


@case("model.path", "config.json")
def _model_without_config(values: dict[str, Any], folder: Path) -> None:
    (folder / "model/config.json").unlink()


@case("tokenizer", "vocabulary", "0..99")
def _vocabulary_mismatch(values: dict[str, Any], folder: Path) -> None:
    from seekr.models import byte_tokenizer

    save_model(tiny_llama(vocab_size=100, hidden=32), byte_tokenizer(), folder / "model")


@case("task upper", "max_length 48", "template")
def _template_longer_than_a_row(values: dict[str, Any], folder: Path) -> None:
    values["tasks"][0]["template"] = "x" * 60 + "{input}"


@case("exactly one")
def _template_without_input(values: dict[str, Any], folder: Path) -> None:
    values["tasks"][0]["template"] = "Answer: "


@case("unknown placeholder {text}")
def _template_with_another_hole(values: dict[str, Any], folder: Path) -> None:
    values["tasks"][0]["template"] = "{text} {input}"


@case("max_length is 4096", "64 positions")
def _longer_than_the_model(values: dict[str, Any], folder: Path) -> None:
    values["data"]["max_length"] = 4096


@case("storage", "not-a-folder")
def _storage_that_is_a_file(values: dict[str, Any], folder: Path) -> None:
    (folder / "not-a-folder").write_text("")
    values["storage"] = str(folder / "not-a-folder" / "store")


@case("storage", "ftp")
def _storage_of_an_unknown_kind(values: dict[str, Any], folder: Path) -> None:
    values["storage"] = "ftp://somewhere/store"


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["seekr", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_refused(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    change, fragments = CASES[name]
    path = make_stream(tmp_path)
    values = yaml.safe_load(path.read_text())
    change(values, tmp_path)
    path.write_text(yaml.safe_dump(values))
    sentinel = tmp_path / "store/train/upper/0123456789abcdef0123/record.json"
    sentinel.parent.mkdir(parents=True)
    sentinel.write_text('{"kept": true}')
    before = tree(tmp_path)
    assert call(monkeypatch, "run", str(path)) == 2
    told = " ".join(capsys.readouterr().err.split())
    for fragment in fragments:
        assert fragment in told, told
    assert "Traceback" not in told
    assert not ray.is_initialized()
    assert tree(tmp_path) == before


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 35


def test_several_mistakes_are_told_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_stream(tmp_path, replay={"ratio": 2}, train={"epochs": 0, "workrs": 2})
    assert call(monkeypatch, "run", str(path)) == 2
    told = capsys.readouterr().err
    assert all(field in told for field in ("replay.ratio", "train.epochs", "train.workrs"))
    path = make_stream(tmp_path)
    (tmp_path / "data/upper/train.jsonl").unlink()
    (tmp_path / "data/reverse/test.jsonl").write_text("")
    assert call(monkeypatch, "run", str(path)) == 2
    told = capsys.readouterr().err
    assert "tasks.upper.train" in told and "tasks.reverse.test" in told


@pytest.mark.parametrize(
    ("words", "fragment"),
    [
        (["run", "absent.yaml"], "does not exist"),
        (["run", "{bad}"], "not valid YAML"),
        (["run", "{list}"], "a mapping"),
        (["run", "{good}", "--set", "nonsense"], "--set field.name=value"),
        (["run", "{good}", "--set", "tasks.9.epochs=2"], "0..1"),
        (["run", "{good}", "--set", "name.x.y=1"], "nothing below"),
        (["explain", "{good}", "train/absent"], "train/upper"),
        (["export", "{good}", "absent"], "upper"),
        (["export", "{good}", "upper"], "run the stream first"),
        (["lineage", "{good}", "upper"], ""),
        (["run"], "Missing argument"),
        (["fly"], "No such command"),
    ],
)
def test_wrong_usage_is_refused(
    words: list[str],
    fragment: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = make_stream(tmp_path)
    (tmp_path / "bad.yaml").write_text("name: [unclosed\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    places = {"good": good, "bad": tmp_path / "bad.yaml", "list": tmp_path / "list.yaml"}
    assert call(monkeypatch, *(word.format(**places) for word in words)) == 2
    assert fragment in " ".join(capsys.readouterr().err.split())


def test_a_soft_capped_model_cannot_be_probed_and_is_refused_for_seekr_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_stream(tmp_path)
    config = make_model(tmp_path / "model") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attn_logit_softcapping": 30.0}))
    assert call(monkeypatch, "plan", str(path)) == 2
    assert "soft" in capsys.readouterr().err.lower()


COMMANDS = ["run", "plan", "status", "explain", "report", "lineage", "export", "doctor", "schema"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


def test_plan_and_status_print_nothing_but_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_stream(tmp_path)
    for command in ("plan", "status"):
        monkeypatch.setattr(sys, "argv", ["seekr", command, str(path), "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        stages = json.loads(capsys.readouterr().out)["stages"]
        assert len(stages) == 15 and {stage["state"] for stage in stages} == {"missing"}
    assert not (tmp_path / "store").exists()

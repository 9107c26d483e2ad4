"""What people really bring: half a download, a slip in the YAML, a folder in place of a file.

`bad_inputs` lists the cases. Each is refused by `seekr run` with exit code 2 and a message that
names the place and the way out, before Ray starts and without a byte written.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import yaml

from pipelines import cli
from pipelines.load import load_config
from pipelines.survey import survey
from tests.pipelines.bad_inputs import CASES, edit_json
from tests.pipelines.streams import make_stream, task_rows, write_rows

Refuse = Callable[..., str]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("good")).parent


@pytest.fixture
def folder(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a good stream, with something in its store, and nowhere for Ray to leave traces."""
    folder = tmp_path / "stream"
    shutil.copytree(good, folder)
    kept = folder / "store/train/upper/0123456789abcdef0123/record.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"kept": true}')
    (tmp_path / "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "ray"))
    values = yaml.safe_load((folder / "stream.yaml").read_text())
    (folder / "stream.yaml").write_text(yaml.safe_dump(values | {"storage": str(folder / "store")}))
    return folder


@pytest.fixture
def refuse(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refuse:
    """Return a function that calls `seekr`, checks that it refuses, and returns what it says."""

    def refuse(*words: str) -> str:
        before = digests(folder)
        monkeypatch.setattr(sys, "argv", ["seekr", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code == 2, err
        assert not out and "Traceback" not in err
        assert not ray.is_initialized() and not list((folder.parent / "ray").iterdir())
        assert digests(folder) == before
        return " ".join(err.split())

    return refuse


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_before_any_compute(name: str, folder: Path, refuse: Refuse) -> None:
    change, fragments = CASES[name]
    path = folder / "stream.yaml"
    values = yaml.safe_load(path.read_text())
    change(values, folder)
    path.write_text(yaml.safe_dump(values))
    told = refuse("run", str(path))
    missing = [fragment for fragment in fragments if fragment not in told]
    assert not missing, told
    assert "hidden-word" not in told


TEXTS = {
    "a colon too many": ("name: a\nmodel: b: c\n", "line 2, column 9: mapping values"),
    "a tab": ("name: a\ntrain:\n\tepochs: 1\n", "line 3, column 1: found character '\\t'"),
    "a repeated key": ("name: a\ntrain: {}\nseed: 1\ntrain: {}\n", "line 4, column 1: the key"),
    "an open bracket": ("tasks: [a, b\n", "line 2, column 1: expected ',' or ']'"),
    "nothing": ("", "is empty; a mapping with name, model, method and tasks"),
    "a list": ("- a\n- b\n", "holds ['a', 'b']; a mapping with"),
    "other bytes": ("name: \xff", "is not valid YAML"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_yaml_that_cannot_be_read_says_where(name: str, folder: Path, refuse: Refuse) -> None:
    text, fragment = TEXTS[name]
    (folder / "stream.yaml").write_bytes(text.encode("latin-1"))
    told = refuse("run", str(folder / "stream.yaml"))
    assert "stream.yaml" in told and fragment in told


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("train.epochs", ["not understood", "--set train.epochs=2"]),
        ("=2", ["not understood"]),
        ("tasks.2.epochs=2", ["'2' is not an item of a list of 2", "0..1"]),
        ("tasks.first.epochs=2", ["'first' is not an item", "0..1"]),
        ("tasks.7={}", ["'7' is not an item"]),
        ("name.x=1", ["nothing below 'small'", "'x'", "seekr schema"]),
        ("method.layer_budget=[1", ["not valid YAML", "quotes"]),
        ("method.layer_budget=three", ["method.layer_budget", "must be an integer", "'three'"]),
        ("trian.epochs=2", ["trian: unknown field", "did you mean 'train'?"]),
        ("replay.rows=3", ["ratio and rows are both set", "null"]),
    ],
)
def test_an_override_that_cannot_be_applied(
    override: str, fragments: list[str], folder: Path, refuse: Refuse
) -> None:
    told = refuse("run", str(folder / "stream.yaml"), "--set", override)
    assert [text for text in fragments if text not in told] == [], told


def test_all_that_is_wrong_outside_the_yaml_is_told_at_once(folder: Path, refuse: Refuse) -> None:
    (folder / "model/tokenizer_config.json").unlink()
    (folder / "data/upper/train.jsonl").unlink()
    (folder / "data/reverse/test.jsonl").write_text("")
    words = ["--set", "method.layer_budget=9", "--set", "data.max_length=512"]
    told = refuse("run", str(folder / "stream.yaml"), *words)
    for fragment in (
        "no tokenizer_config.json",
        "method.layer_budget is 9",
        "task upper: max_length is 512",
        "task reverse: max_length is 512",
        "tasks.upper.train",
        "tasks.reverse.test",
    ):
        assert fragment in told, told


def test_all_that_is_wrong_with_the_data_is_told_even_without_a_model(
    folder: Path, refuse: Refuse
) -> None:
    (folder / "data/upper/train.jsonl").unlink()
    told = refuse("run", str(folder / "stream.yaml"), "--set", f"model.path={folder}/absent")
    assert "absent is not a folder" in told and "tasks.upper.train" in told


def test_an_item_that_is_wrong_is_not_also_told_as_a_list_that_is_short(
    folder: Path, refuse: Refuse
) -> None:
    told = refuse("run", str(folder / "stream.yaml"), "--set", "tasks.0.epochs=0")
    assert "tasks.0.epochs" in told and "at least 1 is needed" not in told


def test_a_report_that_could_not_be_written_is_refused_before_the_run(
    folder: Path, refuse: Refuse
) -> None:
    path = str(folder / "stream.yaml")
    assert "--report" in refuse("run", path, "--report", str(folder))
    assert "--report" in refuse("run", path, "--report", f"{path}/report.html")


def test_streams_that_cannot_run_together_are_refused(folder: Path, refuse: Refuse) -> None:
    path = folder / "stream.yaml"
    values = yaml.safe_load(path.read_text())
    other = folder / "other.yaml"
    other.write_text(yaml.safe_dump(values | {"seed": 1}))
    assert "several streams have the name small" in refuse("run", str(path), str(other))
    other.write_text(yaml.safe_dump(values | {"storage": str(folder / "elsewhere")}))
    assert "different storages" in refuse("run", str(path), str(other))


def test_bad_rows_up_to_the_allowed_share_are_set_apart_with_file_line_and_reason(
    folder: Path,
) -> None:
    file = folder / "data/upper/train.jsonl"
    write_rows(file, task_rows("upper", 98))
    with file.open("a") as stream:
        stream.write('{"input": "a", "output": " "}\n{"input": \n')
    facts = survey(load_config(folder / "stream.yaml", ["data.max_bad_share=0.02"]))
    found = facts.tasks["upper"].train
    assert (found.num_rows, found.num_bad, facts.tasks["upper"].num_train) == (98, 2, 98)
    assert [(row.file, row.line) for row in found.bad] == [(str(file), 99), (str(file), 100)]
    assert "empty answer" in found.bad[0].reason and "malformed JSON" in found.bad[1].reason


def test_there_are_more_cases_than_were_asked_for() -> None:
    assert len(CASES) + len(TEXTS) >= 80


def test_a_stream_that_is_not_there_or_is_a_folder(folder: Path, refuse: Refuse) -> None:
    assert "absent.yaml does not exist; give the path" in refuse("run", f"{folder}/absent.yaml")
    assert "is a folder; give the path of a stream's YAML file" in refuse("run", str(folder))


def test_a_soft_capped_model_is_fine_for_methods_that_look_at_no_attention(folder: Path) -> None:
    CASES["a_soft_capped_model_for_seekr"][0]({}, folder)
    config = load_config(folder / "stream.yaml", ["method={name: derpp}"])
    assert survey(config).shape.num_heads == 4


def test_a_model_may_name_code_of_its_own_if_it_is_trusted(folder: Path) -> None:
    edit_json(folder / "model/config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
    config = load_config(folder / "stream.yaml", ["model.trust_remote_code=true"])
    assert survey(config).shape.num_layers == 2

"""What people really bring: half a download, a slip in the YAML, a folder in place of a file.

`test_refusals` holds the plain cases; these are the ones that used to end in a traceback, in the
wrong error, or in one error of several. Each is refused by `seekr run` with exit code 2 and a
message that names the place and the way out, before Ray starts and without a byte written.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from transformers import Gemma2Config

from pipelines import cli
from pipelines.load import load_config
from pipelines.survey import survey
from tests.pipelines.streams import make_stream, task_rows, write_rows

Values = dict[str, Any]
Change = Callable[[Values, Path], None]
Refuse = Callable[..., str]
CASES: dict[str, tuple[Change, tuple[str, ...]]] = {}


def case(*fragments: str) -> Callable[[Change], Change]:
    """Register a change to a good stream, and what the message about it must hold."""

    def keep(change: Change) -> Change:
        CASES[change.__name__] = (change, fragments)
        return change

    return keep


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


@case("train: a section with", "batch_size", "found None")
def a_section_without_fields(values: Values, folder: Path) -> None:
    values["train"] = None


@case("method: a section with name is needed", "'seekr'")
def a_method_that_is_only_its_name(values: Values, folder: Path) -> None:
    values["method"] = "seekr"


@case("method.name", "found 'sekr'", "did you mean 'seekr'?", "derpp")
def a_misspelt_method(values: Values, folder: Path) -> None:
    values["method"]["name"] = "sekr"


@case("method.name", "Allowed here: seqft")
def a_method_without_a_name(values: Values, folder: Path) -> None:
    del values["method"]["name"]


@case("method.head_budget: unknown field; it belongs to method seekr: remove it", "replay_weight")
def a_field_of_another_method(values: Values, folder: Path) -> None:
    values["method"] = {"name": "replay", "head_budget": 2}


@case("data.columns.inptu: unknown field; did you mean 'input'?", "output")
def a_misspelt_field_far_down(values: Values, folder: Path) -> None:
    values["data"]["columns"] = {"inptu": "question"}


@case("train.zzz: unknown field; Allowed here:", "learning_rate")
def a_field_like_no_other(values: Values, folder: Path) -> None:
    values["train"]["zzz"] = 1


@case("train.epochs: a number is needed", "booleans", "found True")
def a_boolean_for_a_number(values: Values, folder: Path) -> None:
    values["train"]["epochs"] = True


@case("tasks.1.name: must be text", "quotes", "found 7")
def a_name_that_yaml_reads_as_a_number(values: Values, folder: Path) -> None:
    values["tasks"][1]["name"] = 7


@case("tasks: must be a list", "found 'upper'")
def tasks_that_are_no_list(values: Values, folder: Path) -> None:
    values["tasks"] = "upper"


@case("'upper--2'", "'--'")
def a_task_name_like_that_of_a_stage(values: Values, folder: Path) -> None:
    values["tasks"][1]["name"] = "upper--2"


@case("'UPPER' occurs twice")
def names_that_differ_in_case_only(values: Values, folder: Path) -> None:
    values["tasks"][1]["name"] = "UPPER"


@case("tasks.0.train: must not be empty")
def an_empty_path(values: Values, folder: Path) -> None:
    values["tasks"][0]["train"] = ""


@case("replay", "ratio and rows are both null")
def neither_ratio_nor_rows(values: Values, folder: Path) -> None:
    values["replay"] = {"ratio": None}


@case("learning_rate", "finite", "inf")
def a_learning_rate_without_bound(values: Values, folder: Path) -> None:
    values["train"]["learning_rate"] = float("inf")


@case("attention_weight", "inf")
def a_loss_weight_without_bound(values: Values, folder: Path) -> None:
    values["method"]["attention_weight"] = float("inf")


@case("tasks.upper.test", "data/upper/notes holds no data files", ".jsonl")
def a_folder_without_data(values: Values, folder: Path) -> None:
    (folder / "data/upper/notes").mkdir()
    values["tasks"][0]["test"] = "data/upper/notes"


@case("tasks.upper.train", "'.csv'", "Allowed are .jsonl")
def a_layout_that_is_not_read(values: Values, folder: Path) -> None:
    (folder / "data/upper/rows.csv").write_text("input,output\na,b\n")
    values["tasks"][0]["train"] = "data/upper/rows.csv"


@case("tasks.upper.train", "part-*.jsonl does not exist")
def a_glob_that_matches_nothing(values: Values, folder: Path) -> None:
    values["tasks"][0]["train"] = "data/upper/part-*.jsonl"


@case("tasks.upper.train", "gopher://host/rows.jsonl cannot be opened", "Allowed are")
def a_source_of_an_unknown_kind(values: Values, folder: Path) -> None:
    values["tasks"][0]["train"] = "gopher://host/rows.jsonl"


@case("tasks.upper.train", "rows.json is malformed JSON", "line 1 column")
def half_a_json_document(values: Values, folder: Path) -> None:
    (folder / "data/upper/rows.json").write_text('[{"input": "a", "output": "b"}, {"inp')
    values["tasks"][0]["train"] = "data/upper/rows.json"


@case("tasks.upper.test", "test.jsonl:1: malformed JSON", "tasks.upper.train", "does not exist")
def both_parts_of_a_task(values: Values, folder: Path) -> None:
    (folder / "data/upper/test.jsonl").write_text("no json\n")
    (folder / "data/upper/train.jsonl").unlink()


@case("2 bad rows of 42 (4.76%)", "allowed are 2.00%", "train.jsonl:41: ", "train.jsonl:42: ")
def more_bad_rows_than_allowed(values: Values, folder: Path) -> None:
    values["data"]["max_bad_share"] = 0.02
    with (folder / "data/upper/train.jsonl").open("a") as file:
        file.write('{"input": 1, "output": "a"}\n{"input": "a"\n')


@case("tasks.upper.train", "train.jsonl:1 has no definition", "columns.definition")
def a_template_that_no_row_can_fill(values: Values, folder: Path) -> None:
    values["data"]["template"] = "{definition} {input}"


@case("model.path", "lacks 1 of 2 weight files", "model-00002-of-00002.safetensors")
def a_model_without_its_second_shard(values: Values, folder: Path) -> None:
    shard = "model-00001-of-00002.safetensors"
    (folder / "model/model.safetensors").rename(folder / "model" / shard)
    index = {"weight_map": {"a": shard, "b": "model-00002-of-00002.safetensors"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))


@case("model.path", "model.safetensors has 36 bytes", "git lfs pull")
def a_git_lfs_pointer_for_weights(values: Values, folder: Path) -> None:
    (folder / "model/model.safetensors").write_text("version https://git-lfs.github.com/1")


@case("model.path", "not a whole safetensors file", "download it again")
def half_of_the_weights(values: Values, folder: Path) -> None:
    weights = folder / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


@case("model.path", "no weights", "adapter")
def an_adapter_without_its_model(values: Values, folder: Path) -> None:
    (folder / "model/model.safetensors").rename(folder / "model/adapter_model.safetensors")


@case("config.json wants its own Python code", "model.trust_remote_code is false")
def a_model_with_code_of_its_own(values: Values, folder: Path) -> None:
    edit_json(folder / "model/config.json", auto_map={"AutoConfig": "code.Config"})
    (folder / "model/code.py").write_text("raise SystemExit('this code was run')")


@case("tokenizer_config.json wants its own Python code", "model.trust_remote_code is false")
def a_tokenizer_with_code_of_its_own(values: Values, folder: Path) -> None:
    edit_json(folder / "model/tokenizer_config.json", auto_map={"AutoTokenizer": ["code.T", None]})


@case("config.json cannot be used")
def a_broken_config(values: Values, folder: Path) -> None:
    (folder / "model/config.json").write_text('{"model_type": ')


@case("config.json cannot be used", "llamma")
def a_kind_of_model_that_nobody_knows(values: Values, folder: Path) -> None:
    edit_json(folder / "model/config.json", model_type="llamma")


@case("model.path", "tokenizer cannot be used")
def a_broken_tokenizer(values: Values, folder: Path) -> None:
    (folder / "model/tokenizer.json").write_text('{"version": "1.0"')


@case("model.path", "no tokenizer_config.json", "copy its files there")
def a_model_without_a_tokenizer(values: Values, folder: Path) -> None:
    (folder / "model/tokenizer_config.json").unlink()


@case("'gemma2' cannot be probed", "attn_logit_softcapping", "derpp")
def a_soft_capped_model_for_seekr(values: Values, folder: Path) -> None:
    config = Gemma2Config(
        vocab_size=258, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    config.save_pretrained(folder / "model")


@case("storage", "store/train/upper/0123456789abcdef0123/record.json is a file", "choose another")
def a_file_for_storage(values: Values, folder: Path) -> None:
    values["storage"] += "/train/upper/0123456789abcdef0123/record.json"


@case("storage", "bucket/store: cannot be written", "seekr-probe", "endpoint_override")
def a_bucket_that_does_not_answer(values: Values, folder: Path) -> None:
    options = "scheme=http&endpoint_override=127.0.0.1:9&region=x"
    values["storage"] = f"s3://key:hidden-word@bucket/store?{options}"


@case("storage", "unknown scheme", "s3://", "gs://")
def a_storage_that_is_not_supported(values: Values, folder: Path) -> None:
    values["storage"] = "https://host/store"


@case("ray.num_cpu: unknown field; did you mean 'num_cpus'?")
def a_misspelt_execution_field(values: Values, folder: Path) -> None:
    values["ray"] = {"num_cpu": 2}


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
        ("method.layer_budget=three", ["method.layer_budget", "valid integer", "'three'"]),
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
    assert len(CASES) + len(TEXTS) >= 45

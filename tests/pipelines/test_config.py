"""From YAML and overrides to values: paths, defaults, and what bears identity."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from pipelines.config import (
    PoolConfig,
    RayConfig,
    StreamConfig,
    TeachConfig,
    TrackingConfig,
    TrainConfig,
)
from pipelines.data_config import ProbeConfig
from pipelines.load import load_config
from pipelines.section import Section, identity
from pipelines.token_weights_config import MetaConfig, TokenWeightsConfig
from seekr.errors import ConfigError
from seekr.methods import METHODS, Method
from tests.pipelines.streams import make_stream, stream_values, write_yaml


def write(folder: Path, **changes: Any) -> Path:
    """Write a stream's YAML alone: loading looks at no model and no data."""
    return write_yaml(folder / "stream.yaml", stream_values() | changes)


def sections(model: type[BaseModel] = StreamConfig) -> Iterator[type[BaseModel]]:
    """Every section of the schema and every method."""
    yield model
    seen = {model}
    for field in model.model_fields.values():
        pending: list[Any] = [field.annotation]
        while pending:
            kind = pending.pop()
            pending.extend(getattr(kind, "__args__", ()))
            if isinstance(kind, type) and issubclass(kind, BaseModel) and kind not in seen:
                seen.add(kind)
                yield from sections(kind)


def test_paths_in_the_file_are_relative_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    write(folder)
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("somewhere/stream.yaml"))
    assert config.model.path == folder / "model"
    assert config.data_root == folder
    assert config.tasks[0].train == str(folder / "data/upper/train.jsonl")


def test_paths_in_an_override_are_relative_to_where_you_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "somewhere"
    folder.mkdir()
    path = write(folder)
    monkeypatch.chdir(tmp_path)
    config = load_config(path, ["model.path=model", "tasks.0.train=a.jsonl"])
    assert config.model.path == tmp_path / "model"
    assert config.tasks[0].train == str(tmp_path / "a.jsonl")
    assert config.tasks[0].test == str(folder / "data/upper/test.jsonl")
    config = load_config(path, ["data_root=rows"])
    assert config.tasks[0].train == str(tmp_path / "rows/data/upper/train.jsonl")


def test_a_data_root_in_the_file_is_relative_to_the_file(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, data_root="rows"))
    assert config.tasks[0].test == str(tmp_path / "rows/data/upper/test.jsonl")


def test_uris_and_absolute_paths_stay_as_they_are(tmp_path: Path) -> None:
    tasks = [{"name": "a", "train": "s3://bucket/a.jsonl", "test": "/rows/a.jsonl"}]
    task = load_config(write(tmp_path, tasks=tasks)).tasks[0]
    assert (task.train, task.test) == ("s3://bucket/a.jsonl", "/rows/a.jsonl")
    task = load_config(write(tmp_path), ["tasks.0.train=s3://bucket/b.jsonl"]).tasks[0]
    assert task.train == "s3://bucket/b.jsonl"


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    tasks = [{"name": "a", "train": "~/a.jsonl", "test": "b.jsonl"}]
    config = load_config(write(tmp_path, tasks=tasks, model={"path": "~/model"}))
    assert config.model.path == tmp_path / "home/model"
    assert config.tasks[0].train == str(tmp_path / "home/a.jsonl")


@pytest.mark.parametrize("word", ["off", "'off'", "OFF", "false"])
def test_tracking_can_be_turned_off_with_or_without_quotes(word: str, tmp_path: Path) -> None:
    config = load_config(write(tmp_path), [f"tracking.uri={word}"])
    assert config.tracking.uri == "off"
    path = tmp_path / "stream.yaml"
    text = yaml.safe_dump({k: v for k, v in stream_values().items() if k != "tracking"})
    path.write_text(f"{text}tracking: {{uri: {word}}}\n")
    assert load_config(path).tracking.uri == "off"


def test_overrides_are_yaml_values_and_the_last_one_wins(tmp_path: Path) -> None:
    path = write(tmp_path)
    overrides = [
        "train.learning_rate=2e-3",
        "train.epochs=2",
        "train.epochs=3",
        "data.columns.input=q",
        "method={name: derpp, replay_weight: 0.25}",
        "tasks.1.metric=exact_match",
    ]
    config = load_config(path, overrides)
    assert config.train.learning_rate == 0.002 and config.train.epochs == 3
    assert config.data.columns.input == "q"
    assert config.method.name == "derpp"
    assert config.tasks[1].metric == "exact_match" and config.tasks[0].metric is None


def test_an_override_can_open_a_section_that_the_file_does_not_have(tmp_path: Path) -> None:
    assert "evaluate" not in stream_values()
    config = load_config(write(tmp_path), ["evaluate.forward_transfer=true"])
    assert config.evaluate.forward_transfer


def test_a_repeated_key_is_refused_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "stream.yaml"
    path.write_text("name: a\ntrain:\n  epochs: 1\n  seed: 1\n  epochs: 2\n")
    with pytest.raises(ConfigError, match=r"line 5, column 3: the key 'epochs' occurs twice"):
        load_config(path)


def test_anchors_and_merge_keys_of_yaml_work(tmp_path: Path) -> None:
    path = write(tmp_path)
    text = path.read_text().partition("tasks:")[0]
    rest = yaml.safe_dump({"train": {"epochs": 4}})
    path.write_text(
        f"{text}tasks:\n- &first {{name: a, train: a.jsonl, test: b.jsonl, metric: accuracy}}\n"
        f"- {{<<: *first, name: b}}\n{rest}"
    )
    config = load_config(path)
    assert [task.name for task in config.tasks] == ["a", "b"]
    assert config.tasks[1].metric == "accuracy"


def test_a_task_takes_what_it_does_not_say_from_data(tmp_path: Path) -> None:
    tasks = stream_values()["tasks"]
    tasks[1] |= {"max_length": 30, "columns": {"input": "question"}}
    config = load_config(write(tmp_path, tasks=tasks, data={"metric": "accuracy"}))
    first, second = (config.options(task) for task in config.tasks)
    assert first == config.data
    assert second.max_length == 30 and second.columns.input == "question"
    assert second.metric == "accuracy" and second.truncate == config.data.truncate


def test_rows_replace_the_default_ratio(tmp_path: Path) -> None:
    replay = load_config(write(tmp_path, replay={"rows": 3})).replay
    assert (replay.rows, replay.ratio) == (3, None)
    replay = load_config(write(tmp_path, replay={})).replay
    assert (replay.rows, replay.ratio) == (None, 0.01)


@pytest.mark.parametrize("kind", list(sections()), ids=lambda kind: kind.__name__)
def test_every_section_refuses_unknown_fields_and_says_what_it_is(kind: type[BaseModel]) -> None:
    assert kind.__doc__
    with pytest.raises(ValidationError) as raised:
        kind.model_validate({"no_such_field": 1})
    assert "extra_forbidden" in {error["type"] for error in raised.value.errors()}


def test_all_methods_and_sections_are_walked() -> None:
    found = set(sections())
    assert set(METHODS.values()) <= found
    assert {TrainConfig, PoolConfig, RayConfig, TrackingConfig} <= found


def test_every_method_has_a_name_of_its_own_under_which_it_is_found() -> None:
    for name, method in METHODS.items():
        assert issubclass(method, Method) and method(name=name).name == name


@pytest.mark.parametrize("kind", [RayConfig, TrackingConfig, PoolConfig])
def test_sections_about_machines_bear_no_identity(kind: type[Section]) -> None:
    assert identity(kind()) == {}


def test_identity_of_training_is_what_changes_its_result() -> None:
    assert identity(TrainConfig()).keys() == TrainConfig.model_fields.keys() - {
        "micro_batch_size",
        "workers",
        "strategy",
        "cpus_per_worker",
        "gpus_per_worker",
        "device_memory",
        "checkpoint_every",
        "keep_checkpoints",
        "max_failures",
        "profile_steps",
        "zero_stage",
        "offload",
        "activation_checkpointing",
        "compile",
        "pack_tokens",
    }


def test_a_method_that_compares_whole_logits_needs_them_kept(tmp_path: Path) -> None:
    path = write(tmp_path, method={"name": "derpp", "logit_loss": "mse"})
    for overrides, found in (((), 64), (("teach.bits=32",), 64), (("teach.logits_kept=8",), 8)):
        with pytest.raises(ConfigError, match=rf"teach\.logits_kept: must be null.*found {found}$"):
            load_config(path, overrides)
    assert load_config(path, ["teach.logits_kept=null"]).teach.logits_kept is None
    assert load_config(path, ["method.logit_loss=kl"]).teach.logits_kept == 64
    # What is wrong elsewhere is told as well, and not hidden by this.
    with pytest.raises(ConfigError) as raised:
        load_config(path, ["train.epochs=two", "teach.batch_size=0"])
    assert "train.epochs" in str(raised.value) and "teach.batch_size" in str(raised.value)


def test_identity_of_probes_and_of_a_meta_training_is_what_changes_their_result() -> None:
    probe = ProbeConfig(name="facts", data="facts.jsonl", role="to_learn")
    assert identity(probe) == {
        "name": "facts",
        "sentence": "sentence",
        "answer": "answer",
        "statements": False,
        "rows": None,
    }
    assert identity(MetaConfig(pairs="pairs.jsonl")).keys() == MetaConfig.model_fields.keys() - {
        *("pairs", "exclude", "checkpoint_every", "cpus", "gpus")
    }
    by_focus = TokenWeightsConfig(by="focus")
    assert identity(by_focus).keys() == {"by", "meta"} and not by_focus.trains_network


def test_identity_of_teaching_is_what_a_target_holds() -> None:
    assert identity(TeachConfig()) == {"logits_kept": 64, "attention_kept": 24, "bits": 16}


def test_a_config_survives_the_way_to_the_workers(tmp_path: Path) -> None:
    config = load_config(make_stream(tmp_path))
    assert StreamConfig.model_validate(config.model_dump(mode="json")) == config
    assert StreamConfig.model_validate_json(config.model_dump_json()) == config


NUMBERS = [
    (model, name)
    for model in sections()
    if issubclass(model, Section)
    for name, field in model.model_fields.items()
    if {int, float} & {field.annotation, *getattr(field.annotation, "__args__", ())}
]


@given(st.sampled_from(NUMBERS), st.booleans())
def test_no_number_can_be_given_as_a_boolean(
    place: tuple[type[BaseModel], str], value: bool
) -> None:
    model, name = place
    with pytest.raises(ValidationError) as raised:
        model.model_validate({name: value})
    assert "a number is needed" in str(raised.value)


@given(st.text(alphabet="ab/\\. -_\n\0:~", min_size=1, max_size=6))
def test_a_task_name_is_always_one_plain_folder_name(name: str) -> None:
    values = stream_values() | {
        "tasks": [{"name": name, "train": "a.jsonl", "test": "b.jsonl"}],
    }
    try:
        config = StreamConfig.model_validate(values)
    except ValidationError as error:
        assert error.errors()[0]["loc"][0] == "tasks"
        return
    assert Path(config.tasks[0].name).name == name
    assert name[0] not in "./-_ " and not set(name) & set("/\\\n\0:~ ")

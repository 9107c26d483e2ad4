"""What follows from what: which field of a stream reaches which stages, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from pipelines.graph import build_graph
from pipelines.load import load_config
from pipelines.stage import Stage
from pipelines.survey import survey
from seekr.errors import ConfigError
from tests.pipelines.streams import RULES, make_model, make_stream, write_yaml

FIRST, SECOND, THIRD = list(RULES)[:3]
SEEKR = "method={name: seekr, layer_budget: 1, head_budget: 2}"
METHODS = {
    "seqft": "method={name: seqft}",
    "lwf": "method={name: lwf}",
    "ewc": "method={name: ewc}",
    "replay": "method={name: replay}",
    "derpp": "method={name: derpp}",
    "seekr": SEEKR,
    "frozen": "method={name: seekr, layer_budget: 1, head_budget: 2, scope: frozen}",
}
Graph = dict[str, Stage]
Draw = Callable[..., Graph]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"), tasks=3)


@pytest.fixture
def draw(path: Path) -> Draw:
    """Return a function from `--set` overrides to the stream's stages by name."""

    def draw(*overrides: str, path: Path = path) -> Graph:
        config = load_config(path, overrides)
        return {str(stage): stage for stage in build_graph(config, survey(config))}

    return draw


def own(stage: Stage) -> dict[str, object]:
    """What decides a stage apart from its inputs."""
    return {key: value for key, value in stage.payload.items() if key != "inputs"}


def touched(before: Graph, after: Graph) -> set[str]:
    """Names of stages whose own settings differ, not only those of what they read."""
    assert before.keys() == after.keys()
    return {name for name in before if own(before[name]) != own(after[name])}


def changed(before: Graph, after: Graph) -> set[str]:
    return {name for name in before if before[name].fingerprint != after[name].fingerprint}


def downstream(graph: Graph, roots: Iterable[str]) -> set[str]:
    """The roots, and everything that reads one of them, directly or not."""
    found = set(roots)
    for name, stage in graph.items():  # in order: inputs come first
        if found & {str(other) for other in stage.inputs.values()}:
            found.add(name)
    return found


def names(graph: Graph, *kinds: str) -> set[str]:
    return {name for name, stage in graph.items() if stage.name in kinds}


EXECUTION = {
    "micro batch": "train.micro_batch_size=2",
    "workers": "train.workers=2",
    "strategy": "train.strategy=fsdp",
    "cpus per worker": "train.cpus_per_worker=2",
    "gpus per worker": "train.gpus_per_worker=1",
    "device memory": "train.device_memory=80",
    "checkpoints": "train.checkpoint_every=1",
    "kept checkpoints": "train.keep_checkpoints=5",
    "elastic workers": "train.workers={min: 1, max: 4}",
    "profile": "train.profile_steps=[1, 2]",
    "zero stage": "train.zero_stage=1",
    "offload": "train.offload=all",
    "activation checkpointing": "train.activation_checkpointing=true",
    "compile": "train.compile=true",
    "packing": "train.pack_tokens=64",
    "failures": "train.max_failures=0",
    "score pool": "score={actors: 2, batch_size: 3, cpus: 2, gpus: 1}",
    "teach pool": "teach={actors: 2, batch_size: 3, cpus: 2, gpus: 1}",
    "evaluate pool": "evaluate={actors: 2, batch_size: 3, cpus: 2, gpus: 1}",
    "storage": "storage=elsewhere",
    "tracking": "tracking.uri=http://localhost:5000",
    "ray": "ray={address: auto, num_cpus: 7, parallel_stages: 4}",
    "bad rows": "data.max_bad_share=0.5",
    "remote code": "model.trust_remote_code=true",
    "the stream's name": "name=another",
    "what the data is called": "benchmark=another",
    "general pool": "general={batch_size: 3, cpus: 2, gpus: 1}",
}


@pytest.mark.parametrize("override", EXECUTION.values(), ids=list(EXECUTION))
def test_where_and_how_a_stream_runs_changes_no_fingerprint(override: str, draw: Draw) -> None:
    assert changed(draw(), draw(override)) == set()


def test_the_place_of_model_and_data_changes_no_fingerprint(
    path: Path, draw: Draw, tmp_path: Path
) -> None:
    shutil.copytree(path.parent / "model", tmp_path / "other model")
    shutil.copytree(path.parent / "data", tmp_path / "other data" / "data")
    moved = draw(f"model.path={tmp_path / 'other model'}", f"data_root={tmp_path / 'other data'}")
    assert changed(draw(), moved) == set()


def test_another_model_reaches_what_starts_from_it(path: Path, draw: Draw, tmp_path: Path) -> None:
    make_model(tmp_path / "model", seed=1)
    before, after = draw(), draw(f"model.path={tmp_path / 'model'}")
    assert touched(before, after) == {f"train/{FIRST}", f"score/{FIRST}"}


def test_another_tokenizer_reaches_every_task(path: Path, draw: Draw, tmp_path: Path) -> None:
    shutil.copytree(path.parent / "model", tmp_path / "model")
    file = tmp_path / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))
    before, after = draw(), draw(f"model.path={tmp_path / 'model'}")
    assert names(before, "ingest") <= touched(before, after)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_changed_row_reaches_its_task_and_what_was_learnt_after_it(
    part: str, path: Path, draw: Draw, tmp_path: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text((path.parent / f"data/{SECOND}/{part}.jsonl").read_text().replace("a", "b", 1))
    before, after = draw(), draw(f"tasks.1.{part}={file}")
    assert touched(before, after) == {f"ingest/{SECOND}"}
    assert changed(before, after) == downstream(after, [f"ingest/{SECOND}"])
    assert not any(before[name].task == FIRST for name in changed(before, after))


LATER = {f"train/{SECOND}", f"train/{THIRD}"}
# Override -> the stages whose own settings it changes: kinds, or single stages.
IDENTITY: dict[str, set[str]] = {
    "method.attention_weight=7": LATER,
    "method.attention_reduction=sum": LATER,
    "method.attention_epsilon=0.1": LATER,
    "method.replay_weight=0.25": LATER,
    "method.logit_weight=0.25": LATER,
    "method.logit_shift=false": {"teach"},
    "method.query_budget=4": {"score", "teach"},
    "method.layer_budget=2": {"select"},
    "method.head_budget=3": {"select"},
    "method.heads=sensitivity": {"select"},
    "method.definition=official": {"select"},
    "method.combine=sum_of_products": {"select"},
    "replay.ratio=0.2": {"sample"},
    "replay={rows: 3}": {"sample"},
    "replay.batch_ratio=0.5": LATER,
    "train.learning_rate=0.1": {"train"},
    "train.epochs=2": {"train"},
    "train.batch_size=4": {"train"},
    "train.schedule=cosine": {"train"},
    "train.weight_decay=0.1": {"train"},
    "tasks.2.epochs=5": {f"train/{THIRD}"},
    "tasks.1.metric=exact_match": {f"evaluate/{SECOND}", f"evaluate/{THIRD}"},
    "tasks.1.max_answer_length=6": {
        f"ingest/{SECOND}",
        f"evaluate/{SECOND}",
        f"evaluate/{THIRD}",
    },
    "tasks.1.template='Q {input}'": {f"ingest/{SECOND}"},
    "tasks.1.truncate=head": {f"ingest/{SECOND}"},
    "tasks.1.train_rows=20": {f"ingest/{SECOND}"},
    "data.max_length=40": {"ingest"},
    "teach.bits=32": {"teach"},
    "teach.logits_kept=null": {"teach"},
    "teach.attention_kept=3": {"teach"},
    "model.dtype=bfloat16": {"train", "score", "teach", "evaluate"},
    "seed=1": {"sample", "train", "score", "teach"},
}


@pytest.mark.parametrize("override", IDENTITY)
def test_a_setting_changes_the_stages_it_bears_on_and_what_depends_on_them(
    override: str, draw: Draw
) -> None:
    before, after = draw(), draw(override)
    wanted: set[str] = set()
    for item in IDENTITY[override]:
        wanted |= {item} if "/" in item else names(before, item)
    assert wanted
    assert touched(before, after) == wanted
    assert changed(before, after) == downstream(after, wanted)


def test_choosing_other_heads_keeps_the_scores_they_are_chosen_by(draw: Draw) -> None:
    kept = draw().keys() - changed(draw(), draw("method.layer_budget=2"))
    assert kept == {f"{kind}/{FIRST}" for kind in ("ingest", "sample", "train", "score", "evaluate")} | {
        f"{kind}/{task}" for kind in ("ingest", "sample") for task in (SECOND, THIRD)
    }  # fmt: skip


def test_another_distillation_weight_keeps_all_that_was_prepared_for_the_first_task(
    draw: Draw,
) -> None:
    kept = draw().keys() - changed(draw(), draw("method.attention_weight=7"))
    assert {name for name in kept if draw()[name].task == FIRST} == {
        name for name, stage in draw().items() if stage.task == FIRST
    }


def test_every_method_learns_the_first_task_alike(draw: Draw) -> None:
    graphs = [draw(override) for override in METHODS.values()]
    for name in (f"ingest/{FIRST}", f"train/{FIRST}", f"evaluate/{FIRST}"):
        assert len({graph[name].fingerprint for graph in graphs}) == 1
    second = [graph[f"train/{SECOND}"].fingerprint for graph in graphs]
    # After one task there is nothing to choose anew: both scopes have the same targets.
    assert second[-1] == second[-2] and len(set(second)) == len(METHODS) - 1
    third = [graph[f"train/{THIRD}"].fingerprint for graph in graphs]
    assert len(set(third)) == len(METHODS)


def test_methods_with_replay_share_their_replay_sets(draw: Draw) -> None:
    graphs = [draw(METHODS[name]) for name in ("replay", "derpp", "seekr", "frozen")]
    for task in (FIRST, SECOND, THIRD):
        assert len({graph[f"sample/{task}"].fingerprint for graph in graphs}) == 1


@pytest.mark.parametrize("forward", ["false", "true"])
@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_an_appended_task_keeps_every_stage_there_was(
    method: str, forward: str, path: Path, draw: Draw, tmp_path: Path
) -> None:
    overrides = (method, f"evaluate.forward_transfer={forward}", f"data_root={path.parent}")
    whole = yaml.safe_load(path.read_text()) | {"model": {"path": str(path.parent / "model")}}
    graphs = [
        draw(
            *overrides,
            path=write_yaml(tmp_path / f"{n}.yaml", whole | {"tasks": whole["tasks"][:n]}),
        )
        for n in (1, 2, 3)
    ]
    for shorter, longer in pairwise(graphs):
        assert shorter.items() <= longer.items()
        assert len(longer) > len(shorter)


def test_each_method_has_the_stages_it_needs_and_no_others(draw: Draw) -> None:
    kinds = {name: {s.name for s in draw(method).values()} for name, method in METHODS.items()}
    always = {"ingest", "train", "evaluate"}
    assert kinds == {
        "seqft": always,
        "replay": always | {"sample"},
        "derpp": always | {"sample", "teach"},
        "seekr": always | {"sample", "teach", "score", "select"},
        "frozen": always | {"sample", "teach", "score", "select"},
        "lwf": always | {"teach"},
        "ewc": always | {"fisher"},
    }


def test_lwf_asks_the_model_before_about_the_new_tasks_own_rows(draw: Draw) -> None:
    graph = draw(METHODS["lwf"])
    label = f"teach/{SECOND}--by--{FIRST}"
    taught = graph[label]
    assert dict(taught.inputs) == {
        "teacher": graph[f"train/{FIRST}"],
        "data": graph[f"ingest/{SECOND}"],
    }
    inputs = graph[f"train/{SECOND}"].inputs
    assert inputs[f"task_targets.{SECOND}"] == taught
    assert not any(name.startswith("replay.") for name in inputs)
    assert sorted(name for name in graph if name.startswith("teach/")) == sorted(
        [label, f"teach/{THIRD}--by--{SECOND}"]
    )


def test_ewc_hands_the_fisher_information_on_from_task_to_task(draw: Draw) -> None:
    graph = draw(METHODS["ewc"])
    assert "earlier" not in graph[f"fisher/{FIRST}"].inputs
    assert graph[f"fisher/{SECOND}"].inputs["earlier"] == graph[f"fisher/{FIRST}"]
    assert graph[f"train/{THIRD}"].inputs["past.fisher"] == graph[f"fisher/{SECOND}"]
    assert not any("past" in name for name in graph[f"train/{FIRST}"].inputs)
    heavier = draw("method={name: ewc, penalty_weight: 3}")
    assert touched(graph, heavier) == {f"train/{SECOND}", f"train/{THIRD}"}
    fewer = draw("method={name: ewc, fisher_rows: 3}")
    assert touched(graph, fewer) == names(graph, "fisher")


def test_recadam_pulls_from_the_first_task_on_and_asks_nothing_of_earlier_stages(
    draw: Draw,
) -> None:
    plain, graph = draw(METHODS["seqft"]), draw("method={name: recadam, pull_weight: 100}")
    assert graph.keys() == plain.keys()
    assert touched(plain, graph) == names(graph, "train")
    for name in graph:
        ours, theirs = graph[name].inputs, plain[name].inputs
        assert {key: str(stage) for key, stage in ours.items()} == {
            key: str(stage) for key, stage in theirs.items()
        }
    later = draw("method={name: recadam, pull_weight: 100, midpoint: 3}")
    assert touched(graph, later) == names(graph, "train")


def test_own_answers_are_taken_from_the_newest_model_for_every_earlier_task(draw: Draw) -> None:
    graph = draw(SEEKR, "replay.answers=on_policy")
    label = f"{FIRST}--after--{SECOND}"
    rolled = graph[f"rollout/{label}"]
    assert dict(rolled.inputs) == {
        "model": graph[f"train/{SECOND}"],
        "replay": graph[f"sample/{FIRST}"],
    }
    assert graph[f"train/{THIRD}"].inputs[f"replay.{FIRST}"] == rolled
    taught = graph[f"teach/{label}"]
    assert taught.inputs["replay"] == rolled
    assert taught.inputs["teacher"] == graph[f"train/{FIRST}"]
    assert graph[f"train/{THIRD}"].inputs[f"targets.{FIRST}"] == taught
    gold = draw(SEEKR)
    assert {name for name in gold if gold[name] == graph.get(name)} >= names(gold, "sample")
    assert gold[f"train/{FIRST}"] == graph[f"train/{FIRST}"]


def test_frozen_heads_are_taught_anew_where_rows_are_answered_anew(draw: Draw) -> None:
    graph = draw(METHODS["frozen"], "replay.answers=on_policy")
    assert f"teach/{FIRST}--after--{SECOND}" in graph


def test_opr_is_replay_of_own_answers(draw: Draw) -> None:
    """But for its name, which is part of a training's settings."""
    opr = draw("method={name: opr}")
    own = draw(METHODS["replay"], "replay.answers=on_policy")
    assert opr.keys() == own.keys()
    assert names(opr, "rollout")
    assert touched(opr, own) == {f"train/{SECOND}", f"train/{THIRD}"}


def test_surprise_is_a_model_s_before_or_after_it_learns_the_task(draw: Draw) -> None:
    random = draw(METHODS["replay"])
    before = draw(METHODS["replay"], "replay.sampling=surprise_before")
    after = draw(METHODS["replay"], "replay.sampling=surprise_after")
    assert before[f"sample/{FIRST}"].sources.keys() == {"model"}
    assert "model" not in before[f"sample/{FIRST}"].inputs
    assert before[f"sample/{SECOND}"].inputs["model"] == before[f"train/{FIRST}"]
    assert after[f"sample/{SECOND}"].inputs["model"] == after[f"train/{SECOND}"]
    assert random[f"train/{FIRST}"] == before[f"train/{FIRST}"] == after[f"train/{FIRST}"]


def test_olora_is_given_the_adapters_of_every_earlier_task(draw: Draw) -> None:
    lora = "train.lora={rank: 2}"
    graph, plain = draw("method={name: olora}", lora), draw(METHODS["seqft"], lora)
    assert graph[f"train/{FIRST}"] == plain[f"train/{FIRST}"]
    inputs = graph[f"train/{THIRD}"].inputs
    assert {name: stage for name, stage in inputs.items() if name.startswith("past.")} == {
        f"past.{task}": graph[f"train/{task}"] for task in (FIRST, SECOND)
    }


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_stages_come_after_their_inputs_and_each_once(method: str, path: Path) -> None:
    config = load_config(path, [method])
    stages = build_graph(config, survey(config))
    seen: set[str] = set()
    for stage in stages:
        assert {other.fingerprint for other in stage.inputs.values()} <= seen
        assert stage.fingerprint not in seen
        seen.add(stage.fingerprint)


def test_global_selection_teaches_old_rows_anew_after_each_task(draw: Draw) -> None:
    graph = draw(METHODS["seekr"])
    assert names(graph, "teach") == {
        f"teach/{FIRST}",
        f"teach/{FIRST}--after--{SECOND}",
        f"teach/{SECOND}",
        f"teach/{FIRST}--after--{THIRD}",
        f"teach/{SECOND}--after--{THIRD}",
        f"teach/{THIRD}",
    }
    last = graph[f"train/{THIRD}"].inputs
    assert str(last[f"targets.{FIRST}"]) == f"teach/{FIRST}--after--{SECOND}"
    assert str(last[f"targets.{SECOND}"]) == f"teach/{SECOND}"


def test_whoever_teaches_a_task_is_the_model_right_after_it_with_the_newest_heads(
    draw: Draw,
) -> None:
    taught = draw(METHODS["seekr"])[f"teach/{FIRST}--after--{THIRD}"].inputs
    assert str(taught["teacher"]) == f"train/{FIRST}"
    assert str(taught["replay"]) == f"sample/{FIRST}"
    assert str(taught["heads"]) == f"select/{THIRD}"


def test_what_a_target_does_not_hold_does_not_bear_on_it(draw: Draw) -> None:
    derpp = draw(METHODS["derpp"])
    assert not changed(derpp, draw(METHODS["derpp"], "teach.attention_kept=3"))
    few = draw(METHODS["derpp"], "teach.logits_kept=3")
    assert touched(derpp, few) == names(derpp, "teach")
    for name in ("seqft", "replay"):
        settings = ("teach.logits_kept=3", "teach.attention_kept=3", "teach.bits=32")
        assert draw(METHODS[name]) == draw(METHODS[name], *settings)


def test_frozen_heads_are_taught_once(draw: Draw) -> None:
    graph = draw(METHODS["frozen"])
    assert names(graph, "teach") == {f"teach/{task}" for task in (FIRST, SECOND, THIRD)}
    last = graph[f"train/{THIRD}"].inputs
    for task in (FIRST, SECOND):
        assert str(last[f"targets.{task}"]) == f"teach/{task}"
        assert str(graph[f"teach/{task}"].inputs["heads"]) == f"select/{task}"


def test_a_selection_reads_the_scores_of_all_tasks_so_far(draw: Draw) -> None:
    graph = draw(METHODS["seekr"])
    for count, task in enumerate((FIRST, SECOND, THIRD), 1):
        scores = {str(stage) for stage in graph[f"select/{task}"].inputs.values()}
        assert scores == {f"score/{name}" for name in list(RULES)[:count]}


def test_a_score_compares_the_models_before_and_after_the_task(draw: Draw) -> None:
    graph = draw(METHODS["seekr"])
    second = graph[f"score/{SECOND}"]
    assert str(second.inputs["before"]) == f"train/{FIRST}"
    assert str(second.inputs["after"]) == f"train/{SECOND}"
    first = graph[f"score/{FIRST}"]
    assert set(first.sources) == {"before"} and "before" not in first.inputs


def test_each_model_is_evaluated_on_every_task_it_knows(draw: Draw) -> None:
    graph = draw(METHODS["replay"])
    for count, task in enumerate((FIRST, SECOND, THIRD), 1):
        inputs = {name: str(stage) for name, stage in graph[f"evaluate/{task}"].inputs.items()}
        known = {f"data.{name}": f"ingest/{name}" for name in list(RULES)[:count]}
        assert inputs == known | {f"model.{task}": f"train/{task}"}


def test_multi_task_learning_is_one_training_on_all_tasks(draw: Draw) -> None:
    graph = draw("method={name: mtl}")
    tasks = {f"ingest/{task}" for task in (FIRST, SECOND, THIRD)}
    assert graph.keys() == tasks | {"train/all", "evaluate/all"}
    assert {str(stage) for stage in graph["train/all"].inputs.values()} == tasks
    assert set(graph["train/all"].sources) == {"model"}
    shared = draw()
    assert all(graph[name].fingerprint == shared[name].fingerprint for name in tasks)


def test_forward_transfer_adds_an_evaluation_before_each_task_but_the_first(draw: Draw) -> None:
    plain, forward = draw(), draw("evaluate.forward_transfer=true")
    added = {f"evaluate/{task}--before" for task in (SECOND, THIRD)}
    assert forward.keys() - plain.keys() == added
    assert plain.items() <= forward.items()
    stage = forward[f"evaluate/{THIRD}--before"]
    assert {name: str(other) for name, other in stage.inputs.items()} == {
        f"data.{THIRD}": f"ingest/{THIRD}",
        f"model.{SECOND}": f"train/{SECOND}",
    }
    assert set(stage.sources) == {"model.base"}


def test_random_heads_depend_on_the_seed_and_ranked_ones_do_not(draw: Draw) -> None:
    both = (draw(f"seed={seed}", "method.heads=random") for seed in (0, 1))
    assert names(draw(), "select") <= touched(*both)
    assert not names(draw(), "select") & touched(draw("seed=0"), draw("seed=1"))


TEMPLATES = tuple(
    f"tasks.{i}.template='{name}: {{input}}'" for i, name in enumerate(list(RULES)[:3])
)
BORROWED = ("replay.borrowed=4", *TEMPLATES)


def test_borrowed_rows_come_from_the_model_before_and_all_kept_instructions(draw: Draw) -> None:
    graph = draw(METHODS["replay"], *BORROWED)
    assert names(graph, "borrow") == {f"borrow/{SECOND}", f"borrow/{THIRD}"}
    inputs = {name: str(stage) for name, stage in graph[f"borrow/{THIRD}"].inputs.items()}
    assert inputs == {
        "data": f"ingest/{THIRD}",
        "model": f"train/{SECOND}",
        f"replay.{FIRST}": f"sample/{FIRST}",
        f"replay.{SECOND}": f"sample/{SECOND}",
    }
    training = graph[f"train/{THIRD}"].inputs
    assert str(training[f"replay.{THIRD}--borrowed"]) == f"borrow/{THIRD}"
    assert not [name for name in training if name.startswith("targets.")]


def test_borrowed_rows_are_taught_by_the_model_that_answered_them(draw: Draw) -> None:
    graph = draw(METHODS["seekr"], *BORROWED)
    taught = graph[f"teach/{THIRD}--borrowed"].inputs
    assert {name: str(stage) for name, stage in taught.items()} == {
        "teacher": f"train/{SECOND}",
        "replay": f"borrow/{THIRD}",
        "heads": f"select/{SECOND}",
    }
    training = graph[f"train/{THIRD}"].inputs
    assert str(training[f"targets.{THIRD}--borrowed"]) == f"teach/{THIRD}--borrowed"
    before, after = draw(METHODS["seekr"], *TEMPLATES), graph
    first = {f"{kind}/{FIRST}" for kind in ("train", "sample", "score", "select", "teach")}
    assert all(before[name].fingerprint == after[name].fingerprint for name in first)


def test_only_methods_with_replay_borrow(draw: Draw) -> None:
    assert not names(draw(METHODS["ewc"], *BORROWED), "borrow")


def test_a_task_without_an_instruction_of_its_own_cannot_be_asked_of_other_inputs(
    draw: Draw,
) -> None:
    with pytest.raises(ConfigError, match="has no instruction apart from the input"):
        draw(METHODS["replay"], "replay.borrowed=4")


def test_general_ability_is_measured_before_and_after_learning(draw: Draw) -> None:
    asked = "general.tasks=[piqa]"
    assert not names(draw(), "general")
    assert names(draw(asked), "general") == {"general/base", f"general/{THIRD}"}
    every = draw(asked, "general.after=every")
    assert names(every, "general") == {f"general/{name}" for name in ("base", FIRST, SECOND, THIRD)}
    assert str(every[f"general/{SECOND}"].inputs["model"]) == f"train/{SECOND}"
    assert every["general/base"].sources.keys() == {"model"}
    joint = draw(asked, "method={name: mtl}")
    assert names(joint, "general") == {"general/base", "general/all"}


def test_general_tasks_that_do_not_exist_are_refused_at_start(draw: Draw) -> None:
    with pytest.raises(
        ConfigError, match=r"general.tasks has no_such_task, which lm-eval [\d.]+ does"
    ):
        draw("general.tasks=[no_such_task]")
    with pytest.raises(ConfigError, match=r"general.folder .*nowhere is no folder"):
        draw("general.tasks=[piqa]", "general.folder=nowhere")
    with pytest.raises(ConfigError, match=r"general.tasks is set and method pp trains an addition"):
        draw("general.tasks=[piqa]", "method={name: pp}", "data.max_length=24")


def test_validation_rows_move_what_is_evaluated_and_nothing_that_is_learnt(draw: Draw) -> None:
    held = draw("data.validation_rows=5")
    chosen = draw("data.validation_rows=5", "evaluate.split=validation")
    assert touched(held, chosen) == names(held, "evaluate")
    assert names(held, "ingest") <= touched(draw(), held)
    with pytest.raises(
        ConfigError, match=r"evaluate.split is validation and validation_rows is null"
    ):
        draw("evaluate.split=validation")
    with pytest.raises(ConfigError, match=r"validation_rows is 40 and there are 40 .*1\.\.39"):
        draw("data.validation_rows=40")


def test_sources_with_the_same_content_are_told(path: Path) -> None:
    same = f"tasks.1.test={path.parent}/data/{FIRST}/train.jsonl"
    config = load_config(path, [same])
    [text] = survey(config).warnings
    assert text.startswith(f"tasks.{FIRST}.train and tasks.{SECOND}.test have the same content")
    assert survey(load_config(path)).warnings == ()

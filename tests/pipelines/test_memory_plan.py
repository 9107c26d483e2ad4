"""Whether a stream's trainings fit: what is asked, what is answered, what is proposed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from pipelines import memory_plan
from pipelines.load import load_config
from pipelines.memory_plan import MemoryPlan, Rows, device_memory, plan_memory, work_of
from pipelines.memory_table import memory_table, shown
from pipelines.stream import Stream, open_stream
from pipelines.train_config import TrainConfig
from seekr.training.memory import GIB
from tests.pipelines.streams import MAX_LENGTH, make_stream

LARGE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"))


@pytest.fixture
def large(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that plans the stream with the shape of a 7B model, on GPUs."""
    LlamaConfig(**LARGE).save_pretrained(tmp_path)
    origin = memory_plan.Origin
    monkeypatch.setattr(memory_plan, "Origin", lambda **_: origin(folder=tmp_path))

    def plan(*settings: str, gib: float = 75.0) -> MemoryPlan:
        base = [
            *("train.gpus_per_worker=1", f"train.device_memory={gib}", "model.dtype=bfloat16"),
            *("data.max_length=64", "train.micro_batch_size=2"),
        ]
        return plan_memory(open_stream(path, [*base, *settings]))

    return plan


def printed(plan: MemoryPlan) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        console.print(memory_table(plan))
    return capture.get()


def opened(path: Path, *overrides: str) -> Stream:
    return open_stream(path, overrides)


def test_a_small_model_fits_this_machine(path: Path) -> None:
    plan = plan_memory(opened(path))
    assert plan.verdict == "fits" and not plan.alternatives
    assert "It fits." in printed(plan)
    found = json.loads(json.dumps(plan.to_json()))
    assert found["peak_bytes"] == sum(found["parts"].values())
    assert found["device"] == "cpu" and found["host_bytes"] == 0


def test_the_largest_passes_come_from_the_settings(path: Path) -> None:
    config = load_config(path, ["train.batch_size=12", "train.workers=2", "replay.batch_ratio=0.5"])
    rows = Rows(tokens=MAX_LENGTH, answers=8, known=False)
    work = work_of(config, config.train, rows, layers=2)
    assert (work.task.rows, work.task.tokens, work.task.answers) == (4, MAX_LENGTH, 32)
    assert (work.task_passes, work.replay_passes) == (2, 1)
    assert work.replay is not None and work.replay.rows == 3
    found = work.replay.distillation
    assert found is not None and (found.layers, found.heads, found.queries) == (1, 2, 8)


def test_packed_rows_are_one_sequence_and_never_shorter_than_a_row(path: Path) -> None:
    config = load_config(path, ["train.pack_tokens=20"])
    work = work_of(config, config.train, Rows(tokens=48, answers=8, known=False), layers=2)
    assert (work.task.rows, work.task.tokens, work.task.masked) == (1, 48, True)


@pytest.mark.parametrize(
    ("method", "replayed", "targets"),
    [
        ("seqft", False, False),
        ("replay", True, False),
        ("derpp", True, True),
        ("mtl", False, False),
    ],
)
def test_replay_and_targets_are_there_for_the_methods_that_have_them(
    path: Path, method: str, replayed: bool, targets: bool
) -> None:
    config = load_config(path, [f"method={{name: {method}}}"])
    work = work_of(config, config.train, Rows(tokens=48, answers=8, known=False), layers=2)
    assert (work.replay is not None) == replayed
    assert bool(work.replay and work.replay.distillation) == targets


@pytest.mark.parametrize(
    ("method", "numbers"),
    [("ewc", 2), ("recadam, pull_weight: 100", 1), ("olora", 0.5), ("seqft", 0), ("derpp", 0)],
)
def test_what_a_penalty_keeps_is_counted_per_worker(
    path: Path, method: str, numbers: float
) -> None:
    changes = [f"method={{name: {method}}}", "train.workers=2", "train.strategy=fsdp"]
    changes += ["train.lora={rank: 4}"] if method == "olora" else []
    plan = plan_memory(opened(path, *changes))
    assert plan.work.penalty == numbers
    trained = plan.estimate.parts.optimizer // 8  # a worker's share of it
    assert plan.estimate.parts.penalty == pytest.approx(4 * numbers * trained, rel=1e-3)


def test_targets_on_the_new_tasks_own_rows_are_counted(path: Path) -> None:
    plan = plan_memory(opened(path, "method={name: lwf}"))
    assert plan.work.task.distillation is not None and plan.estimate.parts.teacher > 0


@pytest.mark.parametrize(
    ("method", "virtual"), [("name: pp, prompt_length: 7", 14), ("name: l2p", 25)]
)
def test_prompts_are_longer_rows_before_a_frozen_model(
    large: Any, method: str, virtual: int
) -> None:
    short = "data.max_length=32"
    prompts, whole = large(f"method={{{method}}}", short), large("method={name: seqft}", short)
    assert prompts.rows.tokens == whole.rows.tokens + virtual
    assert prompts.estimate.parts.optimizer < 2**21 < whole.estimate.parts.optimizer
    assert prompts.estimate.parts.parameters < 0.6 * whole.estimate.parts.parameters
    assert prompts.verdict == "fits" and whole.verdict == "does not fit"
    small = large(f"method={{{method}}}", short, gib=14.0)
    assert not [item for item in small.alternatives if "train.lora" in item.changes]


def test_blocks_of_all_tasks_keep_their_layers_inputs(large: Any) -> None:
    short = "data.max_length=32"
    blocks, prompts = large("method={name: sapt}", short), large("method={name: l2p}", short)
    both = large("method={name: sapt, targets: [q_proj, v_proj, o_proj]}", short)
    tokens = blocks.work.task.positions
    assert blocks.rows.tokens < prompts.rows.tokens
    # 32 layers keep the input that q_proj and v_proj share, bfloat16; two tasks' blocks of rank 4.
    kept = 32 * tokens * 2 * (4096 + 2 * 8)
    less = prompts.work.task.positions - tokens
    per_token = prompts.estimate.parts.activations / prompts.work.task.positions
    plain = prompts.estimate.parts.activations - less * per_token
    assert blocks.estimate.parts.activations == pytest.approx(plain + kept, rel=0.1)
    assert both.estimate.parts.activations > blocks.estimate.parts.activations
    assert blocks.verdict == "fits"


def test_elastic_training_is_planned_with_its_fewest_workers(path: Path) -> None:
    elastic = plan_memory(opened(path, "train.workers={min: 2, max: 8}"))
    fixed = plan_memory(opened(path, "train.workers=2"))
    assert elastic.estimate == fixed.estimate and elastic.memory == fixed.memory


def test_a_device_that_nobody_knows_is_said_to_be_unknown(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = plan_memory(opened(path, "train.gpus_per_worker=1"))
    assert plan.verdict == "unknown" and plan.to_json()["device_memory_bytes"] is None
    assert "train.device_memory" in printed(plan)


def test_a_share_of_a_device_is_a_share_of_its_memory() -> None:
    train = TrainConfig(gpus_per_worker=0.5, device_memory=80)
    assert device_memory(train) == 40 * GIB
    assert device_memory(train.model_copy(update={"gpus_per_worker": 2})) == 80 * GIB


def test_what_would_fit_is_named_by_fields_and_does_fit(large: Any) -> None:
    plan = large("train.workers=8", gib=75)
    assert plan.verdict == "does not fit"
    first = plan.alternatives[0]
    assert first.same_result and first.changes["train.strategy"] == "fsdp"
    text = printed(plan)
    for item in plan.alternatives:
        settings = [f"{name}={json.dumps(value)}" for name, value in item.changes.items()]
        again = large("train.workers=8", *settings, gib=75)
        assert again.verdict == "fits" and again.estimate.peak == item.peak
        assert shown(item.peak) in text and next(iter(item.changes)) in text


def test_adapters_are_proposed_last_and_said_to_change_the_result(large: Any) -> None:
    found = large(gib=75).alternatives
    lora = [item for item in found if "train.lora" in item.changes]
    assert len(lora) == 1 and not lora[0].same_result
    assert all(item.same_result for item in found[: found.index(lora[0])])


def test_offload_is_proposed_where_one_device_is_all_there_is(large: Any) -> None:
    found = large(gib=75).alternatives
    assert any("train.offload" in item.changes for item in found)


def test_nothing_is_proposed_where_nothing_would_fit(large: Any) -> None:
    plan = large(gib=1)
    assert plan.verdict == "does not fit" and not plan.alternatives
    assert "no setting was found" in printed(plan)


def test_a_close_fit_is_not_called_a_fit(large: Any) -> None:
    peak = large(gib=1000).estimate.peak
    plan = large(gib=1.05 * peak / GIB)
    assert plan.verdict == "close" and "too close to tell" in printed(plan)

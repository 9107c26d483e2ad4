"""Trainings that cannot go on: no number for a loss, no memory. Said once, exactly, and not tried again.

Memory really runs out: adapters of 10^13 columns, a pass whose mask has 10^11 entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from pipelines import out_of_memory
from pipelines.out_of_memory import explain, explain_kill, is_out_of_memory
from pipelines.session import ray_session
from pipelines.stage import state
from pipelines.store import Store
from pipelines.stream import open_stream, run_streams, status_of
from pipelines.train_config import LoraConfig, TrainConfig
from pipelines.train_group import Shape, failure_config, process_group_backend
from seekr.errors import SeekrError
from tests.pipelines.running import end_shared_cluster, workers_started
from tests.pipelines.streams import make_model, make_stream, task_rows, write_rows

ray_test = pytest.mark.ray
LONG = 20_000
SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "deepspeed")]


@pytest.fixture(scope="module")
def stream_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stream(tmp_path_factory.mktemp("stream"), tasks=1, method={"name": "seqft"})


@pytest.fixture(scope="module")
def cluster(stream_path: Path) -> Iterator[None]:
    end_shared_cluster()
    with ray_session([open_stream(stream_path, ["train.workers=2"]).config]):
        yield


def run_and_fail(path: Path, storage: Path, *changes: str) -> tuple[str, int]:
    """Return what a run says that fails, and how many training workers it has started."""
    stream = open_stream(path, [f"storage={storage}", *changes], writable=True)
    before = workers_started()
    with pytest.raises(SeekrError) as failed:
        run_streams([stream], lambda *_: None, warn=pytest.fail)
    train = next(stage for stage in stream.stages if stage.name == "train")
    assert state(stream.store, train) == "failed"
    told = next(status for status in status_of(stream) if status.name == "train")
    assert told.error == str(failed.value)
    return str(failed.value), workers_started() - before


@ray_test
@pytest.mark.parametrize("strategy", ["ddp", *SLOWER])
def test_a_loss_that_is_no_number_ends_the_training_where_it_is_and_is_not_tried_again(
    stream_path: Path, tmp_path: Path, cluster: None, strategy: str
) -> None:
    changes = [f"train.strategy={strategy}", "train.learning_rate=1e+30", "train.epochs=4"]
    told, started = run_and_fail(
        stream_path, tmp_path, *changes, "train.workers=2", "train.checkpoint_every=1"
    )
    assert started == 2
    step = int(told.partition("diverged at step ")[2].partition(":")[0])
    assert 1 <= step <= 3  # the first step's update is the one that breaks the model
    assert f"The last good state is the checkpoint after step {step}." in told
    assert "both must be finite" in told and "The step's 8 rows are upper/" in told
    assert "Lower train.learning_rate" in told


@ray_test
@pytest.mark.slow
def test_a_model_that_does_not_fit_is_built_no_second_time(
    stream_path: Path, tmp_path: Path, cluster: None
) -> None:
    told, started = run_and_fail(stream_path, tmp_path, "train.lora={rank: 10000000000000}")
    assert started == 2  # the second one found the note
    assert "training of upper: worker 0 ran out of memory while building the model" in told
    assert "DefaultCPUAllocator" in told and "no checkpoint, the task is at its start" in told
    assert "Set train.strategy fsdp or deepspeed with more train.workers" in told
    assert "micro_batch_size" not in told and "lora" not in told.partition("Set ")[2]


def commits_what_it_has() -> bool:
    """Whether the kernel refuses memory that the machine does not have."""
    rule = Path("/proc/sys/vm/overcommit_memory")
    return rule.is_file() and rule.read_text().strip() != "1"


@ray_test
@pytest.mark.slow
@pytest.mark.skipif(not commits_what_it_has(), reason="this kernel promises any memory")
@pytest.mark.skipif(psutil.virtual_memory().total > 1 << 39, reason="so much memory may be there")
def test_a_pass_that_does_not_fit_is_named_with_its_step_and_shape(
    tmp_path: Path, cluster: None
) -> None:
    path = make_stream(
        tmp_path / "long",
        tasks=1,
        method={"name": "seqft"},
        data={"max_length": LONG + 100},
        train={"batch_size": 40, "pack_tokens": 1_000_000, "max_failures": 2},
    )
    make_model(path.parent / "model", max_positions=LONG + 100)
    rows = [row | {"input": row["input"] + "x" * LONG} for row in task_rows("upper", 40)]
    write_rows(path.parent / "data/upper/train.jsonl", rows)
    told, started = run_and_fail(path, tmp_path / "store")
    assert started == 2
    assert "ran out of memory while taking step 0 of 0..0, in a pass of 1 x 80" in told
    assert "tokens (sequences x length)" in told
    assert "Lower train.micro_batch_size (now 4) or train.pack_tokens (now 1000000)" in told
    assert "train.activation_checkpointing true" in told and "train.lora" in told


def test_torchs_own_words_for_no_memory_are_understood() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60)
    assert is_out_of_memory(refused.value)
    wrapped = ValueError("a pass failed")
    wrapped.__cause__ = refused.value
    for error in (wrapped, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory of the past"), None):
        assert not is_out_of_memory(other)


def test_a_note_counts_for_its_own_attempt_only(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    place = out_of_memory.Place(doing="taking step", step=4, steps=9, shape=(8, 512), checkpoint=3)
    assert out_of_memory.noted(store, "train/a/b", 1) is None
    out_of_memory.note(store, "train/a/b", 1, 2, place, RuntimeError("no memory\nmore lines"))
    found = out_of_memory.noted(store, "train/a/b", 1)
    assert found is not None and out_of_memory.noted(store, "train/a/b", 2) is None
    told = explain("a", found, TrainConfig(strategy="fsdp", pack_tokens=64), adapted=False)
    assert "worker 2 ran out of memory while taking step 4 of 0..8, in a pass of 8 x 512" in told
    assert "no memory. Kept is the checkpoint after step 3" in told and "more lines" not in told
    assert told.endswith(
        "Lower train.micro_batch_size (now 8) or train.pack_tokens (now 64), or set "
        "train.activation_checkpointing true, more train.workers, train.offload all, train.lora"
    )


def test_advice_leaves_out_what_is_set_already() -> None:
    saving = TrainConfig(
        strategy="deepspeed",
        offload="all",
        micro_batch_size=1,
        activation_checkpointing=True,
        lora=LoraConfig(),
    )
    note = {"rank": 0, "doing": "taking step", "step": 0, "steps": 1, "shape": None}
    told = explain("a", note | {"error": "x", "checkpoint": 0}, saving, adapted=True)
    assert told.endswith("Shorten the rows (data.max_length), or use devices with more memory")


def test_a_worker_that_ray_killed_for_memory_is_explained_and_other_deaths_are_not() -> None:
    # Ray 2.60's own words.
    dead = (
        "WorkerHealthCheckFailedError: A worker health check failed.\n"
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: "
        "192.0.2.2) was 12.17GB used / 23.54GB limit (0.517126)\n"
        "OOM kill reason: Memory usage 12903415808B exceeded threshold of 1263825792B"
    )
    told = explain_kill("a", ["RuntimeError: x", dead], TrainConfig(), adapted=False)
    assert told is not None and "its node ran low on memory" in told and "after all of" in told
    assert "was 12.17GB used / 23.54GB limit" in told and "OOM kill reason" not in told
    assert "train.micro_batch_size (now 8)" in told and "ray.parallel_stages" in told
    assert explain_kill("a", ["ActorDiedError: SIGKILL"], TrainConfig(), adapted=False) is None


def test_failures_and_starts_are_limited_and_preemptions_are_not() -> None:
    found = failure_config(Shape.of(TrainConfig(max_failures=2)))
    assert (found.max_failures, found.max_preemption_failures) == (2, -1)
    assert found.controller_failure_limit == 10  # without one, a group that never starts waits on
    often = Shape.of(TrainConfig(max_failures=20))
    assert failure_config(often).controller_failure_limit == 20
    # A start that fails for lack of nodes takes a minute.
    patient = Shape.of(TrainConfig(), patience=3600)
    assert failure_config(patient).controller_failure_limit == 62


@pytest.mark.parametrize(
    ("settings", "backend"),
    [
        ({}, None),
        ({"gpus_per_worker": 1}, None),
        ({"strategy": "fsdp", "gpus_per_worker": 1}, None),
        ({"strategy": "fsdp", "offload": "all"}, None),
        ({"strategy": "fsdp", "offload": "all", "gpus_per_worker": 1}, "cpu:gloo,cuda:nccl"),
        ({"strategy": "deepspeed", "offload": "all", "gpus_per_worker": 1}, None),
    ],
)
def test_offloaded_shards_are_reduced_in_host_memory(
    settings: dict[str, Any], backend: str | None
) -> None:
    assert process_group_backend(TrainConfig(**settings)) == backend

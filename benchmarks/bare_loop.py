"""The whole method in one process and one file: the stream without a pipeline.

    python -m benchmarks.bare_loop --tasks DIR --method seekr

runs a stream of <task>/{train,test}.jsonl folders in plain PyTorch: no Ray, no storage, no
restart. It is what the pipeline's overhead is measured against, so it makes the same forward and
backward passes on the same rows. Read `_replay_loss` for the method.

Shape suffixes: L layers, H heads, B batch.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from seekr.attention import probing, token_positions
from seekr.attention_kl import reduce_attention_kl
from seekr.batch_targets import BatchTargets, collate_targets
from seekr.batches import BatchPlan
from seekr.collation import Batch, collate, collate_prompts
from seekr.distillation import DistillationProbe
from seekr.importance import HeadArray, combine, forgettability, score_batch, task_sensitivity
from seekr.losses import answer_nll, logit_kl
from seekr.metrics import AccuracyMatrix, exact_match
from seekr.models import generate_greedy, load_model, load_tokenizer
from seekr.prompts import Example, Template, TokenizedRow, encode, eos_id_of, pad_id_of
from seekr.sampling import draw, query_positions, replay_size
from seekr.selection import HeadSelection, select_heads
from seekr.teacher import Keep, TeacherTarget, place_positions, teach_batch
from seekr.teacher_store import Bits, decode_target, encode_target

MethodName = Literal["seqft", "replay", "derpp", "seekr"]
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that bears on a run; the defaults are the demo's."""

    tasks_dir: Path
    task_names: tuple[str, ...] = ("reverse", "swap", "rotate", "fold")
    model_dir: Path = REPOSITORY / "examples" / "tiny-llama"
    seed: int = 0
    train_rows: int | None = None
    test_rows: int | None = None
    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    schedule: Literal["constant", "linear"] = "linear"
    warmup_steps: int = 10
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    replay_ratio: float = 0.01
    batch_ratio: float = 0.5
    replay_weight: float = 0.5
    attention_weight: float = 10.0
    layer_budget: int = 3
    head_budget: int = 16
    query_budget: int | None = None
    logits_kept: int | None = 64
    attention_kept: int | None = 24
    bits: Bits = 16
    max_length: int = 64
    max_answer_length: int = 16
    threads: int = 2


@dataclass(slots=True, kw_only=True)
class Result:
    """Scores R by (model after, task), and where the time went, in seconds by phase."""

    method: MethodName
    matrix: AccuracyMatrix
    seconds: dict[str, float] = field(default_factory=dict)
    heads: dict[str, HeadSelection] = field(default_factory=dict)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's wall time to a phase."""
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started


@dataclass(slots=True, kw_only=True)
class _Task:
    """One learnt task: its replay rows, the model that had just learnt it, its head statistics."""

    name: str
    replay: list[TokenizedRow]
    model: PreTrainedModel | None = None
    importance: tuple[HeadArray, HeadArray] | None = None


def run(method: MethodName, settings: Settings) -> Result:
    """Learn the tasks in order with one method, and test on all tasks so far after each."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    names = settings.task_names
    result = Result(method=method, matrix=AccuracyMatrix(tasks=names))
    cells: dict[tuple[str, str], float] = {}
    with result.timed("load"):
        model = load_model(settings.model_dir, dtype=torch.float32)
        tokenizer = load_tokenizer(settings.model_dir)
    with result.timed("ingest"):
        train = {name: _rows(settings, tokenizer, name, "train") for name in names}
        test = {name: _rows(settings, tokenizer, name, "test") for name in names}
    learnt: list[_Task] = []
    targets: dict[str, TeacherTarget] = {}
    for index, name in enumerate(names):
        before = copy.deepcopy(model) if method == "seekr" else None
        with result.timed("train"):
            _train(method, settings, model, tokenizer, name, train[name], learnt, targets)
        learnt.append(_Task(name=name, replay=_draw(settings, train[name])))
        if method in ("derpp", "seekr"):
            learnt[-1].model = copy.deepcopy(model)
        heads = None
        if before is not None:
            with result.timed("score"):
                learnt[-1].importance = _score(settings, before, model, tokenizer, learnt[-1])
            with result.timed("select"):
                heads = result.heads[name] = _select(settings, learnt)
        with result.timed("teach"):
            targets = _teach(settings, tokenizer, learnt, heads)
        with result.timed("evaluate"):
            for seen in names[: index + 1]:
                cells[name, seen] = evaluate(settings, model, tokenizer, test[seen])
    result.matrix = AccuracyMatrix(tasks=names, cells=cells)
    return result


def _rows(
    settings: Settings, tokenizer: PreTrainedTokenizerBase, name: str, split: str
) -> list[TokenizedRow]:
    lines = (settings.tasks_dir / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    limit = settings.train_rows if split == "train" else settings.test_rows
    return [
        encode(
            Example(input=record["prompt"], references=(record["answer"],)),
            Template.parse("{input}"),
            tokenizer,
            max_length=settings.max_length,
            max_answer_length=settings.max_answer_length,
        )
        for record in map(json.loads, lines[:limit])
    ]


def _draw(settings: Settings, rows: Sequence[TokenizedRow]) -> list[TokenizedRow]:
    by_id = {row.row_id: row for row in rows}
    size = replay_size(len(rows), ratio=settings.replay_ratio)
    return [by_id[row_id] for row_id in draw(tuple(by_id), size, settings.seed)]


def _train(
    method: MethodName,
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    rows: Sequence[TokenizedRow],
    learnt: Sequence[_Task],
    targets: dict[str, TeacherTarget],
) -> None:
    """Fine-tune on one task, with replay rows of the earlier ones beside it."""
    replay = [row for task in learnt for row in task.replay] if method != "seqft" else []
    plan = BatchPlan(
        row_ids=[f"{name}/{row.row_id}" for row in rows],
        replay_ids=[f"{task.name}/{row.row_id}" for task in learnt for row in task.replay]
        if replay
        else [],
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        batch_ratio=settings.batch_ratio,
        seed=settings.seed,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        weight_decay=settings.weight_decay,
    )
    pad_id = pad_id_of(tokenizer)
    model.train()
    for step in range(plan.num_steps):
        chosen = plan.step(step)
        batch = collate([rows[index] for index in chosen.task], pad_id)
        nll_B, count_B = answer_nll(_logits(model, batch), batch.labels_BT)
        (nll_B.sum() / count_B.sum()).backward()
        if len(chosen.replay):
            batch = collate([replay[index] for index in chosen.replay], pad_id)
            _replay_loss(method, settings, model, batch, targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step, plan.num_steps)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def _learning_rate(settings: Settings, step: int, num_steps: int) -> float:
    """Return the rate of a step: linear warm-up, then constant or linear to 0."""
    warmup = settings.warmup_steps
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    left = 1.0 - (step - warmup) / max(1, num_steps - warmup)
    return settings.learning_rate * (left if settings.schedule == "linear" else 1.0)


def _replay_loss(
    method: MethodName,
    settings: Settings,
    model: PreTrainedModel,
    batch: Batch,
    targets: dict[str, TeacherTarget],
) -> Tensor:
    """Equation (13) without L_task: l1 * L_replay + (1 - l1) * L_ld + l2 * L_seekr."""
    if method == "replay":
        nll_B, count_B = answer_nll(_logits(model, batch), batch.labels_BT)
        return nll_B.sum() / count_B.sum()
    taught = collate_targets([targets[row_id] for row_id in batch.row_ids], batch)
    attention = torch.zeros(())
    if method == "seekr":
        logits_BTV, attention = _attention_loss(model, batch, taught)
    else:
        logits_BTV = _logits(model, batch)
    nll_B, count_B = answer_nll(logits_BTV, batch.labels_BT)
    kl_B, _ = logit_kl(logits_BTV, taught)
    tokens = count_B.sum()
    return (
        settings.replay_weight * nll_B.sum() / tokens
        + (1.0 - settings.replay_weight) * kl_B.sum() / tokens
        + settings.attention_weight * attention
    )


def _attention_loss(
    model: PreTrainedModel, batch: Batch, taught: BatchTargets
) -> tuple[Tensor, Tensor]:
    """Return the logits and the mean attention KL of the selected heads, from one forward pass."""
    probe = DistillationProbe(taught.heads_by_layer, taught.positions_BQ, taught.attention)
    with probing(model, probe):
        logits_BTV = _logits(model, batch)
    return logits_BTV, reduce_attention_kl(probe.kl_by_layer, taught.valid).mean()


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    return model(
        input_ids=batch.input_ids_BT,
        attention_mask=batch.attention_mask_BT,
        position_ids=token_positions(batch.attention_mask_BT),
        use_cache=False,
    ).logits


def _score(
    settings: Settings,
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: _Task,
) -> tuple[HeadArray, HeadArray]:
    """Return the task's sensitivity (7) and forgettability (9) over its replay rows."""
    batch = collate(task.replay, pad_id_of(tokenizer))
    positions_BQ = place_positions(_queries(settings, task.replay), batch)
    stats = score_batch(before, after, batch, positions_BQ)
    return task_sensitivity(stats, "paper"), forgettability(stats, "paper")


def _select(settings: Settings, learnt: Sequence[_Task]) -> HeadSelection:
    scores = [task.importance for task in learnt if task.importance is not None]
    return select_heads(combine(scores), settings.layer_budget, settings.head_budget)


def _teach(
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    learnt: Sequence[_Task],
    heads: HeadSelection | None,
) -> dict[str, TeacherTarget]:
    """Teach the replay rows of every task again, each by the model that had just learnt it.

    Targets are what the pipeline's students read: the kept part, rounded as it is stored.
    """
    targets: dict[str, TeacherTarget] = {}
    for task in learnt:
        if task.model is None:
            continue
        taught = teach_batch(
            task.model,
            collate(task.replay, pad_id_of(tokenizer)),
            None if heads is None else heads.by_layer(),
            _queries(settings, task.replay),
            logits=True,
            keep=Keep(logits=settings.logits_kept, attention=settings.attention_kept),
        )
        for row, target in zip(task.replay, taught, strict=True):
            targets[row.row_id] = decode_target(encode_target(target, settings.bits))
    return targets


def _queries(settings: Settings, rows: Sequence[TokenizedRow]):
    return [
        query_positions(settings.seed, row.row_id, len(row.input_ids), settings.query_budget)
        for row in rows
    ]


def evaluate(
    settings: Settings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
) -> float:
    """Return the share of rows whose greedy answer matches exactly."""
    answers = generate_greedy(
        model,
        collate_prompts(rows, pad_id_of(tokenizer)),
        settings.max_answer_length,
        eos_id_of(tokenizer),
        pad_id_of(tokenizer),
    )
    texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]
    hits = [exact_match(text, row.references) for text, row in zip(texts, rows, strict=True)]
    return sum(hits) / len(hits)


def report(result: Result) -> str:
    """Return R, OP, BWT and seconds as text."""
    lines = [f"{result.method}"]
    for name, row in zip(result.matrix.tasks, result.matrix.rows(), strict=True):
        cells = "".join("     -" if score is None else f"{score:6.2f}" for score in row)
        lines.append(f"  after {name:<10}{cells}")
    op, bwt = result.matrix.op(), result.matrix.bwt()
    assert op is not None
    lines.append(f"  OP {op:.3f}  BWT {'-' if bwt is None else f'{bwt:+.3f}'}")
    spent = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in result.seconds.items())
    return "\n".join([*lines, f"  seconds {sum(result.seconds.values()):.1f}: {spent}"])


def main() -> None:
    """Parse the command line, run the methods and print their tables."""
    parser = argparse.ArgumentParser(description="Run a stream in one process without a pipeline.")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of <task>/ folders")
    parser.add_argument("--method", nargs="+", choices=get_args(MethodName), default=["seekr"])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=JSON", help="other settings")
    args = parser.parse_args()
    known = {item.name for item in fields(Settings)} - {"tasks_dir"}
    values = dict(item.split("=", 1) for item in args.set)
    if unknown := sorted(values.keys() - known):
        parser.error(f"unknown setting {unknown[0]!r}; allowed are {', '.join(sorted(known))}")
    changed = {name: json.loads(value) for name, value in values.items()}
    if "model_dir" in changed:
        changed["model_dir"] = Path(changed["model_dir"])
    if "task_names" in changed:
        changed["task_names"] = tuple(changed["task_names"])
    settings = Settings(tasks_dir=args.tasks, **changed)
    for method in args.method:
        print(report(run(method, settings)), flush=True)


if __name__ == "__main__":
    main()

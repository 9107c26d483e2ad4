"""A small training with everything in it: a GQA Llama on disk, task rows, replay rows with targets.

The targets come from another model than the one trained, so that all parts of the loss are there from
the first step. Everything is a pure function of nothing: all processes see the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from seekr.attention import register
from seekr.collation import collate
from seekr.methods.seekr import SEEKR
from seekr.models import byte_tokenizer, save_model, tiny_llama
from seekr.prompts import TokenizedRow
from seekr.sampling import query_positions
from seekr.teacher import Keep, teach_batch
from seekr.teacher_store import decode_target, encode_target
from seekr.training.microbatches import TrainingRows
from seekr.training.settings import Lora, Recipe

STEPS = 20
SHAPE = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 64}
METHOD = SEEKR(name="seekr", layer_budget=2, head_budget=4, query_budget=8, attention_weight=10.0)
HEADS = {0: (0, 3), 1: (1, 2)}
LORA = Lora(rank=4, alpha=8.0, targets=("q_proj", "v_proj", "down_proj"))
PAD_ID = 0


def recipe(lora: Lora | None = None, **changes: object) -> Recipe:
    """Return 20 steps of 6 task rows and 3 replay rows, with warm-up and decay."""
    values: dict[str, object] = {
        "epochs": 5,
        "batch_size": 6,
        "learning_rate": 2e-3,
        "schedule": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "batch_ratio": 0.5,
        "lora": lora,
        "seed": 3,
    }
    return Recipe(**values | changes)  # pyright: ignore[reportArgumentType]


def sharp_llama(seed: int, **shape: int) -> LlamaForCausalLM:
    """Return a random model whose attention is far from even."""
    model = tiny_llama(**SHAPE | shape, seed=seed)
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.data *= 8.0
    return model


def write_model(folder: Path, **shape: int) -> Path:
    """Write the model that is trained."""
    save_model(sharp_llama(0, **shape), byte_tokenizer(), folder)
    return folder


def training_rows(replay: bool = True, targets: list[bytes] | None = None) -> TrainingRows:
    """Return 23 task rows of uneven length and 7 replay rows with their targets.

    Args:
        replay: Whether there are any replay rows. targets: of the task rows, if they have some.
    """
    task, replayed = _rows(23, seed=1), _rows(7 if replay else 0, seed=2)
    return TrainingRows(
        task=task,
        task_ids=[f"new/{row.row_id}" for row in task],
        replay=replayed,
        replay_ids=[f"old/{row.row_id}" for row in replayed],
        targets=_targets(replayed) if replay else None,
        task_targets=targets,
    )


def recorded_weights() -> list[bytes]:
    """Return targets of the replay rows that say what each gave to a first block and to a second."""
    return [
        encode_target(replace(decode_target(target), weights=torch.tensor([0.6, 0.4])))
        for target in _targets(_rows(7, seed=2))
    ]


def task_targets() -> list[bytes]:
    """Return targets of the task rows."""
    return _targets(_rows(23, seed=1))


def _rows(count: int, seed: int) -> list[TokenizedRow]:
    draw = np.random.default_rng(seed)
    rows: list[TokenizedRow] = []
    for index in range(count):
        length = int(draw.integers(6, 30))
        ids = draw.integers(2, 258, size=length).astype(np.int32)
        rows.append(
            TokenizedRow(
                row_id=f"{seed}-{index}",
                input="",
                references=("",),
                input_ids=ids,
                prompt_length=length - int(draw.integers(1, 5)),
            )
        )
    return rows


def _targets(rows: list[TokenizedRow]) -> list[bytes]:
    register()
    teacher = sharp_llama(7)
    teacher.set_attn_implementation("seekr")
    positions = [query_positions(0, row.row_id, len(row.input_ids), 8) for row in rows]
    targets = teach_batch(
        teacher,
        collate(rows, PAD_ID),
        HEADS,
        positions,
        logits=True,
        keep=Keep(logits=32, attention=8),
    )
    return [encode_target(target) for target in targets]

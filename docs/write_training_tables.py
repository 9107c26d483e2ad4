"""Writes the tables of docs/training.md from the estimate, so that they cannot go stale.

    python docs/write_training_tables.py

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; everything else of the page is written
by hand. `tests/test_docs.py` fails while the page differs from what this writes. Models are built
from their published shapes on the meta device: no file of them is needed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from seekr.training.activations import Distillation, Pass
from seekr.training.build import Origin
from seekr.training.memory import GIB, MemoryEstimate, Work, estimate
from seekr.training.model_sizes import ModelSizes, read_sizes
from seekr.training.settings import Execution, Lora, Recipe

TARGET = Path(__file__).with_name("training.md")
# Published shapes: hidden width, MLP width, layers, heads, key heads, vocabulary.
SHAPES = {
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 32000),
    "Llama-2-13B": (5120, 13824, 40, 40, 40, 32000),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
}
LENGTHS = (1024, 4096)
BATCH, ANSWERS = 32, 256
LORA = Lora(rank=16, alpha=32.0)
# SEEKR's and the teacher store's defaults.
DISTILLATION = Distillation(layers=24, heads=128, queries=100, attention_kept=24, logits_kept=64)
DEVICES = {"80 GB": 80e9, "141 GB": 141e9}
MARGIN = 1.15
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A configuration: a model on some GPUs."""

    model: str
    gpus: int
    what: str
    execution: Execution
    recipe: dict[str, Any] = field(default_factory=lambda: dict[str, Any]())


def _execution(strategy: str, **settings: Any) -> Execution:
    settings = {"micro_batch_size": 1, "activation_checkpointing": True} | settings
    return Execution(strategy=strategy, **settings)  # pyright: ignore[reportArgumentType]


def _ddp(model: str, gpus: int, **settings: Any) -> Line:
    return Line(model=model, gpus=gpus, what="ddp", execution=_execution("ddp", **settings))


def _lora(model: str, gpus: int, strategy: str = "ddp", **settings: Any) -> Line:
    what = f"{strategy}, LoRA"
    recipe = {"lora": LORA}
    return Line(
        model=model,
        gpus=gpus,
        what=what,
        execution=_execution(strategy, **settings),
        recipe=recipe,
    )


def _fsdp(model: str, gpus: int, **settings: Any) -> Line:
    what = "fsdp" + (f", offload {settings['offload']}" if "offload" in settings else "")
    return Line(model=model, gpus=gpus, what=what, execution=_execution("fsdp", **settings))


def _zero(model: str, gpus: int, stage: int, **settings: Any) -> Line:
    what = f"ZeRO-{stage}" + (f", offload {settings['offload']}" if "offload" in settings else "")
    execution = _execution("deepspeed", zero_stage=stage, **settings)
    return Line(model=model, gpus=gpus, what=what, execution=execution)


def _eight_bit(model: str, gpus: int) -> Line:
    recipe = {"optimizer": "adamw_8bit"}
    execution = _execution("ddp")
    return Line(model=model, gpus=gpus, what="ddp, 8-bit AdamW", execution=execution, recipe=recipe)


def _on_one(model: str) -> list[Line]:
    return [
        _ddp(model, 1),
        _eight_bit(model, 1),
        _lora(model, 1),
        _fsdp(model, 1, offload="all"),
        _zero(model, 1, 2, offload="optimizer"),
        _zero(model, 1, 3, offload="all"),
    ]


def _on_many(model: str, gpus: int) -> list[Line]:
    return [
        _lora(model, gpus),
        _fsdp(model, gpus),
        _zero(model, gpus, 2),
        _zero(model, gpus, 3),
        _lora(model, gpus, "fsdp"),
    ]


TABLES: dict[str, list[Line]] = {
    "one": [*_on_one("Llama-2-7B"), *_on_one("Llama-3-8B")],
    "eight": [
        *_on_many("Llama-2-7B", 8),
        *_on_many("Llama-3-8B", 8),
        *_on_many("Llama-2-13B", 8),
    ],
    "many": _on_many("Llama-2-13B", 32),
}


def render(page: str) -> str:
    """Return the page with its tables written anew."""
    return _BLOCK.sub(lambda m: m[1] + "\n".join(_table(TABLES[m[2]])) + "\n" + m[3], page)


def _table(lines: Sequence[Line]) -> Iterator[str]:
    heads = [f"{tokens} tokens" for tokens in LENGTHS]
    sizes = [f"{tokens}, no recomputation" for tokens in LENGTHS[:1]]
    yield f"| model | GPUs | train | {' | '.join([*heads, *sizes])} | host | fits at {LENGTHS[-1]} |"
    yield "|---|---:|---|---:|---:|---:|---:|---|"
    for line in lines:
        found = [_estimate(line, tokens) for tokens in LENGTHS]
        plain = _estimate(line, LENGTHS[0], checkpointing=False)
        figures = [f"{item.peak / GIB:.0f}" for item in (*found, plain)]
        host = f"{found[-1].host / GIB:.0f}"
        cells = [line.model, str(line.gpus), line.what, *figures, host, _fitting(found[-1])]
        yield f"| {' | '.join(cells)} |"


def _estimate(line: Line, tokens: int, checkpointing: bool = True) -> MemoryEstimate:
    recipe = Recipe(
        epochs=1, batch_size=BATCH, learning_rate=1e-5, dtype=torch.bfloat16, **line.recipe
    )
    execution = line.execution
    if not checkpointing:
        settings = {
            name: getattr(execution, name) for name in ("strategy", "zero_stage", "offload")
        }
        execution = Execution(**settings, micro_batch_size=1)
    answers, passes = min(ANSWERS, tokens), -(-BATCH // line.gpus)
    task = Pass(rows=1, tokens=tokens, answers=answers, masked=False)
    replay = Pass(rows=1, tokens=tokens, answers=answers, masked=False, distillation=DISTILLATION)
    work = Work(task=task, replay=replay, task_passes=passes, replay_passes=passes)
    sizes = _sizes(line.model, recipe.lora)
    return estimate(sizes, recipe, execution, work, workers=line.gpus, device="cuda")


@cache
def _sizes(model: str, lora: Lora | None) -> ModelSizes:
    width, inner, layers, heads, key_heads, vocab = SHAPES[model]
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=8192,
    )
    recipe = Recipe(epochs=1, batch_size=1, learning_rate=1.0, lora=lora, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return read_sizes(Origin(folder=Path(folder)), recipe)


def _fitting(found: MemoryEstimate) -> str:
    """Return the smallest device that holds it with the estimate's error, or barely without."""
    for suffix, margin in (("", MARGIN), (", barely", 1.0)):
        names = [name for name, size in DEVICES.items() if found.peak * margin <= size]
        if names:
            return names[0] + suffix
    return "neither"


if __name__ == "__main__":
    TARGET.write_text(render(TARGET.read_text(encoding="utf-8")), encoding="utf-8")

"""The training of `problem` written as simply as it can be: one process, float32, whole logits.

No micro-batches, no sharding, no checkpointing; the loss is written out from equation 13 and AdamW is
torch's own, unfused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from seekr.answers import WholeLogits
from seekr.attention import probing
from seekr.batch_targets import collate_targets
from seekr.batches import BatchPlan
from seekr.collation import collate
from seekr.losses import AnswerNLL, LogitKL
from seekr.models import load_model
from seekr.teacher_store import decode_target
from seekr.training.build import Origin, empty_model, origin_source
from seekr.training.schedule import learning_rate
from seekr.training.settings import Recipe
from tests.seekr.training.problem import METHOD, PAD_ID, training_rows


def reference_curve(folder: Path, recipe: Recipe) -> list[dict[str, float]]:
    """Return per step the loss, its four parts and the gradient's norm."""
    model: Any = load_model(folder, dtype=torch.float32).train()
    if recipe.lora is not None:
        model = _with_adapters(model, folder, recipe)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
        foreach=False,
    )
    rows = training_rows()
    plan = BatchPlan(
        row_ids=rows.task_ids,
        replay_ids=rows.replay_ids,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        batch_ratio=recipe.batch_ratio,
        seed=recipe.seed,
    )
    curve: list[dict[str, float]] = []
    for step in range(plan.num_steps):
        chosen = plan.step(step)
        optimizer.zero_grad()
        parts = _task_part(model, [rows.task[i] for i in chosen.task])
        loss = parts["task"]
        if len(chosen.replay):
            assert rows.targets is not None
            encoded = [rows.targets[i] for i in chosen.replay]
            replayed = _replay_parts(model, [rows.replay[i] for i in chosen.replay], encoded)
            loss = loss + 0.5 * replayed["replay"] + 0.5 * replayed["logits"]
            loss = loss + METHOD.attention_weight * replayed["attention"]
            parts |= replayed
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, plan.num_steps)
        optimizer.step()
        entry = {name: part.item() for name, part in parts.items()}
        curve.append(entry | {"loss": loss.item(), "grad_norm": norm.item()})
    return curve


def _task_part(model: Any, rows: list[Any]) -> dict[str, torch.Tensor]:
    batch = collate(rows, PAD_ID)
    logits = model(**batch.inputs()).logits
    (nll_B,) = WholeLogits(logits).sums(AnswerNLL(batch.labels_BT))
    return {"task": nll_B.sum() / (batch.labels_BT >= 0).sum()}


def _replay_parts(model: Any, rows: list[Any], encoded: list[bytes]) -> dict[str, torch.Tensor]:
    batch = collate(rows, PAD_ID)
    targets = collate_targets([decode_target(target) for target in encoded], batch)
    probe = METHOD.distillation(targets)
    with probing(model, probe):
        logits = WholeLogits(model(**batch.inputs()).logits)
    nll_B, kl_B = logits.sums(AnswerNLL(batch.labels_BT), LogitKL(targets))
    tokens = (batch.labels_BT >= 0).sum()
    attention = []
    for row in range(len(rows)):
        of_layers = [
            kl[row][targets.valid[layer][row]].mean() for layer, kl in probe.kl_by_layer.items()
        ]
        attention.append(torch.stack(of_layers).mean())
    return {
        "replay": nll_B.sum() / tokens,
        "logits": kl_B.sum() / tokens,
        "attention": torch.stack(attention).mean(),
    }


def _with_adapters(model: Any, folder: Path, recipe: Recipe) -> Any:
    """peft's own model, its adapters started as the recipe says."""
    assert recipe.lora is not None and recipe.lora.targets is not None
    settings = LoraConfig(
        r=recipe.lora.rank,
        lora_alpha=int(recipe.lora.alpha),
        target_modules=list(recipe.lora.targets),
        task_type="CAUSAL_LM",
    )
    wrapped = get_peft_model(model, settings)
    origin = Origin(folder=folder)
    source = origin_source(origin, empty_model(origin, recipe), recipe)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            ours = name.removeprefix("base_model.model.").replace(".default.", ".seekr.")
            parameter.data.copy_(source.read(ours, 0, parameter.numel()).view_as(parameter))
    return wrapped

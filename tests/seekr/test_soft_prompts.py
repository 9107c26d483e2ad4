"""Virtual tokens against inputs made of vectors by hand; which prompts a row takes; files and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from seekr.addition import attach, seeing
from seekr.addition_files import write_addition
from seekr.collation import collate, collate_prompts
from seekr.errors import ConfigError
from seekr.forward import batch_logits
from seekr.models import byte_tokenizer, generate_greedy, load_model, save_model, tiny_llama
from seekr.prompts import TokenizedRow
from seekr.soft_prompts import (
    KEYS,
    POOL,
    SoftPrompts,
    prefixed,
)
from tests.seekr.tiny import row

VOCAB = 258
SHAPE = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 64}
TWO_TASKS = SoftPrompts(kind="progressive", length=3, tasks=("old", "new"))
A_POOL = SoftPrompts(kind="pool", length=2, pool=5, selected=2)
SPECS = {"progressive": TWO_TASKS, "pool": A_POOL}


ROWS = [row("a", [5, 9, 3, 7, 1], 3), row("b", [80, 81, 82, 83, 84, 85, 2, 1], 6)]


def model(spec: SoftPrompts) -> Any:
    made: Any = tiny_llama(**SHAPE, seed=1).double().eval()
    draw = torch.Generator().manual_seed(2)
    attach(made, spec)
    embedding = made.get_input_embeddings()
    for name, shape in spec.leaves(SHAPE["hidden"]).items():
        values = torch.randn(shape, generator=draw, dtype=torch.float64)
        getattr(embedding, name).data = values * 0.3
    return made


def vectors_by_hand(made: Any, spec: SoftPrompts, one: TokenizedRow) -> Tensor:
    """The vectors before a row, [S, D]: newest prompt first, or the prompts nearest to its input."""
    embedding = made.get_input_embeddings()
    if spec.kind == "progressive":
        return torch.cat([embedding.seekr_prompt_1, embedding.seekr_prompt_0])
    words = embedding.weight[torch.from_numpy(one.input_ids[: one.prompt_length]).long()]
    query, keys = words.mean(dim=0), getattr(embedding, KEYS)
    cosine = (keys @ query) / (keys.norm(dim=1) * query.norm())
    best = sorted(range(len(keys)), key=lambda m: -float(cosine[m].detach()))[: spec.selected]
    return torch.cat([getattr(embedding, POOL)[m] for m in best])


def by_hand(made: Any, spec: SoftPrompts, one: TokenizedRow) -> Tensor:
    """Logits of a row whose embeddings are put together without virtual tokens, [T, V]."""
    words = made.get_input_embeddings().weight[torch.from_numpy(one.input_ids).long()]
    embedded = torch.cat([vectors_by_hand(made, spec, one), words])
    return made(inputs_embeds=embedded[None]).logits[0]


@pytest.mark.parametrize("kind", SPECS)
def test_virtual_tokens_are_vectors_before_the_input(kind: str) -> None:
    spec = SPECS[kind]
    made, count = model(spec), len(spec.slots())
    batch = collate(prefixed(ROWS, spec.slots(), VOCAB), pad_id=0)
    with seeing(made, batch):
        found = batch_logits(made, batch)
    for index, one in enumerate(ROWS):
        start, length = int(batch.start_B[index]), count + len(one.input_ids)
        torch.testing.assert_close(
            found[index, start : start + length], by_hand(made, spec, one), rtol=1e-9, atol=1e-12
        )
        labels = batch.labels_BT[index, start : start + length]
        assert labels[: count + one.prompt_length].eq(-100).all()
        assert labels[count + one.prompt_length :].tolist() == list(
            one.input_ids[one.prompt_length :]
        )


@pytest.mark.parametrize("kind", SPECS)
def test_generation_sees_the_vectors_at_every_step(kind: str) -> None:
    spec = SPECS[kind]
    made = model(spec)
    prompts = collate_prompts(prefixed(ROWS, spec.slots(), VOCAB), pad_id=0)
    found = generate_greedy(made, prompts, 5, eos_id=1, pad_id=0)
    for one, ids in zip(ROWS, found, strict=True):
        so_far: list[int] = []
        while len(so_far) < 5:
            asked = [*one.input_ids[: one.prompt_length].tolist(), *so_far]
            grown = row("x", asked, one.prompt_length)
            following = int(by_hand(made, spec, grown)[-1].argmax())
            if following == 1:
                break
            so_far.append(following)
        assert ids == so_far


def test_a_pool_pulls_chosen_keys_towards_their_inputs_and_leaves_the_others() -> None:
    made, batch = model(A_POOL), collate(prefixed(ROWS, A_POOL.slots(), VOCAB), pad_id=0)
    embedding = made.get_input_embeddings()
    with seeing(made, batch) as state:
        batch_logits(made, batch)
        assert state is not None and state.pull_B is not None
        pull_B = state.pull_B
    keys, chosen = getattr(embedding, KEYS), set()
    for index, one in enumerate(ROWS):
        words = embedding.weight[torch.from_numpy(one.input_ids[: one.prompt_length]).long()]
        query = words.mean(dim=0)
        cosine = (keys @ query) / (keys.norm(dim=1) * query.norm())
        best = cosine.topk(2)
        chosen |= set(best.indices.tolist())
        assert float(pull_B[index].detach()) == pytest.approx(
            float((1 - best.values).sum().detach()), rel=1e-5
        )
    pull_B.sum().backward()
    moved = {m for m in range(A_POOL.pool) if keys.grad[m].abs().sum() > 0}
    assert moved == chosen and len(chosen) < A_POOL.pool
    assert embedding.weight.grad is None or not embedding.weight.grad.any()


def test_earlier_tasks_can_be_asked_with_the_prompts_of_their_time() -> None:
    assert TWO_TASKS.slots() == [3, 4, 5, 0, 1, 2]
    assert TWO_TASKS.slots("new") == TWO_TASKS.slots()
    assert TWO_TASKS.slots("old") == [0, 1, 2]
    with pytest.raises(ConfigError, match="prompts of old, new"):
        TWO_TASKS.slots("next")


@pytest.mark.parametrize("kind", SPECS)
def test_prompts_beside_a_model_come_back_with_it(kind: str, tmp_path: Path) -> None:
    spec = SPECS[kind]
    made = model(spec).float()
    tensors = {name: made.get_parameter(name).detach() for name in spec.shapes(made)}
    save_model(tiny_llama(**SHAPE, seed=1), byte_tokenizer(), tmp_path)
    write_addition(tmp_path, spec, tensors)
    loaded = load_model(tmp_path, dtype=torch.float32, attention="sdpa")
    batch = collate(prefixed(ROWS, spec.slots(), VOCAB), pad_id=0)
    with torch.no_grad(), seeing(loaded, batch), seeing(made, batch):
        torch.testing.assert_close(batch_logits(loaded, batch), batch_logits(made, batch))

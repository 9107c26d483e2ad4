"""SAPT's blocks against sums written from the equations; who sees what; what is trained; files and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from seekr.addition import attach, seeing
from seekr.addition_files import read_addition, write_addition
from seekr.collation import Batch, collate, collate_prompts
from seekr.errors import ConfigError
from seekr.forward import batch_logits
from seekr.losses import weights_kl
from seekr.models import byte_tokenizer, generate_greedy, load_model, save_model, tiny_llama
from seekr.prompts import TokenizedRow
from seekr.shared_attention import SharedAttention, weights_of
from tests.seekr.tiny import row

SHAPE = {"hidden": 16, "layers": 2, "heads": 2, "kv_heads": 1, "max_positions": 64}
ROWS = [row("a", [5, 9, 3, 7, 1], 3), row("b", [80, 81, 82, 83, 84, 85, 2, 1], 6)]
TASKS = ("first", "second", "third")


def spec_of(count: int, **changes: Any) -> SharedAttention:
    return SharedAttention(rank=2, alpha=6.0, width=5, tasks=TASKS[:count], **changes)


def model(spec: SharedAttention, scale: float = 0.3) -> Any:
    """Return a model with blocks that do something, and queries that differ between rows."""
    made: Any = tiny_llama(**SHAPE, seed=1).double().eval()
    made.requires_grad_(False)
    draw = torch.Generator().manual_seed(2)
    attach(made, spec)
    for name, shape in spec.shapes(made).items():
        values = torch.randn(shape, generator=draw, dtype=torch.float64) * scale
        made.get_parameter(name).data = values * (20 if "key" in name else 1)
    return made


def weights_by_hand(made: Any, spec: SharedAttention, one: TokenizedRow) -> Tensor:
    """The weights of a row over the blocks, [S], from the equations, in float64."""
    embedding = made.get_input_embeddings()
    words = embedding.weight[torch.from_numpy(one.input_ids[: one.prompt_length]).long()]
    pooled = words.max(dim=0).values if spec.pooling == "max" else words.mean(dim=0)
    inner = embedding.seekr_query_up @ (embedding.seekr_query_down @ pooled)
    inner = inner / (1 + torch.exp(-inner))
    centred = inner - inner.mean()
    query = centred / torch.sqrt((centred**2).mean() + 1e-5)
    query = query * embedding.seekr_query_norm + embedding.seekr_query_shift
    tau = spec.temperature or math.sqrt(SHAPE["hidden"])
    keys = [getattr(embedding, f"seekr_key_{i}") for i in range(len(spec.tasks))]
    scores = torch.stack([key @ query / tau for key in keys])
    return torch.exp(scores) / torch.exp(scores).sum()


def merged(made: Any, spec: SharedAttention, weights: Tensor) -> Any:
    """A plain model whose weights have a row's own sum of blocks in them."""
    plain: Any = tiny_llama(**SHAPE, seed=1).double().eval()
    for name, layer in spec.adapted(plain).items():
        theirs = made.get_submodule(name)
        for index in range(len(spec.tasks)):
            a, b = (getattr(theirs, f"seekr_block_{index}_{part}") for part in "ab")
            layer.weight.data += 3.0 * weights[index] * (b @ a)  # alpha / rank
    return plain


def logits_of(made: Any, batch: Batch) -> Tensor:
    with seeing(made, batch):
        return batch_logits(made, batch)


@pytest.mark.parametrize("changes", [{}, {"temperature": 9.0}, {"pooling": "mean"}])
def test_a_row_gets_the_weighted_sum_of_all_blocks(changes: dict[str, Any]) -> None:
    spec = spec_of(3, **changes)
    made, batch = model(spec), collate(ROWS, pad_id=0)
    found, weights = logits_of(made, batch), weights_of(made, batch)
    for index, one in enumerate(ROWS):
        expected = weights_by_hand(made, spec, one).detach()
        torch.testing.assert_close(weights[index].double(), expected, rtol=1e-5, atol=1e-6)
        assert 0.05 < float(expected.max()) < 0.999  # something is mixed
        plain = merged(made, spec, weights[index].double())
        start, length = int(batch.start_B[index]), len(one.input_ids)
        ids = torch.from_numpy(one.input_ids).long()[None]
        torch.testing.assert_close(
            found[index, start : start + length],
            plain(input_ids=ids).logits[0],
            rtol=1e-7,
            atol=1e-9,
        )


def test_one_block_is_plain_lora_bit_for_bit() -> None:
    spec = spec_of(1)
    made, plain = model(spec).float(), tiny_llama(**SHAPE, seed=1).eval()

    def lora(name: str) -> Any:
        theirs = made.get_submodule(name)

        def hook(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            low = functional.linear(inputs[0], theirs.seekr_block_0_a)
            return output + functional.linear(low, theirs.seekr_block_0_b) * 3.0

        return hook

    for name, layer in spec.adapted(plain).items():
        layer.register_forward_hook(lora(name))
    batch = collate(ROWS, pad_id=0)
    assert torch.equal(logits_of(made, batch), batch_logits(plain, batch))
    assert torch.equal(weights_of(made, batch), torch.ones(2, 1))


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_weights_do_not_depend_on_padding_batch_or_answer(pooling: Any) -> None:
    made = model(spec_of(3, pooling=pooling)).float()
    together = weights_of(made, collate(ROWS, pad_id=0))
    left = weights_of(made, collate_prompts(ROWS, pad_id=7))
    for index, one in enumerate(ROWS):
        alone = weights_of(made, collate([one], pad_id=0))[0]
        torch.testing.assert_close(together[index], alone, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(left[index], alone, rtol=1e-6, atol=1e-7)
    other = [row("a", [5, 9, 3, 77, 78, 79, 1], 3), ROWS[1]]
    torch.testing.assert_close(
        weights_of(made, collate(other, pad_id=0)), together, rtol=1e-6, atol=1e-7
    )


def test_generated_tokens_get_the_weights_of_their_prompt() -> None:
    spec = spec_of(3)
    made = model(spec, scale=1.0)
    found = generate_greedy(made, collate_prompts(ROWS, pad_id=0), 6, eos_id=1, pad_id=0)
    for one, ids in zip(ROWS, found, strict=True):
        weights = weights_of(made, collate([one], pad_id=0))[0].double()
        plain, so_far = merged(made, spec, weights), one.input_ids[: one.prompt_length].tolist()
        while len(so_far) < one.prompt_length + 6:
            following = int(plain(input_ids=torch.tensor([so_far])).logits[0, -1].argmax())
            if following == 1:
                break
            so_far.append(following)
        assert ids == so_far[one.prompt_length :]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_task_trains_its_own_block_and_key_and_the_query_network(count: int) -> None:
    spec, batch = spec_of(count), collate(ROWS, pad_id=0)
    made = model(spec)
    with seeing(made, batch) as seen:
        assert seen is not None
        total = batch_logits(made, batch).square().sum()
        assert seen.weights_BS is not None
        (total + seen.weights_BS.square().sum()).backward()
    for name, parameter in made.named_parameters():
        leaf = name.rpartition(".")[2]
        trained = leaf.startswith("seekr_query") or leaf.startswith(f"seekr_block_{count - 1}_")
        trained |= leaf == f"seekr_key_{count - 1}"
        # The first key has had no gradient while its block was alone: it is trained beside the second.
        trained |= count == 2 and leaf == "seekr_key_0"
        assert (parameter.grad is not None) == trained, name
        selects = "query" in leaf or "key" in leaf
        if trained and selects:  # alone, a block has weight 1 whatever is asked
            assert bool(parameter.grad.any()) == (count > 1), name


def test_gradients_reach_a_low_layer_through_earlier_blocks_above_it() -> None:
    spec, batch = spec_of(3), collate(ROWS, pad_id=0)
    made = model(spec)
    block = made.get_parameter("model.layers.0.self_attn.v_proj.seekr_block_2_b")
    logits_of(made, batch)[:, :, :9].square().sum().backward()
    found, values = float(block.grad[1, 0]), []
    for step in (1e-2, -2e-2):  # norms are in float32
        block.data[1, 0] += step
        with torch.no_grad():
            values.append(float(logits_of(made, batch)[:, :, :9].square().sum()))
    assert found == pytest.approx((values[0] - values[1]) / 2e-2, rel=1e-2)


def test_a_block_that_begins_adds_nothing() -> None:
    spec, batch = spec_of(3), collate(ROWS, pad_id=0)
    plain: Any = tiny_llama(**SHAPE, seed=1)
    starts = {
        name: spec.start(name, shape, "0/third", lambda *_: torch.zeros(1), 258)
        for name, shape in spec.shapes(plain).items()
    }
    made = model(spec).float()
    for name, values in starts.items():
        made.get_parameter(name).data.copy_(values)
    assert torch.equal(logits_of(made, batch), batch_logits(plain, batch))
    assert starts["model.embed_tokens.seekr_key_0"].abs().max() <= 1
    layer = "model.layers.0.self_attn.q_proj"
    a = starts[f"{layer}.seekr_block_0_a"]
    assert 0 < float(a.abs().max()) <= 1 / math.sqrt(SHAPE["hidden"])
    assert not torch.equal(a, starts[f"{layer}.seekr_block_1_a"])


def test_the_reflection_is_zero_at_the_recorded_weights_and_else_a_divergence() -> None:
    recorded = torch.tensor([[0.25, 0.75], [1.0, 0.0]], dtype=torch.float64)
    same = torch.cat([recorded, torch.full((2, 1), 1e-300, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(
        weights_kl(recorded, same.clamp(min=1e-300)), torch.zeros(2).double()
    )
    current = torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]], dtype=torch.float64)
    expected = [0.25 * math.log(0.25 / 0.2) + 0.75 * math.log(0.75 / 0.5), math.log(1 / 0.6)]
    assert weights_kl(recorded, current).tolist() == pytest.approx(expected)


def test_blocks_beside_a_model_come_back_with_it(tmp_path: Path) -> None:
    spec = spec_of(3, temperature=2.0)
    made = model(spec).float()
    save_model(tiny_llama(**SHAPE, seed=1), byte_tokenizer(), tmp_path)
    write_addition(
        tmp_path, spec, {name: made.get_parameter(name).detach() for name in spec.shapes(made)}
    )
    assert read_addition(tmp_path) == spec
    loaded = load_model(tmp_path, dtype=torch.float32, attention="sdpa")
    batch = collate(ROWS, pad_id=0)
    torch.testing.assert_close(logits_of(loaded, batch), logits_of(made, batch))


def test_layers_that_are_not_there_and_kinds_nobody_knows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'nosuch'; the linear layers of this model are .*q_proj"
    ):
        attach(tiny_llama(**SHAPE, seed=1), spec_of(1, targets=("q_proj", "nosuch")))
    (tmp_path / "addition.json").write_text('{"addition": "nosuch"}')
    with pytest.raises(ConfigError, match="'nosuch'; this version knows soft_prompts"):
        read_addition(tmp_path)


def test_weights_are_never_those_of_another_batch() -> None:
    made, batch = model(spec_of(2)), collate(ROWS, pad_id=0)
    logits_of(made, batch)
    with pytest.raises(RuntimeError, match="use `seeing`"):
        batch_logits(made, batch)

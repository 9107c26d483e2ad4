"""The methods' losses against sums written out in float64, and the contract that all share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from seekr.addition import Seen
from seekr.answers import WholeLogits
from seekr.attention import probing, register
from seekr.batch_targets import collate_targets
from seekr.collation import Batch, collate
from seekr.errors import DataError
from seekr.methods import METHODS, SEEKR, Method, Outputs
from seekr.models import byte_tokenizer, tiny_llama
from seekr.probes import RowProbe
from seekr.prompts import Example, Template, encode
from seekr.sampling import query_positions
from seekr.soft_prompts import SoftPrompts
from seekr.sparse_rows import SparseRows
from seekr.teacher import Keep, TeacherTarget, teach_batch
from tests.seekr import reference

HEADS = {0: (1, 3), 1: (0,)}
NAMES = sorted(METHODS)


def batch() -> Batch:
    tokenizer = byte_tokenizer()
    rows = [
        encode(
            Example(input=text, references=(text[::-1],)),
            Template.parse("{input}="),
            tokenizer,
            max_length=32,
            max_answer_length=12,
        )
        for text in ("abc", "hello", "de")
    ]
    return collate(rows, pad_id=0)


def model(seed: int) -> torch.nn.Module:
    shape = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "max_positions": 64}
    made = tiny_llama(seed=seed, **shape)  # type: ignore[arg-type]
    register()
    made.set_attn_implementation("seekr")
    return made.double()


def taught(rows: Batch, teacher: torch.nn.Module, keep: Keep | None = None) -> list[TeacherTarget]:
    lengths = rows.lengths_B.tolist()
    positions = [
        query_positions(0, name, n, 4) for name, n in zip(rows.row_ids, lengths, strict=True)
    ]
    return teach_batch(teacher, rows, HEADS, positions, logits=True, keep=keep)


def forward(student: torch.nn.Module, rows: Batch, probe: Any) -> torch.Tensor:
    with probing(student, probe):
        return student(
            input_ids=rows.input_ids_BT, attention_mask=rows.attention_mask_BT, use_cache=False
        ).logits


def outputs(student: torch.nn.Module, rows: Batch, targets: list[TeacherTarget]) -> Outputs:
    recorded = [replace(target, weights=torch.tensor([0.7])) for target in targets]
    collated = collate_targets(recorded, rows)
    probe = SEEKR().distillation(collated)
    logits = forward(student, rows, probe)
    seen = Seen(SoftPrompts(kind="pool", length=1, pool=2, selected=1))
    seen.pull_B = torch.ones(len(rows), dtype=torch.float64)
    seen.weights_BS = torch.full((len(rows), 2), 0.5, dtype=torch.float64)
    return Outputs(
        answers=WholeLogits(logits),
        batch=rows,
        targets=collated,
        attention_kl=probe.kl_by_layer,
        added=seen,
    )


Case = tuple[Outputs, list[TeacherTarget], torch.nn.Module]


@pytest.fixture(scope="module", params=[None, Keep(logits=5, attention=2)], ids=["whole", "kept"])
def case(request: pytest.FixtureRequest) -> Case:
    rows, student = batch(), model(1)
    targets = taught(rows, model(2), request.param)
    return outputs(student, rows, targets), targets, student


def sparse_kl(teacher: SparseRows, at: int, student: NDArray[np.float64]) -> float:
    """KL of one row to probabilities, all columns that the teacher did not keep as one outcome."""
    row = teacher.cut(at, at + 1)
    kept, tail = row.columns_N.tolist(), float(row.tail_R[0])
    rest = sum(q for column, q in enumerate(student.tolist()) if column not in kept)
    p = [*row.values_N.tolist(), tail]
    return reference.kl(np.array(p), np.array([*student[kept], rest if tail else 1.0]))


def expected_parts(case: Case) -> dict[str, float]:
    """NLL, logit KL and MSE, and the mean attention KL, row by row and position by position."""
    found, targets, student = case
    assert found.targets is not None
    probe = RowProbe(found.targets.heads_by_layer, found.targets.positions_BQ)
    with torch.no_grad():
        logits = forward(student, found.batch, probe).numpy()
    labels = found.batch.labels_BT.numpy()
    parts = dict.fromkeys(("nll", "kl", "mse", "attention"), 0.0)
    for b, target in enumerate(targets):
        position = 0
        for t in range(1, labels.shape[1]):
            if labels[b, t] == -100:
                continue
            log_q = logits[b, t - 1] - np.log(np.exp(logits[b, t - 1]).sum())
            parts["nll"] -= log_q[labels[b, t]]
            if isinstance(target.logits, SparseRows):
                parts["kl"] += sparse_kl(target.logits, position, np.exp(log_q))
            else:
                teacher = target.logits[position].numpy()
                p = np.exp(teacher) / np.exp(teacher).sum()
                parts["kl"] += reference.kl(p, np.exp(log_q))
                parts["mse"] += ((logits[b, t - 1] - teacher) ** 2).mean()
            position += 1
        layers, at, start = [], 0, int(found.batch.start_B[b])
        for layer, heads in target.heads_by_layer.items():
            maps = probe.log_rows[layer][b].exp().numpy()[:, :, start : start + target.length]
            kls = []
            for s in range(len(heads)):
                for q in range(len(target.query_positions)):
                    kls.append(sparse_kl(target.attention, at, maps[s, q]))
                    at += 1
            layers.append(np.mean(kls))
        parts["attention"] += np.mean(layers)
    return parts


@pytest.mark.parametrize(
    ("settings", "weights"),
    [
        ({"name": "replay", "replay_weight": 0.7}, {"replay": ("nll", 0.7)}),
        ({"name": "derpp"}, {"replay": ("nll", 0.5), "logits": ("kl", 0.5)}),
        (
            {"name": "derpp", "logit_loss": "mse", "logit_weight": 2.0},
            {"replay": ("nll", 0.5), "logits": ("mse", 2.0)},
        ),
        (
            {"name": "seekr", "replay_weight": 0.25, "attention_weight": 30.0},
            {"replay": ("nll", 0.25), "logits": ("kl", 0.75), "attention": ("attention", 30.0)},
        ),
    ],
)
def test_replay_losses_equal_the_sums_written_out(
    case: Case, settings: dict[str, object], weights: dict[str, tuple[str, float]]
) -> None:
    found, targets, _ = case
    method = METHODS[str(settings["name"])].model_validate(settings)
    if method.whole_logits and isinstance(targets[0].logits, SparseRows):
        with pytest.raises(DataError, match="whole logits are needed"):
            method.replay_terms(found)
        return
    terms, parts = method.replay_terms(found), expected_parts(case)
    assert terms.keys() == weights.keys()
    for name, (part, weight) in weights.items():
        assert terms[name].weight == weight
        assert float(terms[name].total.detach()) == pytest.approx(parts[part], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_gives_finite_losses_whose_gradient_reaches_every_parameter(
    case: Case, name: str
) -> None:
    _, targets, student = case
    method = METHODS[name].model_validate({"name": name})
    rows = batch()
    if method.needs.reference:
        rows = replace(rows, reference_nll_BT=torch.zeros(rows.labels_BT.shape))
    found = outputs(student, rows, targets)
    terms = method.task_terms(found)
    if method.needs.replay:
        terms |= {f"replay {key}": term for key, term in method.replay_terms(found).items()}
    loss = torch.stack([term.weight * term.total for term in terms.values()]).sum()
    student.zero_grad()
    loss.backward()
    assert torch.isfinite(loss)
    for parameter in student.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_no_setting_of_a_method_is_forgotten_between_loss_and_preparation(name: str) -> None:
    method = METHODS[name].model_validate({"name": name})
    told = set(method.loss_settings()) | method.preparation_fields
    assert told == set(type(method).model_fields)
    assert not set(method.loss_settings()) & method.preparation_fields


@pytest.mark.parametrize("name", NAMES)
def test_a_method_distils_attention_exactly_if_it_needs_heads(case: Case, name: str) -> None:
    method, targets = METHODS[name].model_validate({"name": name}), case[0].targets
    assert targets is not None
    probe = method.distillation(targets)
    assert (probe is not None) == method.needs.heads
    if probe is not None:
        assert probe.layers == set(HEADS)


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
def test_the_epsilon_of_the_settings_reaches_the_students_logarithm(epsilon: float) -> None:
    rows, student = batch(), model(1)
    targets = collate_targets(taught(rows, model(2)), rows)
    probe = SEEKR(attention_epsilon=epsilon).distillation(targets)
    forward(student, rows, probe)
    seen = RowProbe(targets.heads_by_layer, targets.positions_BQ)
    with torch.no_grad():
        forward(student, rows, seen)
    for layer, valid in targets.valid.items():
        shape = seen.log_rows[layer].shape
        teacher = targets.attention[layer].dense_RC(shape[-1]).reshape(shape)
        for at in map(tuple, valid.nonzero().tolist()):
            p, q = teacher[at].numpy(), seen.log_rows[layer][at].exp().numpy()
            expected = reference.kl(p, q, epsilon)
            assert float(probe.kl_by_layer[layer][at].detach()) == pytest.approx(expected, rel=1e-6)


def test_only_a_distance_of_logits_needs_them_whole() -> None:
    wanted = {"derpp": {"logit_loss": "mse"}}
    for name, kind in METHODS.items():
        assert not kind.model_validate({"name": name}).whole_logits
        if name in wanted:
            assert kind.model_validate({"name": name} | wanted[name]).whole_logits


def test_the_logit_weight_is_the_rest_of_the_replay_weight_unless_given() -> None:
    seekr = METHODS["seekr"]
    implied = seekr.model_validate({"name": "seekr", "replay_weight": 0.3})
    given = seekr.model_validate({"name": "seekr", "replay_weight": 0.3, "logit_weight": 0.7})
    assert implied.loss_settings() == given.loss_settings()


def test_a_method_that_replays_nothing_says_so() -> None:
    with pytest.raises(NotImplementedError, match="seqft"):
        METHODS["seqft"]().replay_terms(None)  # type: ignore[arg-type]
    assert all(issubclass(kind, Method) for kind in METHODS.values())

"""The methods' losses against sums written out in float64, and the contract that all share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seekr.attention import probing, register
from seekr.batch_targets import collate_targets
from seekr.methods import METHODS, Method, Outputs
from seekr.models import byte_tokenizer, tiny_llama
from seekr.probes import RowProbe
from seekr.prompts import Batch, Example, Template, collate, encode
from seekr.sampling import query_positions
from seekr.teacher import TeacherTarget, teach_batch

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


def taught(rows: Batch, teacher: torch.nn.Module) -> list[TeacherTarget]:
    lengths = rows.lengths_B.tolist()
    positions = [
        query_positions(0, name, n, 4) for name, n in zip(rows.row_ids, lengths, strict=True)
    ]
    return teach_batch(teacher, rows, HEADS, positions, logits=True)


def outputs(student: torch.nn.Module, rows: Batch, targets: list[TeacherTarget]) -> Outputs:
    collated = collate_targets(targets, rows)
    probe = RowProbe(collated.heads_by_layer, collated.positions_BQ)
    with probing(student, probe):
        logits = student(
            input_ids=rows.input_ids_BT, attention_mask=rows.attention_mask_BT, use_cache=False
        ).logits
    return Outputs(logits_BTV=logits, batch=rows, targets=collated, log_rows=probe.log_rows)


@pytest.fixture(scope="module")
def case() -> tuple[Outputs, list[TeacherTarget], torch.nn.Module]:
    rows, student = batch(), model(1)
    targets = taught(rows, model(2))
    return outputs(student, rows, targets), targets, student


def expected_parts(found: Outputs, targets: list[TeacherTarget]) -> dict[str, float]:
    """NLL, logit KL and MSE, and the mean attention KL, row by row and position by position."""
    logits = found.logits_BTV.detach().numpy()
    labels = found.batch.labels_BT.numpy()
    parts = dict.fromkeys(("nll", "kl", "mse", "attention"), 0.0)
    for b, target in enumerate(targets):
        position = 0
        for t in range(1, labels.shape[1]):
            if labels[b, t] == -100:
                continue
            student = logits[b, t - 1] - np.log(np.exp(logits[b, t - 1]).sum())
            teacher = target.logits_AV[position]
            log_teacher = teacher - np.log(np.exp(teacher).sum())
            parts["nll"] -= student[labels[b, t]]
            parts["kl"] += (np.exp(log_teacher) * (log_teacher - student)).sum()
            parts["mse"] += ((logits[b, t - 1] - teacher) ** 2).mean()
            position += 1
        layers = []
        for layer, rows in target.attention.items():
            place = found.log_rows[layer][b].detach().numpy()
            kls = []
            for s in range(rows.shape[0]):
                for q, own in enumerate(target.query_positions):
                    p, log_q = rows[s, q, : own + 1], place[s, q, : own + 1]
                    kls.append((p * (np.log(p) - log_q)).sum())
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
    case: tuple[Outputs, list[TeacherTarget], torch.nn.Module],
    settings: dict[str, object],
    weights: dict[str, tuple[str, float]],
) -> None:
    found, targets, _ = case
    method = METHODS[str(settings["name"])].model_validate(settings)
    terms, parts = method.replay_terms(found), expected_parts(found, targets)
    assert terms.keys() == weights.keys()
    for name, (part, weight) in weights.items():
        assert terms[name].weight == weight
        assert float(terms[name].total) == pytest.approx(parts[part], rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_gives_finite_losses_whose_gradient_reaches_every_parameter(
    case: tuple[Outputs, list[TeacherTarget], torch.nn.Module], name: str
) -> None:
    _, targets, student = case
    method = METHODS[name].model_validate({"name": name})
    found = outputs(student, batch(), targets)
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


def test_the_logit_weight_is_the_rest_of_the_replay_weight_unless_given() -> None:
    seekr = METHODS["seekr"]
    implied = seekr.model_validate({"name": "seekr", "replay_weight": 0.3})
    given = seekr.model_validate({"name": "seekr", "replay_weight": 0.3, "logit_weight": 0.7})
    assert implied.loss_settings() == given.loss_settings()


def test_a_method_that_replays_nothing_says_so() -> None:
    with pytest.raises(NotImplementedError, match="seqft"):
        METHODS["seqft"]().replay_terms(None)  # type: ignore[arg-type]
    assert all(issubclass(kind, Method) for kind in METHODS.values())

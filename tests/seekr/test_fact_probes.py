"""Probes: where answers are by characters, and scores against a float64 loop without batches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from seekr.errors import ConfigError, DataError
from seekr.fact_probes import answer_tokens, document_tokens, make_probe, score_probes
from seekr.models import byte_tokenizer, tiny_llama
from seekr.prompts import data_ids
from tests.seekr import tiny

BYTES = byte_tokenizer()


def merged_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with the tokens " par", "is" and "ris", so that words are cut across."""
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()))
    vocab = {letter: index for index, letter in enumerate(letters)}
    merges = [("Ġ", "p"), ("Ġp", "a"), ("Ġpa", "r"), ("i", "s"), ("r", "is")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="s", pad_token="p")


def with_start(tokenizer: PreTrainedTokenizerFast) -> int:
    """Let the tokenizer begin texts with a token of its own; returns its id."""
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    start: Any = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", start)]
    )
    return start


@settings(max_examples=60, deadline=None)
@given(
    before=st.text(max_size=12), answer=st.text(min_size=1, max_size=5), after=st.text(max_size=5)
)
def test_the_marked_bytes_are_those_of_the_answers_occurrences(
    before: str, answer: str, after: str
) -> None:
    try:
        (text := before + answer + after).encode()
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    expected = np.zeros(len(text.encode()), dtype=bool)
    for first in range(len(text)):
        if text.startswith(answer, first):
            start = len(text[:first].encode())
            expected[start : start + len(answer.encode())] = True
    found = answer_tokens(BYTES, text, answer)
    np.testing.assert_array_equal(found, expected)


def test_a_token_that_holds_part_of_the_answer_belongs_to_it() -> None:
    tokenizer = merged_tokenizer()
    ids, offsets = document_tokens(tokenizer, "in paris, parisian")
    parts = [("in paris, parisian"[first:last]) for first, last in offsets]
    assert parts == ["i", "n", " par", "is", ",", " par", "is", "i", "a", "n"]
    assert ids.tolist() == data_ids(tokenizer, "in paris, parisian")
    marked = answer_tokens(tokenizer, "in paris, parisian", "paris")
    assert [part for part, own in zip(parts, marked, strict=True) if own] == [" par", "is"] * 2
    probe = make_probe(tokenizer, "in paris, parisian", "ri")
    assert probe.positions.tolist() == [5, 6]  # " par" and "is" of the last occurrence


def test_documents_are_tokenised_as_training_rows_are() -> None:
    for text in ("<eos> is <pad>", "", "é\N{SNOWMAN} x"):
        ids, offsets = document_tokens(BYTES, text)
        assert ids.tolist() == data_ids(BYTES, text)
        assert offsets.shape == (len(ids), 2)
    assert 1 not in document_tokens(BYTES, "<eos>")[0]  # spelt out, not the control token


def test_the_last_occurrence_is_the_answer_unless_a_place_is_given() -> None:
    sentence = "wales speaks welsh in wales"
    assert make_probe(BYTES, sentence, "wales").positions.tolist() == list(range(22, 27))
    tokenizer = byte_tokenizer()
    start = with_start(tokenizer)
    probe = make_probe(tokenizer, sentence, "wales", start=0)
    assert probe.input_ids[0] == start
    assert probe.positions.tolist() == [1, 2, 3, 4, 5]
    assert bytes(int(token) - 2 for token in probe.answer_ids) == b"wales"


def test_probes_have_the_identity_they_are_given_or_one_of_their_content() -> None:
    named = make_probe(BYTES, "it is red", "red", row_id="a")
    same, other = (make_probe(BYTES, f"it is {word}", word) for word in ("red", "blue"))
    assert named.row_id == "a"
    assert same.row_id == make_probe(BYTES, "it is red", "red").row_id != other.row_id


@pytest.mark.parametrize(
    ("sentence", "answer", "start", "message"),
    [
        ("it is red", "blue", None, "not in the sentence"),
        ("it is red", "Red", None, "letter by letter"),
        ("it is red", "", None, "empty"),
        ("it is red red", "red", 7, "begins at 6, 10"),
        ("red it is", "red", None, "first token"),
    ],
)
def test_an_answer_that_cannot_be_asked_for_is_refused(
    sentence: str, answer: str, start: int | None, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        make_probe(BYTES, sentence, answer, start=start)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is a slow one \(ByT5Tokenizer\).*tokenizer\.json"):
        make_probe(ByT5Tokenizer(), "it is red", "red")


SENTENCES = [
    ("mira plays the flute .", "flute"),
    ("the capital of the country is x", "x"),
    ("ab", "b"),
    ("one of two of three", "of"),
    ("tolo keeps a parrot as a pet .", "parrot as"),
]


@pytest.fixture(scope="module")
def model() -> Any:
    made = tiny_llama(hidden=16, heads=2, kv_heads=1, max_positions=64, seed=1)
    made.model.embed_tokens.weight.data *= 20.0  # far from an even guess
    return tiny.to_exact(made)


def by_hand(model: Any, sentence: str, answer: str) -> tuple[float, float]:
    """One unpadded sentence, one answer byte after the other."""
    ids = [byte + 2 for byte in sentence.encode()]
    first = sentence.encode().rindex(answer.encode())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    right, nll = [], []
    for place in range(first, first + len(answer.encode())):
        row = logits[place - 1]
        right.append(float(int(row.argmax()) == ids[place]))
        nll.append(np.log(np.exp(row - row.max()).sum()) - (row[ids[place]] - row.max()))
    return float(np.mean(right)), float(np.mean(nll))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 99])
def test_scores_are_those_of_single_sentences_however_batches_are_cut(
    model: Any, batch_size: int
) -> None:
    probes = [make_probe(BYTES, *pair) for pair in SENTENCES]
    accuracy, nll = score_probes(model, probes, batch_size=batch_size, pad_id=0, device="cpu")
    expected = np.array([by_hand(model, *pair) for pair in SENTENCES])
    np.testing.assert_array_equal(accuracy, expected[:, 0])
    np.testing.assert_allclose(nll, expected[:, 1], rtol=1e-9)


def test_a_model_that_knows_some_of_an_answer_gets_that_share(model: Any) -> None:
    """The answer is what the model itself says, but for one byte."""
    ids = [byte + 2 for byte in b"what"]
    with torch.no_grad():
        for _ in range(4):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    right = make_probe(BYTES, "what....", "....")
    knows = np.array(ids, dtype=np.int32)
    one_wrong = knows.copy()
    one_wrong[7] = 2 if knows[7] != 2 else 3  # the last, on which no other depends
    probes = [
        type(right)(row_id="", input_ids=own, positions=right.positions)
        for own in (knows, one_wrong)
    ]
    accuracy, nll = score_probes(model, probes, batch_size=2, pad_id=0, device="cpu")
    assert accuracy.tolist() == [1.0, 0.75]
    assert nll[1] > nll[0] > 0


def test_scoring_leaves_the_model_in_its_mode_and_takes_no_gradient(model: Any) -> None:
    model.train()
    try:
        score_probes(model, [make_probe(BYTES, "ab", "b")], batch_size=1, pad_id=0, device="cpu")
        assert model.training
    finally:
        model.eval()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_probes_have_no_scores_and_empty_batches_are_refused(model: Any) -> None:
    accuracy, nll = score_probes(model, [], batch_size=4, pad_id=0, device="cpu")
    assert accuracy.shape == nll.shape == (0,)
    with pytest.raises(ValueError, match="batch_size is 0"):
        score_probes(model, [], batch_size=0, pad_id=0, device="cpu")

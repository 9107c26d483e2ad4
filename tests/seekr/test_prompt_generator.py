"""Lessons for a generator, what it writes token by token, and which of it is a prompt."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from seekr.collation import collate_prompts
from seekr.models import byte_tokenizer, generate_greedy, tiny_llama
from seekr.prompt_generator import PromptForm, write_prompts
from seekr.prompts import Example, Template, TokenizedRow, encode
from tests.seekr.tiny import row

TEMPLATES = {
    "bare": "{input}",
    "around": "say: {input} = ",
    "definition before": "Do {definition}. Now {input}\nOutput: ",
    "definition after": "Text {input} is to be treated so: {definition}\n",
}
TOKENIZER = byte_tokenizer()
EOS = 1
TEXT = st.text("abcxyz", min_size=1, max_size=20)


def ids_of(text: str) -> list[int]:
    return [byte + 2 for byte in text.encode()]


def encoded(template: str, text: str) -> TokenizedRow:
    example = Example(input=text, references=("answer",), definition="turn it")
    return encode(example, Template.parse(template), TOKENIZER, max_length=90, max_answer_length=8)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@given(text=TEXT)
def test_a_lesson_is_the_prompt_and_its_end_without_the_answer(template: str, text: str) -> None:
    stored, form = encoded(template, text), PromptForm.of(Template.parse(template), TOKENIZER)
    lesson = form.lesson(stored)
    opening = template[: template.index("{")]
    assert lesson.prompt_length == max(1, len(opening))
    whole = template.replace("{input}", text).replace("{definition}", "turn it")
    # Where a template opens with a hole there must be something to begin with.
    begin = [] if opening else [EOS]
    assert lesson.input_ids.tolist() == [*begin, *ids_of(whole), EOS]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@given(text=TEXT)
def test_what_a_lesson_teaches_is_read_as_the_prompt_it_was_made_of(
    template: str, text: str
) -> None:
    stored, form = encoded(template, text), PromptForm.of(Template.parse(template), TOKENIZER)
    lesson = form.lesson(stored)
    found = form.row(lesson.input_ids[lesson.prompt_length : -1].tolist())
    assert found is not None and found.input == text and found.references == ()
    prompt = stored.input_ids[: stored.prompt_length].tolist()
    assert found.prompt_length == stored.prompt_length
    assert found.input_ids.tolist() == [*prompt, EOS]


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{input}", ""),
        ("{input}", " \n"),
        ("say: {input} = ", "abc ="),
        ("say: {input} = ", " = "),
        ("say: {input} = ", "abc = d"),
        ("Do {definition}. Now {input}\nOutput: ", "turn it. then abc\nOutput: "),
        ("Do {definition}. Now {input}\nOutput: ", "turn it. Now \nOutput: "),
        # The two pieces would have to overlap.
        ("<{definition}aba{input}ba", "xaba"),
    ],
)
def test_a_prompt_without_input_or_with_a_broken_template_is_none(
    template: str, written: str
) -> None:
    assert PromptForm.of(Template.parse(template), TOKENIZER).row(ids_of(written)) is None


def test_rows_are_the_same_if_their_prompts_are() -> None:
    form = PromptForm.of(Template.parse("say: {input} = "), TOKENIZER)
    one, same, other = (form.row(ids_of(text)) for text in ("ab = ", "ab = ", "abc = "))
    assert one is not None and same is not None and other is not None
    assert one.row_id == same.row_id != other.row_id


MODEL = tiny_llama(vocab_size=12, hidden=16, heads=2, kv_heads=1, seed=3)
for _name, _parameter in MODEL.named_parameters():
    if "embed" in _name:
        _parameter.data *= 4.0  # some tokens are likelier than others
SEEDS = [f"0/task/{index}" for index in range(12)]


def written_by_hand(seed: str, temperature: float, most: int) -> list[int] | None:
    """One continuation of [5, 7], every token from the whole sequence so far."""
    generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    draws: Sequence[float] = torch.rand(most, generator=generator, dtype=torch.float64).tolist()
    ids = [5, 7]
    for draw in draws:
        with torch.no_grad():
            logits = MODEL(input_ids=torch.tensor([ids])).logits[0, -1].double().numpy()
        chances = np.exp((logits - logits.max()) / temperature)
        chances /= chances.sum()
        token, below = 0, float(chances[0])
        while below <= draw and token < len(chances) - 1:
            token += 1
            below += float(chances[token])
        if token == EOS:
            return ids[2:]
        ids.append(token)
    return None


def written(seeds: list[str], temperature: float = 0.7, most: int = 12) -> list[list[int] | None]:
    return write_prompts(
        MODEL, [5, 7], seeds, temperature=temperature, max_new_tokens=most, eos_id=EOS
    )


def test_tokens_are_drawn_from_the_models_probabilities_by_each_seeds_own_numbers() -> None:
    found = written(SEEDS)
    assert found == [written_by_hand(seed, 0.7, 12) for seed in SEEDS]
    ended = [ids for ids in found if ids is not None]
    assert 2 <= len(ended) < len(found)  # some end and some do not
    assert len({tuple(ids) for ids in ended}) > 1


def test_what_a_seed_gives_does_not_depend_on_the_seeds_beside_it() -> None:
    whole = written(SEEDS)
    assert [written([seed])[0] for seed in SEEDS] == whole
    assert written(SEEDS[::-1]) == whole[::-1]


def test_a_cold_generator_writes_what_is_likeliest() -> None:
    likeliest = generate_greedy(
        MODEL, collate_prompts([row("a", [5, 7], 2)], pad_id=0), 12, eos_id=EOS, pad_id=0
    )[0]
    found = written(SEEDS[:3], temperature=1e-4)
    assert found == [likeliest if len(likeliest) < 12 else None] * 3

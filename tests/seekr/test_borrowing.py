"""A borrowed prompt is the prompt that the earlier task itself would have made of the text."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seekr.borrowing import Frame, answered, borrowed_prompts, frame_of, framed
from seekr.models import byte_tokenizer
from seekr.prompts import Example, Template, TokenizedRow, encode, eos_id_of

TEMPLATES = {
    "input alone": "say: {input} = ",
    "definition before": "Do {definition}. Now {input}\nOutput: ",
    "definition after": "Text {input} is to be treated so: {definition}\n",
}
TOKENIZER = byte_tokenizer()


def row_of(template: str, text: str, **limits: object) -> TokenizedRow:
    sizes = {"max_length": 90, "max_answer_length": 8} | limits
    example = Example(input=text, references=("x",), definition="turn it around")
    return encode(example, Template.parse(template), TOKENIZER, **sizes)  # type: ignore[arg-type]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=list(TEMPLATES))
@pytest.mark.parametrize("truncate", ["tail", "head"])
@given(
    stored=st.text("abc =", min_size=1, max_size=60).filter(str.strip),
    new=st.text("abc =", min_size=1, max_size=60).filter(str.strip),
)
def test_a_stored_prompts_frame_makes_the_prompt_of_any_other_text(
    template: str, truncate: str, stored: str, new: str
) -> None:
    row = row_of(template, stored, truncate=truncate)
    frame = frame_of(row, Template.parse(template), TOKENIZER, truncate)  # type: ignore[arg-type]
    assert frame is not None
    expected = row_of(template, new, truncate=truncate)
    found = framed(frame, new, TOKENIZER, prompt_length=82, truncate=truncate)  # type: ignore[arg-type]
    assert found == expected.input_ids[: expected.prompt_length].tolist()


def test_a_prompt_that_does_not_hold_its_input_has_no_frame() -> None:
    row = row_of("say: {input} = ", "abc")
    other = TokenizedRow(
        row_id=row.row_id,
        input="xyz",
        references=row.references,
        input_ids=row.input_ids,
        prompt_length=row.prompt_length,
    )
    assert frame_of(other, Template.parse("say: {input} = "), TOKENIZER, "tail") is None


def test_frames_are_taken_in_turn_and_the_task_is_part_of_a_rows_name() -> None:
    frames = [Frame(before=(5,), after=(6,)), Frame(before=(7,), after=())]
    settings = {"prompt_length": 20, "truncate": "tail"}
    rows, others = (
        list(borrowed_prompts(task, frames, ["aa", "b", "c"], TOKENIZER, **settings))  # type: ignore[arg-type]
        for task in ("first", "second")
    )
    assert [row.input_ids[0] for row in rows] == [5, 7, 5]
    assert [row.input_ids[-1] for row in rows][::2] == [6, 6]
    assert not {row.row_id for row in rows} & {row.row_id for row in others}


def test_an_answered_row_is_its_prompt_the_models_tokens_and_eos() -> None:
    [row] = borrowed_prompts(
        "first", [Frame(before=(), after=())], ["ab"], TOKENIZER, prompt_length=9, truncate="tail"
    )
    done = answered(row, [100, 101], TOKENIZER)
    np.testing.assert_array_equal(done.input_ids, [*row.input_ids, 100, 101, eos_id_of(TOKENIZER)])
    assert done.prompt_length == 2 and done.references == (TOKENIZER.decode([100, 101]),)

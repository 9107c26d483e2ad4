"""A row's tokens: what is cut, and what bears loss."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from seekr.errors import ConfigError, DataError
from seekr.models import byte_tokenizer
from seekr.prompts import (
    DEFAULT_TEMPLATES,
    Example,
    Template,
    TokenizedRow,
    check_limits,
    check_vocabulary,
    encode,
    eos_id_of,
    pad_id_of,
    row_id_of,
)

TOKENIZER = byte_tokenizer()
EOS = 1
PLAIN = Template.parse("{input}")


def ids_of(text: str) -> list[int]:
    return [byte + 2 for byte in text.encode()]


def encoded(text: str, answer: str = "yes", template: str = "{input}", **options) -> TokenizedRow:
    limits = {"max_length": 64, "max_answer_length": 16} | options
    return encode(
        Example(input=text, references=(answer,)), Template.parse(template), TOKENIZER, **limits
    )


def test_row_id_is_the_sha256_of_the_canonical_content():
    import hashlib

    text = '{"definition":null,"input":"a\\u00e9","references":["x","y"]}'
    expected = hashlib.sha256(text.encode()).hexdigest()[:32]
    assert row_id_of("aé", ("x", "y"), None) == expected
    assert Example(input="aé", references=("x", "y")).row_id == expected


def test_row_id_depends_on_every_part_and_on_the_order_of_references():
    rows = [("a", ("x", "y"), None), ("a", ("y", "x"), None), ("b", ("x", "y"), None),
            ("a", ("x", "y"), ""), ("a", ("x",), None)]  # fmt: skip
    assert len({row_id_of(*row) for row in rows}) == len(rows)


def test_an_example_without_references_is_refused():
    with pytest.raises(DataError, match="no reference"):
        Example(input="a", references=())


@pytest.mark.parametrize(
    ("text", "message"),
    [("no hole", "0 {input}"), ("{input} {input}", "2 {input}"), ("{input} {inptu}", "inptu"),
     ("{definition}{definition}{input}", "repeats {definition}")],
)  # fmt: skip
def test_a_wrong_template_is_refused_with_its_reason(text: str, message: str):
    with pytest.raises(ConfigError, match=message.replace("{", r"\{").replace("}", r"\}")):
        Template.parse(text)


def test_braces_that_are_no_placeholder_are_literal_in_template_and_data():
    row = encoded("{definition} {0}", template='{"q": {input}, {}}')
    assert row.input_ids[: row.prompt_length].tolist() == ids_of('{"q": {definition} {0}, {}}')


def test_natural_instructions_prompt_is_the_published_one():
    example = Example(input="Is it {x}?", references=("no",), definition="Say yes or no.")
    template = Template.parse(DEFAULT_TEMPLATES["natural_instructions"])
    row = encode(example, template, TOKENIZER, max_length=256, max_answer_length=8)
    text = (
        "Definition: Say yes or no.\n\nNow complete the following example -\n"
        "Input: Is it {x}?\nOutput: "
    )
    assert row.input_ids.tolist() == [*ids_of(text), *ids_of("no"), EOS]
    assert row.prompt_length == len(text)


def test_a_row_without_the_definition_its_template_asks_for_is_refused():
    with pytest.raises(DataError, match="definition"):
        encoded("a", template="{definition}{input}")


@given(st.text(max_size=80), st.text(max_size=30), st.sampled_from(["head", "tail"]))
@settings(max_examples=150, deadline=None)
def test_only_the_input_is_cut_and_eos_is_always_there(text: str, answer: str, truncate: str):
    row = encoded(
        text, answer, "<<{input}>>", max_length=40, max_answer_length=10, truncate=truncate
    )
    prompt, target = row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :]
    assert len(row.input_ids) <= 40 and row.prompt_length <= 30
    assert prompt[:2].tolist() == ids_of("<<") and prompt[-2:].tolist() == ids_of(">>")
    whole = ids_of(text)
    kept = whole[:26] if truncate == "tail" else whole[max(0, len(whole) - 26) :]
    assert prompt[2:-2].tolist() == kept
    assert target.tolist() == [*ids_of(answer)[:9], EOS]


def test_the_prompt_does_not_depend_on_how_long_the_answer_is():
    short, long = encoded("q" * 60, "a"), encoded("q" * 60, "a" * 60)
    assert short.prompt_length == long.prompt_length == 48


def test_control_tokens_in_data_are_text_and_in_the_template_are_meant():
    row = encoded("a<eos>", "<pad>", template="<eos>{input}")
    assert row.input_ids.tolist() == [EOS, *ids_of("a<eos>"), *ids_of("<pad>"), EOS]


def test_bos_comes_first_exactly_when_the_tokenizer_adds_it():
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = tokenizer.bos_token_id
    example = Example(input="ab", references=("c",))
    limits = {"max_length": 16, "max_answer_length": 4}
    without = encode(example, PLAIN, tokenizer, **limits)
    assert without.input_ids.tolist() == [*ids_of("abc"), EOS]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    assert encode(example, PLAIN, tokenizer, **limits).input_ids.tolist() == [
        bos, *ids_of("abc"), EOS,
    ]  # fmt: skip


def test_limits_that_just_fit_pass_and_one_less_is_refused():
    template = Template.parse("12345{input}")
    check_limits(template, TOKENIZER, 16, 10)
    with pytest.raises(ConfigError, match="16 or more"):
        check_limits(template, TOKENIZER, 15, 10)
    with pytest.raises(ConfigError, match="max_answer_length is 1"):
        check_limits(template, TOKENIZER, 15, 1)


def test_a_definition_that_leaves_no_room_for_the_input_is_a_data_error():
    example = Example(input="abc", references=("x",), definition="d" * 50)
    with pytest.raises(DataError, match="no room"):
        encode(
            example,
            Template.parse("{definition}{input}"),
            TOKENIZER,
            max_length=40,
            max_answer_length=8,
        )


def test_a_tokenizer_without_eos_is_refused_and_without_pad_pads_with_eos():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    assert pad_id_of(tokenizer) == EOS
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="end-of-sequence"):
        eos_id_of(tokenizer)


def test_a_token_outside_the_models_vocabulary_is_refused():
    check_vocabulary(TOKENIZER, LlamaConfig(vocab_size=258))
    with pytest.raises(ConfigError, match="id 257"):
        check_vocabulary(TOKENIZER, LlamaConfig(vocab_size=257))


def test_a_row_survives_its_parquet_record():
    row = encoded("abc")
    again = TokenizedRow.from_record(row.to_record())
    assert again.to_record() == row.to_record()
    assert again.input_ids.dtype == np.int32

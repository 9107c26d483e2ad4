"""A tokenizer whose tokens are the words of the planted facts, and a tiny random Llama for it.

Bytes would spoil the measure: once an object's first byte is given the others follow, so a model that knows
nothing of a fact gets most of its bytes right. With whole words an object is one token, an ignorant model is
as bad as it should be, and a document is about 33 tokens.
"""

from __future__ import annotations

import re
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from benchmarks.planted_facts.words import RELATIONS, SIDES
from seekr.lama_ckl import schematic_sentence
from seekr.models import EOS_TOKEN, PAD_TOKEN, save_model, tiny_llama

_UNKNOWN = "<unk>"


def words() -> list[str]:
    """Return every word that a document or a probe can hold, in one order."""
    found: dict[str, None] = {}
    texts = [schematic_sentence("", "", "")]
    for relation in RELATIONS:
        texts += [relation.sentence, relation.label, *relation.objects[0], *relation.objects[1]]
    for side in SIDES:
        texts += [*side.first_names, *side.last_names, *side.fillers]
        texts += [word for choices in side.slots.values() for word in choices]
    for text in texts:
        found |= dict.fromkeys(re.sub(r"\{\w+\}", " ", text).split())
    return list(found)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: <pad> = 0, <eos> = 1, <unk> = 2, then `words`. Blanks separate tokens."""
    names = [PAD_TOKEN, EOS_TOKEN, _UNKNOWN, *words()]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(WordLevel(vocab=vocab, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def write_model(folder: Path, *, seed: int = 0, hidden: int = 64, layers: int = 4) -> None:
    """Write a random Llama of float32 weights and the tokenizer, in the Hugging Face layout."""
    tokenizer = word_tokenizer()
    model = tiny_llama(
        len(tokenizer), hidden, layers, heads=4, kv_heads=4, seed=seed, max_positions=128
    )
    save_model(model, tokenizer, folder)

"""A small Llama that has really learnt something, for measurements that random weights cannot give.

It is trained on the source of Python's standard library, which every machine with Python has, with a
byte-pair vocabulary of its own. The second domain is the language's help texts, so a model can drift away
from what it knew. Both are cut into rows of equal length, the last eighth of each being its answer.
"""

from __future__ import annotations

import pydoc_data.topics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from seekr.attention import register
from seekr.prompts import TokenizedRow

VOCAB, LAYERS, HEADS, GROUPS, WIDTH = 32000, 8, 16, 4, 256


def corpus(domain: str) -> list[str]:
    """Return the documents of "code" or "prose"."""
    if domain == "prose":
        return list(pydoc_data.topics.topics.values())
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(folder.glob("*.py")) + sorted(folder.glob("[a-z]*/*.py"))
    kept = [file for file in files if "site-packages" not in file.parts and "test" not in str(file)]
    return [file.read_text(encoding="utf-8", errors="ignore") for file in kept]


def tokenize() -> dict[str, NDArray[np.int64]]:
    """Train a byte-pair vocabulary on both domains and return each as one run of tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    texts = {domain: corpus(domain) for domain in ("code", "prose")}
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((text for part in texts.values() for text in part), trainer)
    return {
        domain: np.concatenate(
            [np.array(encoding.ids, dtype=np.int64) for encoding in tokenizer.encode_batch(part)]
        )
        for domain, part in texts.items()
    }


def rows(tokens: NDArray[np.int64], length: int, count: int, seed: int) -> list[TokenizedRow]:
    """Return windows of a run of tokens; the last eighth of each is the answer."""
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, size=count)
    return [
        TokenizedRow(
            row_id=f"{seed}-{index}",
            input="",
            references=("",),
            input_ids=tokens[start : start + length].astype(np.int32),
            prompt_length=length - length // 8,
        )
        for index, start in enumerate(starts)
    ]


def fresh_model() -> PreTrainedModel:
    """Return a random model with as many heads as a 7B model has distilled ones (128)."""
    register()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="seekr")


def train(
    model: PreTrainedModel,
    tokens: NDArray[np.int64],
    *,
    rate: float,
    seed: int,
    steps: int | None = None,
    minutes: float | None = None,
) -> float:
    """Train on next tokens for `steps` or `minutes`; returns the mean loss of the last 20 steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95))
    start, losses = time.monotonic(), list[float]()
    for step, batch in enumerate(_batches(tokens, seed)):
        share = step / steps if steps else (time.monotonic() - start) / (60 * (minutes or 1))
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (1.0 - 0.9 * share)
        loss = _next_token_loss(model, batch, seed + step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-20:]))


def _next_token_loss(model: PreTrainedModel, batch: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the loss at a quarter of the positions: the vocabulary is what costs most here."""
    width = batch.shape[1] - 1
    generator = torch.Generator().manual_seed(seed)
    at = torch.randperm(width, generator=generator)[: width // 4].sort().values
    logits = model(input_ids=batch, use_cache=False, logits_to_keep=at).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, at + 1].flatten())


def _batches(tokens: NDArray[np.int64], seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of 1024 tokens: mostly short windows, every fourth one whole."""
    generator = np.random.default_rng(seed)
    for step in range(10**9):
        length = 1024 if step % 4 == 3 else 256
        starts = generator.integers(0, len(tokens) - length, size=1024 // length)
        yield torch.from_numpy(np.stack([tokens[s : s + length] for s in starts]))

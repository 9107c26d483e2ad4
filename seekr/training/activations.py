"""What one forward and backward pass holds besides weights, in bytes: a count of tensors, term by term.

Autograd keeps what backward will read. Which tensors that are is a matter of the layer's code and of
the precision, so the terms follow the decoder layer of Llama (Mistral and Qwen2 have the same one): two
norms, four projections around SDPA, a gated MLP of three. With activation checkpointing a layer keeps
its input alone, and everything else exists for one layer at a time.

Logits exist for a chunk of answer positions (`answers`), and are counted with the copies of them that
a loss makes. Attention distillation adds what is compared: the teacher's rows and a tile of the map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seekr.answers import CHUNK_ELEMENTS
from seekr.attention_kl_tiled import TILE_ELEMENTS
from seekr.training.model_sizes import (
    ATTENTION_OUT,
    DOWN,
    GATE_UP,
    QUERY_KEY_VALUE,
    ModelSizes,
)
from seekr.training.settings import Execution, Recipe

# An entry of a teacher's row: its column in int64, its probability in float32.
_ENTRY = 12
# A teacher's row beside its entries: an offset, the tail, whether it is valid.
_ROW = 13
# Chunks of logits alive at once in a loss's backward. NLL: logits, log-softmax, the gradients of both.
_CHUNKS_OF_NLL = 4.0
# With the logits' KL, seen when its logsumexp is differentiated: logits, the other loss's gradient,
# log-softmax, what the tail is summed from, two gradients, and two masks of a byte each.
_CHUNKS_OF_KL = 6.5
# Tiles of a map alive at once: scores, their probabilities' gradient, products with queries and keys.
_TILES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """What a replay row's target holds.

    Attributes:
        layers, heads: distilled, heads of all layers together; 0 without attention targets.
        queries: query rows per head. attention_kept: entries per query row, None for all.
        logits_kept: probabilities per answer token, None for whole logits.
    """

    layers: int = 0
    heads: int = 0
    queries: int = 0
    attention_kept: int | None = None
    logits_kept: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """The largest forward pass of a kind.

    Attributes:
        rows: sequences. tokens: of each, padding included.
        answers: positions whose logits a loss reads, in all rows.
        masked: whether SDPA gets a mask: rows of unequal length, or packed ones.
        distillation: for replay with a teacher.
    """

    rows: int
    tokens: int
    answers: int
    masked: bool = True
    distillation: Distillation | None = None

    @property
    def positions(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """Bytes of a number in a pass.

    Attributes:
        stream: of hidden states between layers. product: of what matrices multiply and give.
        casts: whether autocast casts each linear layer's input and weight for itself.
    """

    stream: int
    product: int
    casts: bool

    @classmethod
    def of(cls, recipe: Recipe, execution: Execution) -> Numbers:
        """Return them. Only ddp uses autocast; others have weights in the recipe's dtype."""
        if recipe.dtype == torch.float32:
            return cls(stream=4, product=4, casts=False)
        if execution.strategy != "ddp":
            return cls(stream=2, product=2, casts=False)
        # The stream has the embedding's dtype: float32, or bfloat16 where it is frozen.
        return cls(stream=4 if recipe.lora is None else 2, product=2, casts=True)


def kept_by_layer(sizes: ModelSizes, numbers: Numbers, work: Pass) -> int:
    """Return what a decoder layer keeps for backward."""
    product, width, targets = numbers.product, sizes.width, set(sizes.targets)
    from_norms = [targets & set(QUERY_KEY_VALUE), targets & set(GATE_UP)]
    norms = 2 * _norm(sizes, numbers)
    if numbers.casts:  # every linear layer keeps a cast of its own
        inputs = product * width * sum(map(len, from_norms))
        inputs += product * sizes.queries if sizes.base_frozen and ATTENTION_OUT in targets else 0
    else:  # layers with one input share it
        inputs = product * width * sum(map(bool, from_norms))
    # SDPA keeps queries, keys, values, output and a number per row. Under a mask it cannot share heads.
    repeated = work.masked and sizes.kv_heads < sizes.heads
    keys = sizes.queries if repeated else sizes.keys
    attention = product * 2 * (sizes.queries + keys) + 4 * sizes.heads
    # SDPA makes numbers of the boolean mask, in every layer anew, and keeps them.
    attention += product * work.tokens if work.masked else 0
    # Gate, its activation and up are kept by what multiplies them; their product as down's input.
    mlp = product * sizes.inner * (3 + (DOWN in targets))
    adapters = (product * sizes.rank + _dropped(sizes, product)) * len(targets)
    return work.positions * (norms + inputs + attention + mlp + adapters)


def _norm(sizes: ModelSizes, numbers: Numbers) -> int:
    """An RMSNorm squares its input in float32 and keeps the root; its weight's gradient needs what the
    weight multiplies."""
    return (4 + (0 if sizes.base_frozen else numbers.stream)) * sizes.width + 4


def _dropped(sizes: ModelSizes, product: int) -> int:
    """Dropout keeps its own output and a mask for each adapter, most of them as wide as the stream."""
    return (product + 1) * sizes.width if sizes.dropout else 0


def kept_by_model(sizes: ModelSizes, numbers: Numbers, work: Pass, execution: Execution) -> int:
    """Return what is alive when a forward pass through all layers has ended."""
    positions = work.positions
    if execution.activation_checkpointing:
        layers = sizes.layers * positions * numbers.stream * sizes.width  # each layer's input
    else:
        layers = sizes.layers * kept_by_layer(sizes, numbers, work)
        layers += _kept_by_distillation(sizes, numbers, work)
    last_norm = positions * _norm(sizes, numbers)
    answers = work.answers * numbers.stream * sizes.width
    # Ids, attention mask and labels in int64; the boolean mask of all layers; cosines and sines.
    inputs = (
        positions * (24 + (work.tokens if work.masked else 0)) + 8 * work.tokens * sizes.head_dim
    )
    return layers + last_norm + answers + inputs


def _kept_by_distillation(sizes: ModelSizes, numbers: Numbers, work: Pass) -> int:
    """The KL keeps keys of its own where SDPA's are repeated; queries are the same."""
    if work.distillation is None or not work.masked or sizes.kv_heads == sizes.heads:
        return 0
    return work.distillation.layers * work.positions * numbers.product * sizes.keys


def layer_backward(sizes: ModelSizes, numbers: Numbers, work: Pass) -> int:
    """Return what the backward pass of a layer adds to what the layer kept.

    Most exists in the MLP: gradients of gate, activation and up, when down's input is free again; and
    those of the stream and of the norm's output.
    """
    per_token = 2 * numbers.product * sizes.inner + 2 * numbers.stream * sizes.width
    return work.positions * per_token


def head_backward(sizes: ModelSizes, numbers: Numbers, work: Pass) -> int:
    """Return what losses on logits add in their backward pass."""
    distilled = work.distillation is not None
    copies = _CHUNKS_OF_KL if distilled else _CHUNKS_OF_NLL
    if sizes.plain_head:
        positions = min(work.answers, max(1, CHUNK_ELEMENTS // sizes.vocab))
        whole = 0
    else:  # logits of all positions, and their gradient
        positions = work.answers
        whole = 2 * numbers.product * work.positions * sizes.vocab
    logits = whole + int(copies * 4 * positions * sizes.vocab)
    # The head's weight is cast where autocast would; its gradient is summed in float32, product by
    # product.
    cast = 2 * sizes.head if numbers.casts and not sizes.base_frozen else 0
    gradient = 0 if sizes.base_frozen else 4 * sizes.head
    gradient += 2 * sizes.head if gradient and numbers.product == 2 else 0
    hidden = numbers.stream * sizes.width * (work.answers + work.positions)
    return logits + cast + gradient + hidden


def teacher_rows(sizes: ModelSizes, work: Pass) -> int:
    """Return what targets of a pass take, and the tiles they are compared in."""
    found = work.distillation
    if found is None:
        return 0
    queries = min(found.queries, work.tokens)
    entries = work.tokens // 2 if found.attention_kept is None else found.attention_kept
    attention = work.rows * found.heads * queries * (_ENTRY * entries + _ROW)
    per_token = 4 * sizes.vocab if found.logits_kept is None else _ENTRY * found.logits_kept + _ROW
    tiles = _TILES * 4 * TILE_ELEMENTS if found.heads else 0
    return attention + work.answers * per_token + tiles

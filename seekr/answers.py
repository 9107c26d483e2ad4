"""What a loss reads of the language-model head: logits at answer positions, a chunk at a time.

A loss on logits is one number per answer position, and needs no logits of any other. So the head is
multiplied with the hidden states of those positions only, in chunks (`chunked_head`), where the
head's own output [B,T,V] and its gradient are most of what a step takes with a large vocabulary.

`reading_head` lets a model's forward pass end in such a reading instead of logits, and
`has_plain_head` says for which models that is the same thing.

Shape suffixes: B batch, T tokens, A answer positions of the whole batch, C those of one chunk, V
vocab, H hidden width, K losses.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PretrainedConfig, PreTrainedModel

from seekr.attention import inner_model
from seekr.chunked_head import chunked_losses
from seekr.errors import UnsupportedModel
from seekr.softmax import exact_dtype

# Logits held at a time: 128 MiB in float32, and a few times that while a loss is formed from them.
CHUNK_ELEMENTS = 2**25
# Fields of a config that scale or cap logits after the head, by families.
_AFTER_THE_HEAD = (
    *("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap", "softcap"),
    *("logits_scaling", "logit_scale", "lm_head_multiplier"),
)


class PositionLoss(Protocol):
    """A loss that is one number per position, from the logits at that position alone."""

    @property
    def row_A(self) -> Tensor:
        """Batch row of each position."""
        ...

    @property
    def position_A(self) -> Tensor:
        """Padded position where logits are read, as `answer_positions` gives them."""
        ...

    def __call__(self, logits_CV: Tensor, part: slice) -> Tensor:
        """Return the loss [C] of the positions `part` of A, differentiable in the logits.

        Args:
            logits_CV: In float32 or better.
            part: With both ends given.
        """
        ...


class Answers(Protocol):
    """Whatever can give logits at positions of a batch."""

    @property
    def num_rows(self) -> int:
        """Number of batch rows, B."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def sums(self, *losses: PositionLoss) -> tuple[Tensor, ...]:
        """Return for each loss its sum per batch row [B], differentiable, in float32 or better."""
        ...

    def values(self, loss: PositionLoss) -> Tensor:
        """Return a loss at each of its positions [A], without gradient."""
        ...


class WholeLogits:
    """Logits [B,T,V] that are there anyway. Losses with equal positions share one reading.

    Backward makes a [B,T,V] gradient of each reading.
    """

    def __init__(self, logits_BTV: Tensor) -> None:
        self.logits_BTV = logits_BTV
        self.num_rows, _, self.vocab_size = logits_BTV.shape

    def sums(self, *losses: PositionLoss) -> tuple[Tensor, ...]:
        return _sums_per_row(losses, self.num_rows, self._values)

    @torch.no_grad()
    def values(self, loss: PositionLoss) -> Tensor:
        return self._values([loss])[0]

    def _values(self, losses: Sequence[PositionLoss]) -> list[Tensor]:
        logits_AV = self.logits_BTV[losses[0].row_A, losses[0].position_A]
        logits_AV = logits_AV.to(exact_dtype(logits_AV.dtype))
        return [loss(logits_AV, slice(0, len(logits_AV))) for loss in losses]


class HiddenStates:
    """The head's input and weights. Losses with equal positions share one pass over chunks.

    Under autocast the products are formed in its dtype, as `F.linear` would, and losses in float32.
    Without positions the sums are 0 and hidden states and weights still get a gradient of 0, so in
    a distributed run no worker lacks one that the others wait for.

    Args:
        hidden_BTH: What the head is called with.
        weight_VH: The head's parameter itself. It is read again in backward, where whatever shards
            parameters has put its values back; nothing made from it is kept.
        bias_V: The head's other parameter, if it has one.
        chunk_elements: Logits held at a time; one position's are held in any case.
    """

    def __init__(
        self,
        hidden_BTH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None = None,
        *,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self._hidden_BTH, self._weight_VH, self._bias_V = hidden_BTH, weight_VH, bias_V
        self.num_rows, self.vocab_size = len(hidden_BTH), len(weight_VH)
        self._chunk = max(1, chunk_elements // max(1, self.vocab_size))

    def sums(self, *losses: PositionLoss) -> tuple[Tensor, ...]:
        return _sums_per_row(losses, self.num_rows, self._values)

    @torch.no_grad()
    def values(self, loss: PositionLoss) -> Tensor:
        return self._values([loss])[0]

    def _values(self, losses: Sequence[PositionLoss]) -> Sequence[Tensor]:
        hidden_AH = self._hidden_BTH[losses[0].row_A, losses[0].position_A]
        values_KA = chunked_losses(hidden_AH, self._weight_VH, self._bias_V, losses, self._chunk)
        return values_KA.unbind(0)


def _sums_per_row(
    losses: Sequence[PositionLoss],
    num_rows: int,
    values_of: Callable[[Sequence[PositionLoss]], Sequence[Tensor]],
) -> tuple[Tensor, ...]:
    """Sum each loss per batch row, taking the values of losses with equal positions together."""
    sums: dict[int, Tensor] = {}
    for group in _with_equal_positions(losses):
        values = values_of([losses[index] for index in group])
        for index, values_A in zip(group, values, strict=True):
            zeros_B = values_A.new_zeros(num_rows)
            sums[index] = zeros_B.index_add(0, losses[index].row_A, values_A)
    return tuple(sums[index] for index in range(len(losses)))


def _with_equal_positions(losses: Sequence[PositionLoss]) -> list[list[int]]:
    groups: list[list[int]] = []
    for index, loss in enumerate(losses):
        for group in groups:
            first = losses[group[0]]
            if torch.equal(first.row_A, loss.row_A) and torch.equal(
                first.position_A, loss.position_A
            ):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


Read = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@contextmanager
def reading_head(model: nn.Module, read: Read) -> Iterator[None]:
    """Let the model's head return `read(hidden_BTH, weight_VH, bias_V)` inside the block.

    `model(...).logits` is then that tensor. `read` runs within the head's forward, where sharded
    parameters are whole, and the model's hooks see its tensor as the head's output: what backward
    starts from has to be made from it. Only for models with `has_plain_head`.

    Args:
        model: A transformers causal LM, bare or in DDP, FSDP2, PEFT or a DeepSpeed engine.

    Raises:
        UnsupportedModel: the model has no output embeddings with a weight.
        RuntimeError: the head's forward is replaced already.
    """
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UnsupportedModel(
            f"{type(inner).__name__} has no output embeddings with a weight; its logits cannot be "
            "read in chunks: use whole logits"
        )
    if "forward" in head.__dict__:
        raise RuntimeError("the head's forward is replaced already; leave that block first")
    # The weight is looked up in the call: sharding gives the module another tensor each time.
    head.__dict__["forward"] = lambda hidden_BTH: read(hidden_BTH, head.weight, head.bias)
    try:
        yield
    finally:
        head.__dict__.pop("forward", None)


def has_plain_head(model: nn.Module) -> bool:
    """Whether the model's logits are its head's product and nothing else, as far as can be read.

    True for an `nn.Linear` head if the model's own forward pass gives its output out as it is.
    False in all doubtful cases: capped or scaled logits, LoRA or quantised weights in the head, a
    head split over devices, code that is written in another way or cannot be read.
    """
    inner = inner_model(model)
    head = inner.get_output_embeddings()
    # FSDP2 makes a class of its own for what it shards.
    sharded = type(head).__bases__ == (FSDPModule, nn.Linear)
    if head is None or not (type(head) is nn.Linear or sharded):
        return False
    if "forward" in head.__dict__ or "forward" in inner.__dict__:
        return False
    if getattr(inner, "_tp_size", None) not in (None, 1):
        return False
    text = inner.config.get_text_config()
    if any(getattr(text, field, None) not in (None, 1) for field in _AFTER_THE_HEAD):
        return False
    return _gives_out_the_product(inner, head)


def _gives_out_the_product(inner: PreTrainedModel, head: nn.Module) -> bool:
    """Read the forward of the model's class, as `check_probeable` reads it for its attention.

    All it may do with `logits` is to set them once to the head's product, form the loss that is
    not asked for here, and return them.
    """
    try:
        source = inspect.getsource(inspect.unwrap(type(inner).forward))
        tree = ast.parse(f"class Model:\n{source}")
    except (OSError, TypeError, SyntaxError):
        return False
    function = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    name = next((name for name, module in inner.named_children() if module is head), None)
    allowed = (
        re.compile(rf"logits = self\.{name}\(\w+\)"),
        re.compile(r"return \w+\(.*\blogits=logits\b.*\)"),
        re.compile(r"loss = self\.loss_function\(.*\)"),
    )
    times = [0, 0, 0]
    for text in _uses_of_logits(function.body, inner.config):
        matches = [pattern.fullmatch(text) is not None for pattern in allowed]
        if not any(matches):
            return False
        times[matches.index(True)] += 1
    return times[:2] == [1, 1]


def _uses_of_logits(body: Sequence[ast.stmt], config: PretrainedConfig) -> Iterator[str]:
    """Yield the statements, and conditions, that name `logits`.

    Not those under `if self.config.<field> is not None` where the field is None.
    """
    for node in body:
        part = node.test if isinstance(node, ast.If) else node
        if any(isinstance(name, ast.Name) and name.id == "logits" for name in ast.walk(part)):
            yield ast.unparse(part)
        if isinstance(node, ast.If):
            field = re.fullmatch(r"self\.config\.(\w+) is not None", ast.unparse(node.test))
            if field is None or getattr(config, field[1], False) is not None:
                yield from _uses_of_logits(node.body, config)
            yield from _uses_of_logits(node.orelse, config)

"""What a strategy holds of weights, gradients and optimizer, per worker and in bytes.

Every strategy is a table of the same terms, so that phases of a step (`memory`) can be added up
without knowing which one it is. Sizes of buffers are the libraries' defaults, which
`strategy`, `fsdp` and `zero` leave as they are: DeepSpeed's buckets of 5e8 numbers, its 1e9 gathered
parameters, FSDP2's two layers in flight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from seekr.training.activations import Numbers
from seekr.training.model_sizes import ModelSizes
from seekr.training.settings import Execution, Recipe

Device = Literal["cpu", "cuda"]

# deepspeed.runtime.zero.config, the defaults: reduce_bucket_size, max_live_parameters (and
# max_reuse_distance), prefetch_bucket_size, sub_group_size.
_REDUCE_BUCKET, _MAX_LIVE, _PREFETCH, _SUB_GROUP = 500_000_000, 1_000_000_000, 50_000_000, 10**9
# bitsandbytes: two bytes of state per number, and a float32 per block of 256 for each of the two.
_EIGHT_BIT_STATE = 2 + 2 * 4 / 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Bytes of one worker.

    Attributes:
        parameters: masters and working copies. optimizer: its state.
        gathered: whole weights made from shards, or autocast's copies of weights.
        before: gradients while the first forward pass of a step runs. between: while a later one
            does. after: when a backward pass has come to its first layer.
        begun, reduced: buffers that gradients are averaged in, at backward's last layer and at its first.
        apart: gradients outside of layers that stay whole until a pass ends.
        largest: gradients of one tensor on their way into the others: embedding or head.
        step: what the update adds to `between` or `after`.
        host: of the above, what offload keeps in host memory instead; beside the device's figures.
        saved: masters and optimizer state that this worker writes into a checkpoint.
    """

    parameters: int
    optimizer: int
    gathered: int
    before: int
    between: int
    after: int
    begun: int
    reduced: int
    largest: int
    step: int
    saved: int
    apart: int = 0
    host: int = 0


def held_by(
    sizes: ModelSizes, recipe: Recipe, execution: Execution, workers: int, device: Device
) -> Held:
    """Return the terms of the configured strategy.

    Args:
        workers: That training has; 1 with ddp means no process group at all.
    """
    numbers = Numbers.of(recipe, execution)
    if execution.strategy == "fsdp":
        return _fsdp(sizes, recipe, numbers, workers, execution, device)
    if execution.strategy == "deepspeed":
        return _zero(sizes, numbers, workers, execution, device)
    return _ddp(sizes, recipe, numbers, workers)


def _ddp(sizes: ModelSizes, recipe: Recipe, numbers: Numbers, workers: int) -> Held:
    """A whole model each.

    DDP's buckets hold all gradients from the start, and for ever. Passes before a step's last one do
    not synchronise and know nothing of buckets: their gradients are tensors of their own beside them.
    """
    trained = sizes.trained
    state = _EIGHT_BIT_STATE if recipe.optimizer == "adamw_8bit" else 8
    cast = sizes.adapters if sizes.base_frozen else sizes.linear
    buckets = 4 * trained if workers > 1 else 0
    return Held(
        parameters=4 * trained + recipe.dtype.itemsize * sizes.frozen,
        optimizer=int(state * trained),
        # Autocast keeps its copies until its context ends, which is after backward.
        gathered=2 * cast if numbers.casts else 0,
        before=buckets,
        between=buckets + 4 * trained,
        after=4 * trained,
        begun=0,
        reduced=0,
        largest=4 * _largest(sizes),
        step=0,
        saved=int((4 + state) * trained),
    )


def _fsdp(
    sizes: ModelSizes,
    recipe: Recipe,
    numbers: Numbers,
    workers: int,
    execution: Execution,
    device: Device,
) -> Held:
    """Shards of rows. A layer is whole while it computes, the next one on its way; what lies outside
    of layers stays whole from forward to backward, as FSDP2 leaves its root. Every pass reduces its
    gradients to shards.
    """
    share = -(-sizes.trained // workers)
    layer = sizes.layer + sizes.adapters // sizes.layers
    in_flight = 1 if workers == 1 else 2
    parameters = 4 * share + recipe.dtype.itemsize * -(-sizes.frozen // workers)
    # A layer's gradients as computed, and the float32 buffer they are reduced from.
    reduced = (numbers.product + 4) * sizes.trained_layer
    offloads = execution.offload == "all" and device == "cuda"
    return Held(
        parameters=0 if offloads else parameters,
        optimizer=0 if offloads else 8 * share,
        gathered=numbers.product * (sizes.root + in_flight * layer),
        before=0,
        between=4 * share,
        after=4 * share,
        begun=reduced,
        reduced=reduced,
        apart=0 if sizes.base_frozen else numbers.product * sizes.head,
        # The root's gradients are reduced last and all at once.
        largest=(numbers.product + 4) * sizes.trained_root,
        step=0,
        saved=12 * share,
        host=parameters + 12 * share if offloads else 0,
    )


def _zero(
    sizes: ModelSizes, numbers: Numbers, workers: int, execution: Execution, device: Device
) -> Held:
    """Flat parts of everything: of optimizer state and masters (1), gradients (2), weights (3)."""
    product, share = numbers.product, -(-sizes.trained // workers)
    # On a GPU the bucket takes its whole size; on the CPU what is written of it becomes memory.
    most = _REDUCE_BUCKET if device == "cuda" else min(sizes.trained, _REDUCE_BUCKET)
    if execution.zero_stage == 3:
        held = _cut_weights(sizes, product, workers, product * most)
    elif execution.zero_stage == 1 and product == 2 and execution.offload == "none":
        held = _bfloat16_stage_1(sizes, share)
    else:
        held = _whole_weights(sizes, product, share, product * most, execution.zero_stage == 2)
        if device == "cpu":
            held = replace(held, begun=min(held.reduced, held.largest))
    masters = 4 * share if execution.zero_stage < 3 or product == 2 else 0
    return _offloaded(held, execution, masters, share, product) if device == "cuda" else held


def _cut_weights(sizes: ModelSizes, product: int, workers: int, bucket: int) -> Held:
    """Stage 3. Its bucket and its part of the gradients are there for ever; masters are the parts
    themselves where those are float32."""
    share = -(-sizes.trained // workers)
    return Held(
        parameters=product * -(-sizes.total // workers) + (0 if product == 4 else 4 * share),
        optimizer=8 * share,
        gathered=product * (min(sizes.total, _MAX_LIVE) + min(sizes.total, _PREFETCH)) + bucket,
        before=4 * share,
        between=4 * share,
        after=4 * share,
        begun=0,
        reduced=0,
        largest=product * _largest(sizes),
        step=4 * min(share, _SUB_GROUP),  # the flat gradient that the update reads
        saved=12 * share,
    )


def _whole_weights(sizes: ModelSizes, product: int, share: int, bucket: int, second: bool) -> Held:
    """Stages 1 and 2: weights whole, masters cut.

    Stage 2 keeps its part of the gradients and copies each pass's part out of the bucket. Stage 1
    reduces in the last pass alone, moving whole gradients into the bucket.
    """
    between = 4 * (share if second else sizes.trained)
    reduced = bucket if second else max(0, bucket - product * sizes.trained)
    return Held(
        parameters=product * sizes.total + 4 * share,
        optimizer=8 * share,
        gathered=0,
        before=0,
        between=between,
        after=between + product * share,
        begun=reduced,
        reduced=reduced,
        largest=product * _largest(sizes),
        step=4 * share,  # the flat gradient that the update reads
        saved=12 * share,
    )


def _bfloat16_stage_1(sizes: ModelSizes, share: int) -> Held:
    """DeepSpeed's BF16_Optimizer: float32 gradients of all weights for ever, a pass's own beside."""
    return Held(
        parameters=2 * sizes.total + 4 * share,
        optimizer=8 * share,
        gathered=0,
        before=4 * sizes.trained,
        between=4 * sizes.trained,
        after=6 * sizes.trained,
        begun=0,
        reduced=0,
        largest=2 * _largest(sizes),
        step=0,
        saved=12 * share,
    )


def _offloaded(held: Held, execution: Execution, masters: int, share: int, product: int) -> Held:
    """Move to the host what DeepSpeed keeps there: optimizer, masters, gradients; weights with `all`.

    Beside the float32 gradients stages 1 and 2 have a copy of the updated weights there, to be sent.
    """
    if execution.offload == "none":
        return held
    weights = held.parameters - masters if execution.offload == "all" else 0
    sent = product * share if execution.zero_stage < 3 else 0
    return replace(
        held,
        parameters=held.parameters - masters - weights,
        optimizer=0,
        between=0,
        after=0,
        before=0,
        step=0,
        host=weights + 4 * share + held.optimizer + 4 * share + sent,
    )


def _largest(sizes: ModelSizes) -> int:
    """Numbers of the largest trained tensor: the embedding, or an adapter's side of the MLP."""
    return max(sizes.rank * sizes.inner, sizes.added) if sizes.base_frozen else sizes.head

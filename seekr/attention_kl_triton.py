"""Attention KL on CUDA: one kernel forward, one per gradient backward, no map and no float atomics.

The kernels are in `attention_kl_kernels`, what they are launched with in `attention_kl_windows`;
here they become a differentiable function. Forward keeps two or three numbers per row; backward
forms the scores again. Where few query rows would leave a device idle, their keys are split between
programs and the parts added in a fixed order, so results repeat to the bit on one kind of device.

Products are of the inputs' own dtype, sums and exponentials float32 (float64 for float64 input).
Gradients of the scores are divided by the largest incoming gradient while they are narrow.

Shape suffixes: B batch, H query heads, G key/value heads, S selected heads, Q query rows, T tokens
(keys), D head dim; R all rows in the order B,S,Q; W rows of a window; P parts of split keys; U used
key groups.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seekr.attention_kl import Geometry, Teacher, TeacherPair
from seekr.attention_kl_windows import Layer, Window, num_splits
from seekr.errors import ConfigError
from seekr.sparse_rows import SparseRows

MAX_HEAD_DIM = 256


def can_use_triton(query_BHTD: Tensor, geometry: Geometry) -> bool:
    """Whether `triton_attention_kl` takes such queries; see there for what it asks for."""
    return _refusal(query_BHTD, geometry) is None


def triton_attention_kl(
    query_BHTD: Tensor, key_BGTD: Tensor, teacher: Teacher, geometry: Geometry
) -> Tensor:
    """`attention_kl` in the manner above; [B,S,Q]. Not twice differentiable.

    A key outside a query's span that the teacher kept makes that row's KL infinite; the gradient is
    that of the other entries.

    Raises:
        ConfigError: triton is not installed; the tensors are not on a CUDA device of compute
            capability 8.0 or newer (nor run by triton's interpreter); a dtype other than float16,
            bfloat16 or float32 (interpreted: or float64), a head dim above MAX_HEAD_DIM, or an
            epsilon other than 0 is asked for; or the teacher's head dim is not the student's.
    """
    reason = _refusal(query_BHTD, geometry)
    their_dim = teacher.query_BSQD.shape[-1] if isinstance(teacher, TeacherPair) else None
    if reason is None and their_dim not in (None, query_BHTD.shape[-1]):
        reason = f"teacher head dim {their_dim}, allowed is the student's {query_BHTD.shape[-1]}"
    if reason is not None:
        raise ConfigError(
            f"attention KL backend 'triton' cannot be used: found {reason}; use 'auto' or 'tiled'"
        )
    return _TritonKL.apply(query_BHTD, key_BGTD, teacher, geometry)  # pyright: ignore


def _refusal(query: Tensor, geometry: Geometry) -> str | None:
    """What was found and what is allowed, or None where the kernels can be used."""
    if find_spec("triton") is None:
        return "no package triton, allowed is 3.5 or newer: install it"
    if query.device.type == "cuda":
        found = torch.cuda.get_device_capability(query.device)
        if torch.version.hip is not None or found < (8, 0):
            return f"a device of compute capability {found}, allowed is CUDA 8.0 or newer"
    elif query.device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {query.device}, allowed is CUDA (or TRITON_INTERPRET=1 for tests on CPU)"
    dtypes = [torch.float16, torch.bfloat16, torch.float32]
    dtypes += [torch.float64] if query.device.type == "cpu" else []
    if query.dtype not in dtypes:
        return f"dtype {query.dtype}, allowed are {', '.join(map(str, dtypes))}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"head dim {query.shape[-1]}, allowed is up to {MAX_HEAD_DIM}"
    if geometry.epsilon != 0:
        return f"epsilon {geometry.epsilon}, allowed is 0"
    return None


class _TritonKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_BHTD: Tensor, key_BGTD: Tensor, teacher: Teacher, geometry: Geometry
    ) -> Tensor:
        with _plain_arithmetic(query_BHTD.device):
            layer = Layer(query_BHTD, key_BGTD, teacher, geometry)
            kl_R = torch.zeros(layer.num_all, dtype=layer.dtype, device=layer.device)
            kept_R = kl_R.new_zeros(2 if layer.is_pair else 3, layer.num_all)
            for window in layer.windows():
                combine = _combine_pair if layer.is_pair else _combine_stored
                kl_R[window.chosen], *kept_W = combine(layer, window)
                for kept, part in zip(kept_R, kept_W, strict=True):
                    kept[window.chosen] = part
        ctx.save_for_backward(query_BHTD, key_BGTD, kept_R)
        ctx.teacher, ctx.geometry = teacher, geometry
        return kl_R.view(layer.shape)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_BSQ: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        query_BHTD, key_BGTD, kept_R = ctx.saved_tensors
        with _plain_arithmetic(query_BHTD.device):
            layer = Layer(query_BHTD, key_BGTD, ctx.teacher, ctx.geometry)
            grads = _Gradients(layer, grad_BSQ, kept_R)
            for window in layer.windows():
                dense = None if layer.is_pair else layer.dense(window)[0]
                if ctx.needs_input_grad[0]:
                    grads.add_queries(window, dense)
                if ctx.needs_input_grad[1]:
                    grads.add_keys(window, dense)
            return grads.of_query(), grads.of_key(), None, None


def _plain_arithmetic(device: torch.device) -> ExitStack:
    """Outside autocast, and with `device` current: kernels go where that points."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(device_type=device.type, enabled=False))
    if device.type == "cuda":
        stack.enter_context(torch.cuda.device(device))
    return stack


def _launch(
    name: str,
    grid: tuple[int, ...],
    layer: Layer,
    window: Window,
    dense: Tensor | None,
    *own: Tensor,
) -> None:
    """Run a kernel; `own` are its arguments between `slots` and the strides."""
    from triton import language as tl

    from seekr import attention_kl_kernels as kernels

    # Triton's interpreter multiplies bfloat16 as if it were integers.
    narrow = torch.float32 if layer.device.type == "cpu" else layer.dot_dtype
    dot_dtype = narrow if layer.dot_dtype == torch.bfloat16 else layer.dot_dtype
    unused = [] if layer.is_pair else [layer.query, layer.key]
    tensors = [*layer.operands, *unused]
    teacher_scaling = layer.teacher.scaling if isinstance(layer.teacher, TeacherPair) else 1.0
    sizes = (layer.num_batch, layer.num_slots, layer.num_rows, layer.num_tokens)
    getattr(kernels, name)[grid](
        *tensors,
        layer.query if dense is None else dense,
        *(layer.rows_3BQ, layer.slots),
        *own,
        *(stride for tensor in tensors for stride in tensor.stride()),
        *(layer.geometry.scaling, teacher_scaling),
        *sizes,
        *(window.strip, window.strips, window.row, window.rows),
        PAIR=layer.is_pair,
        D=layer.head_dim,
        BLOCK_D=max(16, 1 << (layer.head_dim - 1).bit_length()),
        DOT=_triton_dtype(tl, dot_dtype),
        ACC=_triton_dtype(tl, layer.dtype),
        BLOCK_Q=layer.launch.block_q,
        BLOCK_K=layer.launch.block_k,
        num_warps=layer.launch.num_warps,
        num_stages=layer.launch.num_stages,
    )


def _triton_dtype(tl: Any, dtype: torch.dtype) -> Any:
    return getattr(tl, str(dtype).removeprefix("torch."))


def _row_grid(layer: Layer, window: Window) -> tuple[int, int, int]:
    """Blocks of query rows, strips, parts that keys are split into."""
    blocks = -(-window.rows // layer.launch.block_q)
    return blocks, window.strips, num_splits(blocks * window.strips, layer)


def _run_forward(layer: Layer, window: Window, dense: Tensor | None) -> Tensor:
    """Return what the forward kernel writes, [4,P,W]."""
    grid = _row_grid(layer, window)
    out_4PW = torch.empty(4, grid[2], window.size, dtype=layer.dtype, device=layer.device)
    _launch("forward", grid, layer, window, dense, out_4PW)
    return out_4PW


def _combine_pair(layer: Layer, window: Window) -> tuple[Tensor, Tensor, Tensor]:
    """Return (KL, log denominators of the student, of the teacher), each [W]."""
    assert isinstance(layer.teacher, TeacherPair)
    log_z_PW, log_y_PW, excess_PW, _ = _run_forward(layer, window, None)
    log_z_W, log_y_W = log_z_PW.logsumexp(dim=0), log_y_PW.logsumexp(dim=0)
    live_W = layer.teacher.valid_BSQ.reshape(-1)[window.chosen] & (log_y_W > -torch.inf)
    weight_PW = (log_y_PW - log_y_W).exp()
    kl_W = (weight_PW * excess_PW).sum(dim=0) - log_y_W + log_z_W
    return kl_W.masked_fill(~live_W, 0.0), _finite(log_z_W), _finite(log_y_W)


def _combine_stored(layer: Layer, window: Window) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (KL, log denominators, log-sums over what was not kept, the mass kept), each [W]."""
    assert isinstance(layer.teacher, SparseRows)
    dense, blocked_W = layer.dense(window)
    log_kept_PW, log_rest_PW, cross_PW, mass_PW = _run_forward(layer, window, dense)
    log_kept_W, log_rest_W = log_kept_PW.logsumexp(dim=0), log_rest_PW.logsumexp(dim=0)
    log_z_W, mass_W = torch.logaddexp(log_kept_W, log_rest_W), mass_PW.sum(dim=0)
    tail_W = layer.teacher.tail_R[window.chosen].to(layer.device, layer.dtype)
    tail_kl_W = torch.xlogy(tail_W, tail_W) - tail_W * (log_rest_W - log_z_W)
    tail_kl_W = tail_kl_W.masked_fill((tail_W <= 0) | (log_rest_W == -torch.inf), 0.0)
    kl_W = cross_PW.sum(dim=0) + mass_W * _finite(log_z_W) + tail_kl_W
    return kl_W.masked_fill(blocked_W, torch.inf), _finite(log_z_W), log_rest_W, mass_W


def _finite(log_W: Tensor) -> Tensor:
    """Logarithms, 0 for those of 0."""
    return log_W.masked_fill(log_W == -torch.inf, 0.0)


class _Gradients:
    """Both gradients on the way, divided by `peak`, the largest incoming one, and the scaling."""

    def __init__(self, layer: Layer, grad_BSQ: Tensor, kept_R: Tensor) -> None:
        self.layer = layer
        grad_R = grad_BSQ.reshape(-1).to(layer.dtype)
        tiny = torch.finfo(layer.dtype).tiny
        self.peak = grad_R.abs().amax().clamp(min=tiny) if layer.num_all else grad_R.sum()
        self.stats_5R = self._stats(grad_R / self.peak, kept_R)
        batch, heads, tokens, dim = layer.query.shape
        # The last row takes what belongs to missing query rows.
        self.query_rows = layer.query.new_zeros(batch * heads * tokens + 1, dim)
        self.target_R = self._targets(heads, tokens)
        self.keys_BUTD = self.stats_5R.new_zeros(batch, len(layer.used), layer.num_tokens, dim)
        self.reach = layer.reach()

    def _stats(self, grad_R: Tensor, kept_R: Tensor) -> Tensor:
        """What the kernels want to know of each row: see `_score_gradient` there."""
        teacher = self.layer.teacher
        if isinstance(teacher, TeacherPair):
            grad_R = grad_R.masked_fill(~teacher.valid_BSQ.reshape(-1), 0.0)
            nothing_R = torch.zeros_like(grad_R)
            return torch.stack([grad_R, kept_R[0], kept_R[1], nothing_R, nothing_R])
        log_z_R, log_rest_R, mass_R = kept_R
        tail_R = teacher.tail_R.to(grad_R.device, grad_R.dtype)
        tail_R = tail_R.masked_fill(log_rest_R == -torch.inf, 0.0)
        mass_R = mass_R + tail_R
        rest_R = (log_rest_R - log_z_R).exp()
        factors = (grad_R * mass_R, grad_R * (mass_R * rest_R - tail_R))
        return torch.stack([grad_R, log_z_R, _finite(log_rest_R), *factors])

    def _targets(self, heads: int, tokens: int) -> Tensor:
        """Each row's place in `query_rows`, [R]."""
        layer = self.layer
        position_R = layer.per_row(layer.rows_3BQ[0]).to(torch.int64)
        batch_B = torch.arange(layer.num_batch, device=layer.device)
        place_BS = batch_B[:, None] * heads + layer.slots[0]
        place_R = place_BS[..., None].expand(layer.shape).reshape(-1)
        end = layer.num_batch * heads * tokens
        return torch.where(position_R < 0, end, place_R * tokens + position_R)

    def add_queries(self, window: Window, dense: Tensor | None) -> None:
        layer, grid = self.layer, _row_grid(self.layer, window)
        out_PWD = self.stats_5R.new_empty(grid[2], window.size, layer.head_dim)
        _launch("query_gradient", grid, layer, window, dense, self.stats_5R, out_PWD)
        rows_WD = out_PWD.sum(dim=0).mul_(self.peak * layer.geometry.scaling)
        self.query_rows[self.target_R[window.chosen]] = rows_WD.to(self.query_rows.dtype)

    def add_keys(self, window: Window, dense: Tensor | None) -> None:
        layer = self.layer
        last = (window.strip + window.strips - 1) // layer.num_slots
        num_batch = last - window.strip // layer.num_slots + 1
        grid = (self.reach.shape[2], len(layer.used), num_batch)
        own = (self.stats_5R, layer.groups, self.reach, self.keys_BUTD)
        _launch("key_gradient", grid, layer, window, dense, *own)

    def of_query(self) -> Tensor:
        return self.query_rows[:-1].view(self.layer.query.shape)

    def of_key(self) -> Tensor:
        key = self.layer.key
        grad_BGTD = key.new_zeros(key.shape)
        used_U = torch.tensor(self.layer.used, device=grad_BGTD.device)
        rows = self.keys_BUTD.mul_(self.peak * self.layer.geometry.scaling)
        return grad_BGTD.index_copy_(1, used_U, rows.to(grad_BGTD.dtype))

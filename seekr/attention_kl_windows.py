"""What the Triton kernels of the attention KL are launched with: tables, windows, block sizes.

The kernels want small int32 tables on the device: the position and span of each query row, the head
and key group of each slot, and which blocks of query rows look at a block of keys. A pair of teacher
tensors is read as it is. Stored rows are laid out densely, window after window: a window is a run of
consecutive rows, and at most DENSE_BYTES of a map exist at a time.

Shape suffixes: B batch, S selected heads, Q query rows, T tokens (keys), D head dim; R all rows in
the order B,S,Q; W rows of a window; J blocks of query rows, M blocks of keys; N kept entries of a
window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce

import torch
from torch import Tensor
from torch.nn.functional import pad

from seekr.attention_kl import Geometry, Teacher, TeacherPair
from seekr.softmax import exact_dtype
from seekr.sparse_rows import SparseRows

DENSE_BYTES = 1 << 25
_MAX_STRIPS = 65535  # of a launch: the second dimension of a CUDA grid
_NARROWEST_SPLIT = 4  # blocks of keys


@dataclass(frozen=True, slots=True)
class Launch:
    """Block sizes, powers of two from 16, and what the compiler is told."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def launch_parameters(head_dim: int, dtype: torch.dtype) -> Launch:
    """Return block sizes that keep all kernels within 99 KB of shared memory."""
    if dtype.itemsize >= 4:
        return Launch(32, 16 if head_dim > 128 else 32, 8, 2)
    if head_dim > 128:
        return Launch(32, 32, 4, 2)
    return Launch(64, 32, 4, 2)


@cache
def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True, slots=True)
class Window:
    """Query rows row .. row + rows of `strips` strips from `strip`, consecutive among all R."""

    strip: int
    strips: int
    row: int
    rows: int
    base: int

    @property
    def size(self) -> int:
        return self.strips * self.rows

    @property
    def chosen(self) -> slice:
        return slice(self.base, self.base + self.size)


class Layer:
    """One layer's operands as the kernels want them, and its windows."""

    def __init__(self, query: Tensor, key: Tensor, teacher: Teacher, geometry: Geometry) -> None:
        self.query, self.key, self.teacher, self.geometry = query, key, teacher, geometry
        self.device, self.dtype = query.device, exact_dtype(query.dtype)
        self.num_batch, self.num_tokens, self.head_dim = len(query), key.shape[2], key.shape[3]
        self.num_slots, self.num_rows = len(geometry.heads), geometry.positions_BQ.shape[1]
        self.shape = (self.num_batch, self.num_slots, self.num_rows)
        self.num_all = self.num_batch * self.num_slots * self.num_rows
        per_group = query.shape[1] // key.shape[1]
        groups = [head // per_group for head in geometry.heads]
        self.used = sorted(set(groups))
        starts = [groups.index(group) for group in self.used]
        self.slots = self._table([list(geometry.heads), groups])
        self.groups = self._table([starts, [*starts[1:], self.num_slots]])
        self.rows_3BQ = self._rows()
        self.operands = [query, key]
        if isinstance(teacher, TeacherPair):
            self.operands += [teacher.query_BSQD, teacher.key_BSTD]
        dtypes = [operand.dtype for operand in self.operands]
        self.dot_dtype = reduce(torch.promote_types, dtypes)
        self.launch = launch_parameters(self.head_dim, self.dot_dtype)

    def _table(self, numbers: list[list[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).to(self.device)

    def _rows(self) -> Tensor:
        """Position, first and last key; T and -1 where a row has no key. Int32 [3,B,Q]."""
        positions_BQ = self.geometry.positions_BQ.to(self.device)
        at_BQ, spans = positions_BQ.clamp(min=0), self.geometry.spans
        first_BQ = spans.first_BT.to(self.device).gather(1, at_BQ).clamp(min=0)
        last_BQ = spans.last_BT.to(self.device).gather(1, at_BQ).clamp(max=self.num_tokens - 1)
        none_BQ = (positions_BQ < 0) | (last_BQ < first_BQ)
        first_BQ = first_BQ.masked_fill(none_BQ, self.num_tokens)
        last_BQ = last_BQ.masked_fill(none_BQ, -1)
        return torch.stack([positions_BQ, first_BQ, last_BQ]).to(torch.int32)

    @property
    def is_pair(self) -> bool:
        return isinstance(self.teacher, TeacherPair)

    def per_row(self, values_BQ: Tensor) -> Tensor:
        """Repeat what is known per (batch row, query row) for every head: [R]."""
        return values_BQ[:, None].expand(self.shape).reshape(-1)

    def windows(self) -> Iterator[Window]:
        """Cut all rows so that a window of stored rows fits DENSE_BYTES; pairs need no cut."""
        num_strips, block = self.num_batch * self.num_slots, self.launch.block_q
        if num_strips == 0 or self.num_rows == 0:
            return
        rows, strips = self.num_rows, min(num_strips, _MAX_STRIPS)
        if isinstance(self.teacher, SparseRows):
            fit = DENSE_BYTES // (self.num_tokens * self.dtype.itemsize) // block * block
            rows, strips = min(rows, max(fit, block)), min(strips, max(1, fit // rows))
        for strip in range(0, num_strips, strips):
            for row in range(0, self.num_rows, rows):
                base = strip * self.num_rows + row
                size = min(rows, self.num_rows - row)
                yield Window(strip, min(strips, num_strips - strip), row, size, base)

    def dense(self, window: Window) -> tuple[Tensor, Tensor]:
        """Return (a window's kept entries [W * T + 1], which rows keep a key they may not look at).

        The last number of the first is where such entries go.
        """
        assert isinstance(self.teacher, SparseRows)
        offsets = self.teacher.offsets[window.base : window.base + window.size + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        column_N = self.teacher.columns_N[entries].to(self.device)
        value_N = self.teacher.values_N[entries].to(self.device, self.dtype)
        row_W = torch.arange(window.size, device=self.device)
        row_N = row_W.repeat_interleave(offsets.diff().to(self.device), output_size=len(column_N))
        first_W, last_W = (self.per_row(part)[window.chosen] for part in self.rows_3BQ[1:])
        seen_N = (column_N >= first_W[row_N]) & (column_N <= last_W[row_N])
        area = window.size * self.num_tokens
        flat_N = torch.where(seen_N, row_N * self.num_tokens + column_N, area)
        dense = torch.zeros(area + 1, dtype=self.dtype, device=self.device)
        dense[flat_N] = value_N
        count_W = torch.zeros(window.size, dtype=torch.int32, device=self.device)
        count_W.index_add_(0, row_N, (~seen_N & (value_N > 0)).to(torch.int32))
        return dense, (count_W > 0) & (last_W >= 0)

    def reach(self) -> Tensor:
        """Return which blocks of query rows look at a block of keys, int32 [2,B,M]: the first, and
        one after the last."""
        num_blocks = -(-self.num_rows // self.launch.block_q)
        extra = (0, num_blocks * self.launch.block_q - self.num_rows)
        blocks = (self.num_batch, num_blocks, self.launch.block_q)
        first_BQ = pad(self.rows_3BQ[1], extra, value=self.num_tokens)
        last_BQ = pad(self.rows_3BQ[2], extra, value=-1)
        low_BJ, high_BJ = first_BQ.view(blocks).amin(dim=2), last_BQ.view(blocks).amax(dim=2)
        size = self.launch.block_k
        start_M1 = torch.arange(0, self.num_tokens, size, device=self.device)[:, None]
        touch_BMJ = (low_BJ[:, None] < start_M1 + size) & (high_BJ[:, None] >= start_M1)
        index_J = torch.arange(num_blocks, device=self.device)
        low_BM = torch.where(touch_BMJ, index_J, num_blocks).amin(dim=2)
        high_BM = torch.where(touch_BMJ, index_J + 1, 0).amax(dim=2)
        return torch.stack([low_BM, high_BM]).to(torch.int32)


def num_splits(programs: int, layer: Layer) -> int:
    """Between how many programs the keys of a block of query rows are split."""
    by_device = 2 * _num_processors(layer.device) // max(1, programs)
    by_keys = layer.num_tokens // (_NARROWEST_SPLIT * layer.launch.block_k)
    return max(1, min(by_device, by_keys))

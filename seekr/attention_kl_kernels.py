"""The three Triton kernels of the attention KL: forward, gradient of queries, gradient of keys.

A program holds one block of query rows (or of keys) and streams the other side past it; a tile of
scores lives in registers only. Each kernel serves both kinds of teacher (PAIR): a pair's scores are
computed beside the student's, stored entries are read from `dense`, a window of the teacher's rows
that holds 0 where nothing was kept. Nothing is added atomically: each output has one writer.

A *strip* is one selected head of one batch row, number batch * num_slots + slot. A launch covers
`strips` of them from `strip_start`, and of each the query rows row_start .. row_start + chunk_rows;
this window's rows are numbered through from 0 in `dense` and in what is written. `rows` is
int32 [3, batch, num_rows]: position (-1 for none), first and last key. `slots` is int32
[2, num_slots]: query head and key group. Strides come in the order batch, head, token, dim.

Imported only where triton is; TRITON_INTERPRET decides at import how the kernels run.
"""

# A type checker does not know what Triton's compiler makes of constants.
# pyright: reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
from __future__ import annotations

import triton
import triton.language as tl

# Differ from batch to batch: a kernel is not compiled again for another divisibility of these.
_SIZES = ["num_batch", "num_slots", "num_rows", "strip_start", "strips", "row_start", "chunk_rows"]


@triton.jit
def _load_block(pointer, index, stride, dim_stride, valid, D, BLOCK_D: tl.constexpr):
    """Rows `index` of a matrix with D columns, 0 where not valid; far rows need 64 bits."""
    dim = tl.arange(0, BLOCK_D)
    at = pointer + index[:, None] * stride + dim[None, :] * dim_stride
    return tl.load(at, mask=valid[:, None] & (dim[None, :] < D), other=0.0)


@triton.jit
def _load_rows(rows, index, size, live, num_tokens):
    """Position, first and last key of query rows; none where not live."""
    position = tl.load(rows + index, mask=live, other=-1)
    first = tl.load(rows + size + index, mask=live, other=num_tokens)
    return position, first, tl.load(rows + 2 * size + index, mask=live, other=-1)


@triton.jit
def _load_stats(stats, index, size, live):
    """Gradient, two logarithms and two factors per row, for `_score_gradient`."""
    grad = tl.load(stats + index, mask=live, other=0.0)
    log_a = tl.load(stats + size + index, mask=live, other=0.0)
    log_b = tl.load(stats + 2 * size + index, mask=live, other=0.0)
    factor_a = tl.load(stats + 3 * size + index, mask=live, other=0.0)
    return grad, log_a, log_b, factor_a, tl.load(stats + 4 * size + index, mask=live, other=0.0)


@triton.jit
def _key_range(first, last, BLOCK_K: tl.constexpr):
    """Keys that this program's split of a block of query rows looks at: start, and stop."""
    low = tl.min(first, 0) // BLOCK_K * BLOCK_K
    high = tl.max(last, 0) + 1
    share = tl.cdiv(tl.cdiv(tl.maximum(high - low, 0), BLOCK_K), tl.num_programs(2)) * BLOCK_K
    start = low + tl.program_id(2) * share
    return start, tl.minimum(high, start + share)


@triton.jit
def _log_sum(top, total):
    """Logarithm of exp(top) * total; -inf where nothing was added."""
    return tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))


@triton.jit
def _raise_top(top, scores):
    """Return (new highest scores, the same but finite, factor for what was summed so far)."""
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    return new, base, tl.exp(top - base)


@triton.jit(do_not_specialize=_SIZES)
def forward(
    query, key, their_query, their_key, dense, rows, slots, out,
    query_b, query_h, query_t, query_d, key_b, key_h, key_t, key_d,
    tquery_b, tquery_h, tquery_t, tquery_d, tkey_b, tkey_h, tkey_t, tkey_d,
    scaling, their_scaling, num_batch, num_slots, num_rows, num_tokens,
    strip_start, strips, row_start, chunk_rows,
    PAIR: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write [4, splits, rows of the window]; grid (blocks of query rows, strips, splits of keys).

    Stored rows: log-sums of the student's exponentials over kept and over other keys, the sum of
    t * (log t - score) and of t. Pairs: log-sums of the student and of the teacher, and the
    teacher's mean of (its score - the student's); all for this split's keys alone.
    """
    neg = float("-inf")
    strip = (strip_start + tl.program_id(1)).to(tl.int64)
    batch, slot = strip // num_slots, strip % num_slots
    lane, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    block_start = tl.program_id(0) * BLOCK_Q
    live, row = block_start + lane < chunk_rows, row_start + block_start + lane
    at_row, size = batch * num_rows + row, num_batch * num_rows
    position, first, last = _load_rows(rows, at_row, size, live, num_tokens)
    window_start = tl.program_id(1).to(tl.int64) * chunk_rows + block_start
    start, stop = _key_range(first, last, BLOCK_K)

    query += batch * query_b + tl.load(slots + slot).to(tl.int64) * query_h
    key += batch * key_b + tl.load(slots + num_slots + slot).to(tl.int64) * key_h
    their_key += batch * tkey_b + slot * tkey_h
    dense += window_start * num_tokens
    valid = position >= 0
    q = _load_block(query, position.to(tl.int64), query_t, query_d, valid, D, BLOCK_D).to(DOT)
    if PAIR:
        first_row = (row_start + block_start).to(tl.int64)
        their_query += batch * tquery_b + slot * tquery_h + first_row * tquery_t
        tq = _load_block(their_query, lane, tquery_t, tquery_d, live, D, BLOCK_D).to(DOT)
    lowest, nothing = tl.full([BLOCK_Q], neg, ACC), tl.zeros([BLOCK_Q], ACC)
    top_a, sum_a, top_b, sum_b = lowest, nothing, lowest, nothing
    cross, mass = nothing, nothing
    for at in range(start, stop, BLOCK_K):
        inside = at + column < num_tokens
        allowed = column[None, :] >= (first - at)[:, None]
        allowed &= column[None, :] <= (last - at)[:, None]
        far = tl.cast(at, tl.int64)
        k = _load_block(key + far * key_t, column, key_t, key_d, inside, D, BLOCK_D).to(DOT)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if PAIR:
            there = their_key + far * tkey_t
            tk = _load_block(there, column, tkey_t, tkey_d, inside, D, BLOCK_D).to(DOT)
            ts = tl.dot(tq, tl.trans(tk), input_precision="ieee") * their_scaling
            top_a, base_a, keep_a = _raise_top(top_a, tl.where(allowed, s, neg))
            top_b, base_b, keep_b = _raise_top(top_b, tl.where(allowed, ts, neg))
            weight_a = tl.exp(tl.where(allowed, s - base_a[:, None], neg))
            weight_b = tl.exp(tl.where(allowed, ts - base_b[:, None], neg))
            sum_a = sum_a * keep_a + tl.sum(weight_a, 1)
            sum_b = sum_b * keep_b + tl.sum(weight_b, 1)
            cross = cross * keep_b + tl.sum(weight_b * (ts - s), 1)
        else:
            where = dense + at + (lane[:, None] * num_tokens + column[None, :])
            t = tl.load(where, mask=live[:, None] & inside[None, :], other=0.0)
            kept = t > 0
            cross += tl.sum(t * (tl.log(tl.where(kept, t, 1.0)) - s), 1)
            mass += tl.sum(t, 1)
            top_a, base_a, keep_a = _raise_top(top_a, tl.where(kept, s, neg))
            top_b, base_b, keep_b = _raise_top(top_b, tl.where(allowed & (t <= 0), s, neg))
            base = tl.where(kept, base_a[:, None], base_b[:, None])
            weight = tl.exp(tl.where(allowed, s - base, neg))
            sum_a = sum_a * keep_a + tl.sum(tl.where(kept, weight, 0.0), 1)
            sum_b = sum_b * keep_b + tl.sum(tl.where(kept, 0.0, weight), 1)
    if PAIR:
        cross = cross / tl.where(sum_b > 0, sum_b, 1.0)
    size = strips.to(tl.int64) * chunk_rows
    out += tl.program_id(2) * size + window_start + lane
    size *= tl.num_programs(2)
    tl.store(out, _log_sum(top_a, sum_a), mask=live)
    tl.store(out + size, _log_sum(top_b, sum_b), mask=live)
    tl.store(out + 2 * size, cross, mask=live)
    tl.store(out + 3 * size, mass, mask=live)


@triton.jit
def _score_gradient(
    s, theirs, allowed, grad, log_a, log_b, factor_a, factor_b, AXIS: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """Gradient of a tile of scores whose keys lie along AXIS."""
    grad, log_a = tl.expand_dims(grad, AXIS), tl.expand_dims(log_a, AXIS)
    log_b, factor_b = tl.expand_dims(log_b, AXIS), tl.expand_dims(factor_b, AXIS)
    if PAIR:
        ds = grad * (tl.exp(s - log_a) - tl.exp(theirs - log_b))
    else:
        kept = theirs > 0
        share = tl.exp(s - tl.where(kept, log_a, log_b))
        factor_a = tl.expand_dims(factor_a, AXIS)
        ds = tl.where(kept, factor_a * share - grad * theirs, factor_b * share)
    return tl.where(allowed, ds, 0.0)


@triton.jit(do_not_specialize=_SIZES)
def query_gradient(
    query, key, their_query, their_key, dense, rows, slots, stats, out,
    query_b, query_h, query_t, query_d, key_b, key_h, key_t, key_d,
    tquery_b, tquery_h, tquery_t, tquery_d, tkey_b, tkey_h, tkey_t, tkey_d,
    scaling, their_scaling, num_batch, num_slots, num_rows, num_tokens,
    strip_start, strips, row_start, chunk_rows,
    PAIR: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write [splits, rows of the window, D]; grid as in `forward`. `stats` [5, rows]."""
    strip = (strip_start + tl.program_id(1)).to(tl.int64)
    batch, slot = strip // num_slots, strip % num_slots
    lane, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    block_start = tl.program_id(0) * BLOCK_Q
    live, row = block_start + lane < chunk_rows, row_start + block_start + lane
    at_row, size = batch * num_rows + row, num_batch * num_rows
    position, first, last = _load_rows(rows, at_row, size, live, num_tokens)
    window_start = tl.program_id(1).to(tl.int64) * chunk_rows + block_start
    start, stop = _key_range(first, last, BLOCK_K)

    size, at_row = num_slots.to(tl.int64) * num_batch * num_rows, strip * num_rows + row
    g, a, b, fa, fb = _load_stats(stats, at_row, size, live)
    query += batch * query_b + tl.load(slots + slot).to(tl.int64) * query_h
    key += batch * key_b + tl.load(slots + num_slots + slot).to(tl.int64) * key_h
    their_key += batch * tkey_b + slot * tkey_h
    dense += window_start * num_tokens
    valid = position >= 0
    q = _load_block(query, position.to(tl.int64), query_t, query_d, valid, D, BLOCK_D).to(DOT)
    if PAIR:
        first_row = (row_start + block_start).to(tl.int64)
        their_query += batch * tquery_b + slot * tquery_h + first_row * tquery_t
        tq = _load_block(their_query, lane, tquery_t, tquery_d, live, D, BLOCK_D).to(DOT)
    total = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    for at in range(start, stop, BLOCK_K):
        inside = at + column < num_tokens
        allowed = column[None, :] >= (first - at)[:, None]
        allowed &= column[None, :] <= (last - at)[:, None]
        far = tl.cast(at, tl.int64)
        k = _load_block(key + far * key_t, column, key_t, key_d, inside, D, BLOCK_D).to(DOT)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
        if PAIR:
            there = their_key + far * tkey_t
            tk = _load_block(there, column, tkey_t, tkey_d, inside, D, BLOCK_D).to(DOT)
            theirs = tl.dot(tq, tl.trans(tk), input_precision="ieee") * their_scaling
        else:
            where = dense + at + (lane[:, None] * num_tokens + column[None, :])
            theirs = tl.load(where, mask=live[:, None] & inside[None, :], other=0.0)
        ds = _score_gradient(s, theirs, allowed, g, a, b, fa, fb, 1, PAIR)
        total = tl.dot(ds.to(DOT), k, total, input_precision="ieee", out_dtype=ACC)
    dim = tl.arange(0, BLOCK_D)
    out += tl.program_id(2) * (strips.to(tl.int64) * chunk_rows * D)
    place_QD = out + window_start * D + (lane[:, None] * D + dim[None, :])
    tl.store(place_QD, total, mask=live[:, None] & (dim[None, :] < D))


@triton.jit(do_not_specialize=_SIZES)
def key_gradient(
    query, key, their_query, their_key, dense, rows, slots, stats, groups, reach, out,
    query_b, query_h, query_t, query_d, key_b, key_h, key_t, key_d,
    tquery_b, tquery_h, tquery_t, tquery_d, tkey_b, tkey_h, tkey_t, tkey_d,
    scaling, their_scaling, num_batch, num_slots, num_rows, num_tokens,
    strip_start, strips, row_start, chunk_rows,
    PAIR: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add to out [batch, used groups, num_tokens, D]; grid (blocks of keys, used groups, batch rows
    of the window). A program owns its block: windows come one after the other.

    `groups` [2, used groups] holds the slots that share a group: first, and one after the last.
    `reach` [2, batch, blocks of keys] holds the blocks of query rows that look at a block of keys,
    likewise.
    """
    batch = (strip_start // num_slots + tl.program_id(2)).to(tl.int64)
    used, block = tl.program_id(1), tl.program_id(0)
    before = batch * num_slots
    slot_low = tl.maximum(tl.load(groups + used), strip_start - before)
    slot_high = tl.load(groups + tl.num_programs(1) + used)
    slot_high = tl.minimum(slot_high, strip_start + strips - before)
    place = reach + batch * tl.num_programs(0) + block
    row_low = tl.maximum(tl.load(place), row_start // BLOCK_Q)
    row_high = tl.load(place + num_batch * tl.num_programs(0))
    row_high = tl.minimum(row_high, tl.cdiv(row_start + chunk_rows, BLOCK_Q))
    if (slot_low < slot_high) & (row_low < row_high):
        start = block * BLOCK_K
        lane, column = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
        inside = start + column < num_tokens
        num_own, size = num_batch * num_rows, num_slots.to(tl.int64) * num_batch * num_rows
        group, far_start = tl.load(slots + num_slots + slot_low).to(tl.int64), start.to(tl.int64)
        key += batch * key_b + group * key_h + far_start * key_t
        k = _load_block(key, column, key_t, key_d, inside, D, BLOCK_D).to(DOT)
        dim = tl.arange(0, BLOCK_D)
        out += ((batch * tl.num_programs(1) + used) * num_tokens + start) * D
        place_KD = out + (column[:, None] * D + dim[None, :])
        mine = inside[:, None] & (dim[None, :] < D)
        total = tl.load(place_KD, mask=mine, other=0.0)
        for slot in range(slot_low, slot_high):
            student = query + batch * query_b + tl.load(slots + slot).to(tl.int64) * query_h
            if PAIR:
                teacher = their_query + batch * tquery_b + slot * tquery_h
                columns = their_key + batch * tkey_b + slot * tkey_h + far_start * tkey_t
                tk = _load_block(columns, column, tkey_t, tkey_d, inside, D, BLOCK_D).to(DOT)
            for at in range(row_low, row_high):
                row = at * BLOCK_Q + lane
                live = (row >= row_start) & (row < row_start + chunk_rows)
                at_own, at_row = batch * num_rows + row, (before + slot) * num_rows + row
                position, first, last = _load_rows(rows, at_own, num_own, live, num_tokens)
                g, a, b, fa, fb = _load_stats(stats, at_row, size, live)
                allowed = column[:, None] >= (first - start)[None, :]
                allowed &= column[:, None] <= (last - start)[None, :]
                far, valid = position.to(tl.int64), position >= 0
                q = _load_block(student, far, query_t, query_d, valid, D, BLOCK_D).to(DOT)
                s = tl.dot(k, tl.trans(q), input_precision="ieee") * scaling
                if PAIR:
                    far = row.to(tl.int64)
                    tq = _load_block(teacher, far, tquery_t, tquery_d, live, D, BLOCK_D).to(DOT)
                    theirs = tl.dot(tk, tl.trans(tq), input_precision="ieee") * their_scaling
                else:
                    past = (before + slot - strip_start) * chunk_rows
                    entry = dense + (past + at * BLOCK_Q - row_start) * num_tokens + start
                    entries = entry + (lane[None, :] * num_tokens + column[:, None])
                    theirs = tl.load(entries, mask=inside[:, None] & live[None, :], other=0.0)
                ds = _score_gradient(s, theirs, allowed, g, a, b, fa, fb, 0, PAIR)
                total = tl.dot(ds.to(DOT), q, total, input_precision="ieee", out_dtype=ACC)
        tl.store(place_KD, total, mask=mine)

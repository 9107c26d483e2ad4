"""Which rows are replayed, which query rows are kept, in which order rows are seen.

Every answer is a pure function of (seed, content): nothing depends on the order in which rows
arrive, on how many workers ask, or on a generator's state, so a restart on other hardware draws the
same rows. The draws are ranks of SHA-2 / SHAKE hashes, which no library upgrade can change.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, Context, Decimal
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from seekr.errors import ConfigError, DataError


def priority(seed: int, row_id: str) -> int:
    """Return the 64-bit rank of a row in the replay draw; the smallest ranks are drawn."""
    return _hash64("replay", seed, row_id)


def replay_size(num_rows: int, ratio: float | None = None, rows: int | None = None) -> int:
    """Return how many of a task's rows are replayed.

    Args:
        num_rows: Rows of the task, at least 1.
        ratio: Share in (0, 1]. ratio * num_rows is rounded to the nearest integer, halves up, in
            exact decimal arithmetic: 0.01 of 150 rows is 2, of 149 is 1, of 49 is an error and not
                nothing.
        rows: Or the number itself. Exactly one of the two is given.

    Raises:
        ConfigError: neither or both are given, a value is out of range, or the set would be empty.
        DataError: the task has no rows.
    """
    if num_rows < 1:
        raise DataError(
            "the task has 0 rows; at least 1 is needed to draw a replay set: check its data"
        )
    if (ratio is None) == (rows is None):
        raise ConfigError(
            f"replay has ratio={ratio} and rows={rows}; exactly one is needed: remove one or set "
            "one"
        )
    if rows is not None:
        if not 1 <= rows <= num_rows:
            raise ConfigError(
                f"replay rows is {rows} and the task has {num_rows}; 1..{num_rows} is allowed: "
                "change rows, or use ratio for tasks of different size"
            )
        return rows
    assert ratio is not None
    if not 0.0 < ratio <= 1.0:
        raise ConfigError(f"replay ratio is {ratio}; above 0 and up to 1 is allowed: 0.01 is 1 %")
    size = math.floor(Fraction(repr(ratio)) * num_rows + Fraction(1, 2))
    if size == 0:
        smallest = Context(prec=3, rounding=ROUND_CEILING).divide(Decimal("0.5"), Decimal(num_rows))
        raise ConfigError(
            f"replay ratio {ratio} of {num_rows} rows rounds to 0 rows; the smallest ratio that "
            f"keeps one is {smallest}: raise ratio to it, or set rows instead"
        )
    return size


def draw(row_ids: Sequence[str], size: int, seed: int) -> list[str]:
    """Return the `size` row ids with the smallest priority, sorted by row id.

    A row id that occurs more than once (the same content twice) counts once.

    Raises:
        DataError: there are fewer than `size` different rows.
    """
    distinct = set(row_ids)
    if not 1 <= size <= len(distinct):
        raise DataError(
            f"cannot draw {size} replay rows from {len(distinct)} different ones ({len(row_ids)} "
            f"with repetitions); 1..{len(distinct)} is allowed: lower the replay size"
        )
    ranked = sorted(distinct, key=lambda row_id: (priority(seed, row_id), row_id))
    return sorted(ranked[:size])


def most_surprising(surprise: Mapping[str, float], size: int) -> list[str]:
    """Return the `size` row ids with the largest surprise, sorted by row id; ties by row id.

    Raises:
        DataError: there are fewer than `size` rows, or one's surprise is no number.
    """
    if not 1 <= size <= len(surprise):
        raise DataError(
            f"cannot keep {size} replay rows of {len(surprise)} different ones; 1..{len(surprise)} is "
            "allowed: lower the replay size"
        )
    broken = sorted(row_id for row_id, value in surprise.items() if not math.isfinite(value))
    if broken:
        raise DataError(
            f"{len(broken)} rows have a surprise that is no number, the first is {broken[0]}; the "
            "model gives their answers no likelihood: look at the model, or use sampling random"
        )
    ranked = sorted(surprise, key=lambda row_id: (-surprise[row_id], row_id))
    return sorted(ranked[:size])


def query_positions(
    seed: int, row_id: str, length: int, budget: int | None = None
) -> NDArray[np.int64]:
    """Return the query rows T of equation (12) for one row, as sorted unpadded positions.

    Args:
        length: Tokens of the row without padding.
        budget: B_T, the number of positions drawn without replacement. None, or a budget of at
            least `length`, takes all.

    Raises:
        ConfigError: the budget is below 1.
    """
    if budget is not None and budget < 1:
        raise ConfigError(
            f"query budget is {budget}; 1 or more is allowed, null for all query rows: change it"
        )
    if budget is None or budget >= length:
        return np.arange(length, dtype=np.int64)
    stream = hashlib.shake_256(_key("query", seed, row_id)).digest(8 * length)
    ranks = np.frombuffer(stream, dtype="<u8")
    return np.sort(np.argsort(ranks, kind="stable")[:budget]).astype(np.int64)


def epoch_order(seed: int, epoch: int, row_ids: Sequence[str]) -> NDArray[np.int64]:
    """Return a permutation: element i is the index into `row_ids` of the i-th row of the epoch.

    The order of row contents is the same however `row_ids` are ordered.
    """
    keys = [(_hash64("epoch", seed, f"{epoch}\0{row_id}"), row_id) for row_id in row_ids]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


def _key(purpose: str, seed: int, text: str) -> bytes:
    return f"seekr\0{purpose}\0{seed}\0{text}".encode()


def _hash64(purpose: str, seed: int, text: str) -> int:
    return int.from_bytes(hashlib.sha256(_key(purpose, seed, text)).digest()[:8], "big")

"""Ragged rows to arrays of few shapes, on one device or many processes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from luthier.parallel import BATCH_AXES
from luthier.tuners import Bound

Result = TypeVar("Result")

# Most logits of one model in memory at once.
LOGITS = 1 << 24


def bucket(length: int) -> int:
    """The next length that gets a program of its own: 16, then multiples of 32, wasting at most a quarter."""
    if length <= 16:
        return 16
    step = max(32, 1 << max(0, length.bit_length() - 3))
    return -(-length // step) * step


def in_batches(
    bound: Bound,
    lengths: Sequence[int],
    batch_size: int,
    run: Callable[[list[int], int], Sequence[Result]],
    progress: Callable[[int, int], None] | None = None,
) -> list[Result]:
    """What `run` finds for each row, in order; the longest rows run first.

    So a batch wastes little padding, and memory runs out at once or never.

    Args:
      lengths: of each row.
      run: (indices of the rows of one batch, rows to fill it up to) -> the result of each row.
      progress: called with (rows done, rows in all) after each batch.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size = _rows_per_batch(bound, batch_size, len(order))
    results: dict[int, Result] = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        results |= zip(chosen, run(chosen, size))
        if progress:
            progress(len(results), len(order))
    return [results[i] for i in range(len(order))]


def _rows_per_batch(bound: Bound, batch_size: int, total: int) -> int:
    """Rows of every batch: a power of two where there are few, a multiple of the batch shards."""
    mesh = bound.model.sharder.mesh
    shards = 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
    rows = min(batch_size, 1 << (max(total, 1) - 1).bit_length())
    return -(-rows // shards) * shards


def padded(
    rows: Sequence[Sequence[int]], length: int, left: bool, prompt_slots: Sequence[int] = ()
) -> dict[str, np.ndarray]:
    """`tokens`, `positions` and `segment_ids` `[B, length]`; padding has segment 0.

    Args:
      prompt_slots: vectors of a soft prompt, whose placeholders each row begins with.
    """
    batch = {name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "positions", "segment_ids")}
    for i, row in enumerate(rows):
        span = slice(length - len(row), length) if left else slice(0, len(row))
        batch["tokens"][i, span] = row
        batch["positions"][i, span] = np.arange(len(row))
        batch["segment_ids"][i, span] = 1
    if prompt_slots:
        is_slot = (batch["segment_ids"] > 0) & (batch["positions"] < len(prompt_slots))
        batch["prompt_slots"] = np.where(
            is_slot, np.asarray(prompt_slots, np.int32)[batch["positions"] % len(prompt_slots)], -1
        )
    return batch


def in_chunks(chunk_fn: Callable, places, vocab_size: int):
    """`chunk_fn` of `places`, arrays `[B, C]`, a part of C at a time: one that makes at most `LOGITS` logits.

    Returns:
      What `chunk_fn` returns, arrays `[B, C]`.
    """
    rows, length = jax.tree.leaves(places)[0].shape
    steps = 1
    while length % steps or (steps < length and rows * (length // steps) * vocab_size > LOGITS):
        steps += 1
    parts = jax.tree.map(lambda x: x.reshape(rows, steps, -1).swapaxes(0, 1), places)
    found = jax.lax.map(chunk_fn, parts)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(rows, length), found)


def to_device(bound: Bound, arrays):
    """Splits arrays by their first axis over the mesh; every process gives the same arrays."""
    mesh = bound.model.sharder.mesh
    if mesh is None or mesh.size == 1:
        return arrays
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    place = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])  # noqa: E731
    return jax.tree.map(place, arrays)


def to_host(tree):
    """The whole of each array, on every process."""
    if all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def is_one_cpu(bound: Bound) -> bool:
    """Whether the model runs on a single CPU device."""
    mesh = bound.model.sharder.mesh
    return (mesh is None or mesh.size == 1) and bound.model.sharder.device().platform == "cpu"

"""Sums over a mesh axis of which each device keeps a part."""

import jax
import numpy as np


def reduce_scatter(x: jax.Array, axis: str, dimension: int, sizes: tuple[int, ...]) -> jax.Array:
    """The sum of x over a mesh axis, each device keeping its part of `dimension`; within a `shard_map`.

    Args:
      sizes: of the lines of the torus that the axis runs through (`Sharder.torus`). The sum goes along one
        line after the other, since libtpu makes of a scatter over several lines a sum that everybody gets
        whole, of twice the bytes.
    """
    ids = np.arange(np.prod(sizes)).reshape(sizes)
    for line in range(len(sizes)):
        groups = np.moveaxis(ids, line, -1).reshape(-1, sizes[line]).tolist() if len(sizes) > 1 else None
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=dimension, tiled=True, axis_index_groups=groups)
    return x

"""Sums over mesh axes of which each device keeps a part."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from luthier.parallel.sharding import Sharder, spread


def sum_parts(x: jax.Array, axes: tuple[str, ...], spec: P, sharder: Sharder) -> jax.Array:
    """The sum of x over mesh axes, of which each device keeps the part that `spec` gives it; within a `shard_map`.

    Args:
      spec: where each dimension goes; over axes that are not in `axes` x is split already.
    """
    left, in_tiles = list(axes), sharder.device().platform == "tpu"
    for dimension, part in enumerate(spec):
        for axis in spread(part):
            if axis in left:
                x = reduce_scatter(x, axis, dimension, sharder.torus(axis), in_tiles=in_tiles)
                left.remove(axis)
    return jax.lax.psum(x, tuple(left)) if left else x


def reduce_scatter(
    x: jax.Array, axis: str, dimension: int, sizes: tuple[int, ...], *, in_tiles: bool = False
) -> jax.Array:
    """The sum of x over a mesh axis, each device keeping its part of `dimension`; within a `shard_map`.

    libtpu often writes a scatter as a sum that everybody gets whole, of twice the bytes: one over several
    lines of the torus, of parts narrower than a register, or of many columns without small factors. So the
    sum goes along one line after the other, with the dimension that is scattered foremost.

    Args:
      sizes: of the lines of the torus that the axis runs through (`Sharder.torus`).
      in_tiles: a matrix goes as the rows of 128 that it is in a TPU's memory, tile by tile, and one of fewer than 128
        columns row after row, without what pads them to 128.
    """
    x = jnp.moveaxis(x, dimension, 0)
    parts, shape = int(np.prod(sizes)), x.shape
    in_tiles &= x.ndim == 2 and x.dtype.itemsize == 4 and shape[0] % parts == 0
    narrow = in_tiles and shape[1] < 128 and x.size % (8 * 128 * parts) == 0
    in_tiles &= shape[0] % (8 * parts) == 0 and shape[1] % 128 == 0
    if narrow:
        x = x.reshape(-1, 128)
    if in_tiles:
        x = x.reshape(shape[0] // 8, 8, shape[1] // 128, 128).swapaxes(1, 2).reshape(-1, 128)
    ids = np.arange(parts).reshape(sizes)
    for line in range(len(sizes)):
        groups = np.moveaxis(ids, line, -1).reshape(-1, sizes[line]).tolist() if len(sizes) > 1 else None
        x = jax.lax.psum_scatter(x, axis, scatter_dimension=0, tiled=True, axis_index_groups=groups)
    if in_tiles:
        x = x.reshape(-1, shape[1] // 128, 8, 128).swapaxes(1, 2)
    return jnp.moveaxis(x.reshape(shape[0] // parts, *shape[1:]), 0, dimension)

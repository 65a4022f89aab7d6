"""From a checkpoint's tensors to our (sharded) arrays, one tensor at a time.

A stacked `[layers, …]` array is allocated once, in its final place, and each layer is written into
it in place: besides the final arrays there are never more than two copies of one tensor.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from luthier.errors import LuthierError, near
from luthier.models.config import ModelConfig
from luthier.weights.names import Leaf, canonical, leaves

Place = Callable[[str, tuple[int, ...]], Sharding | None]


class Tensors(NamedTuple):
    """A checkpoint seen as named tensors.

    Attributes:
      info: Hugging Face name → (dtype, shape), known without reading data.
      read: name → the tensor.
      where: the file that holds a tensor, for messages.
    """

    info: Mapping[str, tuple[np.dtype, tuple[int, ...]]]
    read: Callable[[str], np.ndarray]
    where: Callable[[str], object]


def load_params(
    config: ModelConfig, tensors: Tensors, *, place: Place | None = None, dtype: Any = None, where: object = None
) -> dict[str, Any]:
    """The `params` tree of a model.

    Args:
      place: (path, shape) → sharding of that array, or None for the default device.
      dtype: of the result; None keeps the stored one.
      where: the checkpoint, for messages.

    Raises:
      LuthierError: for a missing, unexpected or wrongly shaped tensor.
    """
    known = {canonical(name, config): name for name in tensors.info}
    known.pop(None, None)
    wanted = leaves(config)
    _check(config, wanted, known, tensors, where)
    flat = {}
    for leaf in wanted:
        names = [known[name] for name in leaf.names(config.num_layers)]
        stored = _common_dtype([tensors.info[name][0] for name in names])
        shape = leaf.full_shape(config.num_layers)
        sharding = place(leaf.path, shape) if place else None
        flat[leaf.path] = _build(leaf, names, tensors.read, shape, jnp.dtype(dtype or stored), sharding)
    return unflatten_dict(flat, sep="/")


def _check(config: ModelConfig, wanted: tuple[Leaf, ...], known: dict, tensors: Tensors, where: object) -> None:
    shapes = {name: leaf.hf_shape for leaf in wanted for name in leaf.names(config.num_layers)}
    for name, shape in shapes.items():
        if name not in known:
            extra = sorted(known.keys() - shapes.keys())
            mend = near(name, extra) if extra else "The checkpoint is incomplete; download it again"
            raise LuthierError(f"tensor {name!r} is missing", where=where, mend=mend)
        got = tensors.info[known[name]][1]
        if tuple(got) != shape:
            raise LuthierError(
                f"tensor {known[name]!r} has shape {list(got)}, but config.json asks for {list(shape)}",
                where=tensors.where(known[name]),
                mend="Use the config.json that belongs to these weights",
            )
    for name in sorted(known.keys() - shapes.keys()):
        raise LuthierError(
            f"tensor {known[name]!r} has no place in a {config.model_type} model with this config",
            where=tensors.where(known[name]),
            mend="Use the config.json that belongs to these weights",
        )


def _common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    return functools.reduce(jnp.promote_types, dtypes)


def _build(leaf: Leaf, names: list[str], read: Callable, shape: tuple, dtype: Any, sharding: Sharding | None):
    piece_sharding = _piece_sharding(leaf, sharding)
    if not leaf.stacked:
        return _move(leaf.transpose, dtype, sharding)(_put(read(names[0]), piece_sharding))
    stack = _zeros(shape, dtype, sharding)()
    fill = _fill(leaf.transpose, sharding)
    for layer, name in enumerate(names):
        # Waiting, and naming no piece, keeps more than one layer's tensor from being alive.
        stack = fill(stack, _put(read(name), piece_sharding), np.int32(layer)).block_until_ready()
    return stack


def _piece_sharding(leaf: Leaf, sharding: Sharding | None) -> Sharding | None:
    """How one layer's tensor, in their layout, lies on the devices that need it."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    rank = len(leaf.shape) + leaf.stacked
    spec = (*sharding.spec, *(None,) * rank)[leaf.stacked : rank]
    return NamedSharding(sharding.mesh, PartitionSpec(*(spec[::-1] if leaf.transpose else spec)))


def _put(tensor: np.ndarray, sharding: Sharding | None) -> jax.Array:
    if sharding is None:
        return jax.device_put(tensor).block_until_ready()
    return jax.make_array_from_callback(tensor.shape, sharding, lambda part: tensor[part]).block_until_ready()


@functools.cache
def _zeros(shape: tuple[int, ...], dtype: Any, sharding: Sharding | None):
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.cache
def _move(transpose: bool, dtype: Any, sharding: Sharding | None):
    """A copy in memory that XLA owns: an array backed by numpy's could not be donated to a train step."""
    return jax.jit(lambda x: jnp.copy(x.T if transpose else x).astype(dtype), out_shardings=sharding)


@functools.cache
def _fill(transpose: bool, sharding: Sharding | None):
    def fill(stack, piece, layer):
        piece = (piece.T if transpose else piece).astype(stack.dtype)
        return jax.lax.dynamic_update_index_in_dim(stack, piece, layer, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)

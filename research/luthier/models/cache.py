"""The key/value cache of incremental decoding."""

import flax.struct
import jax
import jax.numpy as jnp

from luthier.models.config import ModelConfig


@flax.struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, all layers together.

    A call with T new tokens writes slots `index … index + T` and attends over every slot of its
    own segment whose position is not after its own. All rows share `index`, so ragged prompts are
    padded on the left with segment id 0.

    Attributes:
      keys, values: `[layers, batch, slots, kv_heads, head_dim]`, keys after rotation; where layers
        are apart, an array a layer: `[batch, kv_heads, head_dim, slots]` and
        `[batch, kv_heads, slots, head_dim]`, as attention's products read them.
      positions: `[batch, slots]`.
      segment_ids: `[batch, slots]`; 0 is an empty slot or padding.
      index: int32 scalar, the next slot to write.
    """

    keys: jax.Array | tuple[jax.Array, ...]
    values: jax.Array | tuple[jax.Array, ...]
    positions: jax.Array
    segment_ids: jax.Array
    index: jax.Array


def init_cache(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> KVCache:
    """An empty cache with `length` slots a row."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros((batch, length), jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, jnp.int32(0))


def extended(kept: tuple, layer, slot, new: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array, jax.Array]:
    """Writes the keys and values `[B, T, K, D]` of a layer; also returns all that this layer has, `[B, S, K, D]`.

    Args:
      kept: keys and values of all layers, or of this layer where layers are apart.
    """
    new = tuple(one.astype(old.dtype) for one, old in zip(new, kept))
    write = jax.lax.dynamic_update_slice
    if kept[0].ndim == 4:
        keys = write(kept[0], new[0].transpose(0, 2, 3, 1), (0, 0, 0, slot))
        values = write(kept[1], new[1].swapaxes(1, 2), (0, 0, slot, 0))
        return (keys, values), keys.transpose(0, 3, 1, 2), values.swapaxes(1, 2)
    kept = tuple(write(old, one[None], (layer, 0, slot, 0, 0)) for old, one in zip(kept, new))
    return kept, *(jax.lax.dynamic_index_in_dim(one, layer, keepdims=False) for one in kept)

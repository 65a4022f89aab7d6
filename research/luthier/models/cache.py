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
      keys, values: `[layers, batch, slots, kv_heads, head_dim]`, keys after rotation.
      positions: `[batch, slots]`.
      segment_ids: `[batch, slots]`; 0 is an empty slot or padding.
      index: int32 scalar, the next slot to write.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array
    segment_ids: jax.Array
    index: jax.Array


def init_cache(config: ModelConfig, batch: int, length: int, dtype=jnp.float32) -> KVCache:
    """An empty cache with `length` slots a row."""
    shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros((batch, length), jnp.int32)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, jnp.int32(0))

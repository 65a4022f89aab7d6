"""Rotary positions, who may see whom, and the attention product by backend name."""

import functools
import math
import re

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from luthier.errors import LuthierError
from luthier.models import splash
from luthier.models.config import ModelConfig, Rope
from luthier.models.remat import saved
from luthier.parallel import Sharder

BACKENDS = ("auto", "xla", "cudnn", "splash")


def inverse_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Angular frequencies `[head_dim / 2]` in radians a token, scaled as `rope.kind` says.

    Llama 3.1 scaling: wavelengths above `original_length / low_freq_factor` are stretched by
    `factor`, those below `original_length / high_freq_factor` kept, the rest interpolated.
    """
    frequencies = 1.0 / rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelength = 2 * math.pi / frequencies
        low, high = rope.low_freq_factor, rope.high_freq_factor
        smooth = np.clip((rope.original_length / wavelength - low) / (high - low), 0, 1)
        return smooth * frequencies + (1 - smooth) * frequencies / rope.factor
    return frequencies


def rotation(rope: Rope, head_dim: int, positions: Int[Array, "B T"], dtype) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[B, T, 1, head_dim / 2]` of position × frequency."""
    angles = positions[..., None].astype(dtype) * inverse_frequencies(rope, head_dim).astype(dtype)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def moved_keys(config: ModelConfig, keys: Float[Array, "L p K D"], by: int) -> Float[Array, "L p K D"]:
    """Keys of all layers, as they lie after rotary positions, of tokens `by` positions later."""
    wide = jnp.promote_types(keys.dtype, jnp.float32)
    turn = lambda rope: rotation(rope, config.head_dim, jnp.full(keys.shape[1:2], by)[None], wide)  # noqa: E731
    turns = [turn(config.local_rope if is_local else config.rope) for is_local in config.local_layers]
    return jnp.stack([rotate(one[None], *turn)[0] for one, turn in zip(keys, turns, strict=True)])


def rotate(x: Float[Array, "B T N D"], cos: jax.Array, sin: jax.Array) -> Float[Array, "B T N D"]:
    """Rotates the pairs (x_i, x_{i + D/2}), Hugging Face's half-split layout."""
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@flax.struct.dataclass
class Mask:
    """Who may attend to whom: same segment, not later, within the window; prefixes see all of themselves.

    Attributes:
      full, local: bool `[B, 1, T, S]` for global and sliding-window layers; None where no layer asks for them.
      query_segments, key_segments: int32 `[B, T]`, `[B, S]`, for backends that mask by themselves.
      query_positions: int32 `[B, T]`.
      plain: no prefix and no cache, so that causality and segments say everything.
    """

    full: Bool[Array, "B 1 T S"] | None
    local: Bool[Array, "B 1 T S"] | None
    query_segments: Int[Array, "B T"]
    key_segments: Int[Array, "B S"]
    query_positions: Int[Array, "B T"]
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    plain: bool = flax.struct.field(pytree_node=False, default=False)

    def dense(self, is_local: Bool[Array, ""]) -> Bool[Array, "B 1 T S"]:
        """The mask of this layer."""
        return self.full if self.local is None else jnp.where(is_local, self.local, self.full)

    def behind(self, count: int) -> "Mask":
        """The mask where `count` keys go before all others: part of every segment, at its positions −count … −1.

        Backends that mask by themselves don't serve it.
        """
        if self.full is None:
            fields = {"positions": self.query_positions, "segment_ids": self.query_segments}
            return make_mask(fields, fields, self.window, plain=False).behind(count)
        distance = self.query_positions[:, None, :, None] + count - jnp.arange(count)
        join = lambda seen, mask: jnp.concatenate([seen, mask], axis=-1)  # noqa: E731
        full = join(jnp.ones_like(distance, bool), self.full)
        local = None if self.local is None else join(distance < self.window, self.local)
        return self.replace(full=full, local=local, plain=False)


def make_mask(query: dict, key: dict, window: int | None, *, plain: bool, dense: bool = True) -> Mask:
    """Builds both masks from positions and segment ids of queries and keys.

    Args:
      query, key: `positions` and `segment_ids`, `[B, T]` and `[B, S]`; `key` may hold
        `prefix_mask`, tokens that every token of a prefix of the same segment may see.
      window: number of tokens, its own included, that a local layer sees; None for no local layer.
      dense: False for a backend that masks by itself.
    """
    if not dense:
        return Mask(None, None, query["segment_ids"], key["segment_ids"], query["positions"], window, plain)
    later = key["positions"][:, None, :] > query["positions"][:, :, None]
    if "prefix_mask" in key:
        later &= ~(query["prefix_mask"][:, :, None] & key["prefix_mask"][:, None, :])
    same = query["segment_ids"][:, :, None] == key["segment_ids"][:, None, :]
    full = same & (key["segment_ids"] > 0)[:, None, :] & ~later
    local = None
    if window is not None:
        near = query["positions"][:, :, None] - key["positions"][:, None, :] < window
        local = (full & near)[:, None]
    full = full[:, None]
    return Mask(full, local, query["segment_ids"], key["segment_ids"], query["positions"], window, plain)


def attend(
    backend: str,
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K D"],
    mask: Mask,
    is_local: Bool[Array, ""],
    softcap: float | None,
    sharder: Sharder,
) -> Float[Array, "B T H D"]:
    """softmax(softcap(q kᵀ) + mask) v with grouped key/value heads; q comes scaled.

    The backend is what `choose` makes of it.
    """
    backend = choose(backend, sharder, q.dtype, q.shape[1], q.shape[-1], softcap, plain=mask.plain)
    if backend == "xla":
        return _xla(q, k, v, mask.dense(is_local), softcap)
    if backend == "splash":
        return splash.attend(q, k, v, mask, is_local, softcap, sharder)
    if backend == "cudnn":
        if softcap is not None:
            raise LuthierError("attention='cudnn' has no soft cap", where="model.attention", mend="Use 'xla'")
        # The kernel skips what is above the diagonal, where a plain mask lets nobody look.
        options = {"mask": mask.dense(is_local), "is_causal": mask.plain, "scale": 1.0}
        return jax.nn.dot_product_attention(q, k, v, **options, implementation="cudnn")
    raise LuthierError(f"unknown attention {backend!r}", where="model.attention", mend=f"Known: {', '.join(BACKENDS)}")


def choose(
    backend: str, sharder: Sharder, dtype: np.dtype, length: int, head_dim: int, softcap: float | None, *, plain: bool
) -> str:
    """The backend that serves a call.

    `auto` takes the fused kernel of the device where there is one that serves this call, else XLA's own.
    `splash` serves whole rows: calls with a cache or a prefix take XLA's.
    """
    if backend == "auto":
        backend = automatic(sharder.device(), dtype, head_dim, softcap)
        if backend == "splash" and length % splash.multiple(sharder):
            return "xla"
    return "xla" if backend == "splash" and (not plain or length == 1) else backend


def automatic(device: jax.Device, dtype: np.dtype, head_dim: int, softcap: float | None) -> str:
    """The fused kernel of the device, else `xla`.

    `splash` on TPUs; `cudnn` on NVIDIA GPUs from Ampere on, in half precision, for heads that its kernel serves.
    """
    if device.platform == "tpu":
        return "splash"
    capability = re.fullmatch(r"(\d+)\.\d+", str(getattr(device, "compute_capability", "")))
    if device.platform != "gpu" or not capability or dtype not in (jnp.bfloat16, jnp.float16) or softcap is not None:
        return "xla"
    generation = int(capability[1])
    largest = 256 if generation >= 9 else 128
    return "cudnn" if generation >= 8 and head_dim <= largest and head_dim % 8 == 0 else "xla"


def _xla(q, k, v, mask, softcap):
    """The query heads of one key/value head are rows of one product: [B, K, T·G, D] × [B, K, D, S]."""
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, -1, dim).swapaxes(1, 2).reshape(batch, kv_heads, -1, dim)
    out = _softmax_product(q, k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3), mask, softcap)
    return out.reshape(batch, kv_heads, length, -1, dim).swapaxes(1, 2).reshape(batch, length, heads, dim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _softmax_product(
    q: Float[Array, "B K TG D"],
    k: Float[Array, "B K D S"],
    v: Float[Array, "B K S D"],
    mask: Bool[Array, "B 1 T S"],
    softcap: float | None,
) -> Float[Array, "B K TG D"]:
    """softmax(q k) v, whose derivative needs the softmax's maxima and sums but not its matrix.

    With p the softmax and o the result: dv = pᵀ do and d(q k) = p ⊙ (do vᵀ − Σ_d do ⊙ o), as in
    FlashAttention (arXiv 2205.14135), here without tiles.
    """
    return _softmax_product_forward(q, k, v, mask, softcap)[0]


def _logits(q, k, mask, softcap):
    logits = _batched(q, k, jnp.promote_types(q.dtype, jnp.float32))
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    return jnp.where(_rows(mask, q), logits, jnp.finfo(logits.dtype).min), logits


def _softmax_product_forward(q, k, v, mask, softcap):
    logits, _ = _logits(q, k, mask, softcap)
    top = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_batched(weights.astype(v.dtype), v, logits.dtype) / total).astype(v.dtype)
    out, top, total = saved(out), saved(top), saved(total)
    return out, (q, k, v, mask, out, top, total)


def _softmax_product_backward(softcap, residuals, g):
    q, k, v, mask, out, top, total = residuals
    logits, capped = _logits(q, k, mask, softcap)
    weights = jnp.exp(logits - top) / total
    dv = _batched(g.swapaxes(-1, -2), weights.astype(v.dtype)).swapaxes(-1, -2)
    shift = jnp.sum(g.astype(logits.dtype) * out, axis=-1, keepdims=True)
    dlogits = jnp.where(_rows(mask, q), weights * (_batched(g, v.swapaxes(-1, -2), logits.dtype) - shift), 0)
    if softcap is not None:
        dlogits *= 1 - (capped / softcap) ** 2
    dlogits = dlogits.astype(q.dtype)
    return _batched(dlogits, k.swapaxes(-1, -2)), _batched(q.swapaxes(-1, -2), dlogits), dv, None


_softmax_product.defvjp(_softmax_product_forward, _softmax_product_backward)


def _batched(x, y, dtype=None):
    """x y for each batch row and head."""
    return jax.lax.dot_general(x, y, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=dtype)


def _rows(mask: Bool[Array, "B 1 T S"], q) -> Bool[Array, "B 1 TG S"]:
    """The mask of every query head of one key/value head."""
    return jnp.repeat(mask, q.shape[2] // mask.shape[2], axis=2)

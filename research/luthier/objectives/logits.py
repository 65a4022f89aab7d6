"""What the token losses share: one pass over the logits of a chunk."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Normalised(NamedTuple):
    """Log-partition and target of each token, `[n]`, and the metrics that every token loss reports."""

    log_z: Float[Array, " n"]
    logprob: Float[Array, " n"]
    metrics: dict[str, Array]


def normalise(logits: Float[Array, "n V"], targets: Int[Array, " n"]) -> Normalised:
    """log Σ_v exp z_v, log π(target), and the metrics `mean_token_accuracy` and `entropy` (nats)."""
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    powers = jnp.exp(logits - top[:, None])
    z = jnp.sum(powers, axis=-1)
    log_z = jnp.log(z) + top
    is_target = jnp.arange(logits.shape[-1]) == targets[:, None]
    target = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)  # a select fuses where a gather's gradient scatters
    entropy = log_z - jnp.sum(jnp.where(powers > 0, powers * logits, 0), axis=-1) / z  # 0 log 0 = 0
    return Normalised(log_z, target - log_z, {"mean_token_accuracy": target >= top, "entropy": entropy})


def kl_divergence(p_logits: Float[Array, "n V"], q_logits: Float[Array, "n V"]) -> Float[Array, " n"]:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v) of two softmaxes, in nats."""
    log_p, log_q = jax.nn.log_softmax(p_logits), jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

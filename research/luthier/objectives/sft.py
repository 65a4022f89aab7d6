"""Supervised fine-tuning."""

import jax
import jax.numpy as jnp

from luthier.objectives.objective import TokenLoss


def sft(*, label_smoothing: float = 0.0, z_loss: float = 0.0) -> TokenLoss:
    """−log π(x) of the target x, with optional label smoothing and z-loss.

    loss = (1 − ε) · (−log π(x)) + ε · mean_v(−log π(v)) + z · (log Σ_v exp z_v)²

    Args:
      label_smoothing: ε, spread over the whole vocabulary (Szegedy et al., arXiv 1512.00567).
      z_loss: z, pulls the log-partition towards 0 (T5X; PaLM, arXiv 2204.02311).
    """

    def token_fn(logits, tok, keys):
        del keys
        top = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        powers = jnp.exp(logits - top[:, None])
        z = jnp.sum(powers, axis=-1)
        log_z = jnp.log(z) + top
        is_target = jnp.arange(logits.shape[-1]) == tok["targets"][:, None]
        target = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)  # a select fuses where a gather's gradient scatters
        loss = log_z - target
        if label_smoothing:
            loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
        if z_loss:
            loss += z_loss * log_z**2
        entropy = log_z - jnp.sum(jnp.where(powers > 0, powers * logits, 0), axis=-1) / z  # 0 log 0 = 0
        return {"loss": loss, "mean_token_accuracy": target >= top, "entropy": entropy}

    return TokenLoss(token_fn)

"""Supervised fine-tuning."""

import jax.numpy as jnp

from luthier.objectives.logits import normalise
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
        log_z, logprob, metrics = normalise(logits, tok["targets"])
        loss = -logprob
        if label_smoothing:
            loss = (1 - label_smoothing) * loss + label_smoothing * (log_z - jnp.mean(logits, axis=-1))
        if z_loss:
            loss += z_loss * log_z**2
        return {"loss": loss, **metrics}

    return TokenLoss(token_fn)

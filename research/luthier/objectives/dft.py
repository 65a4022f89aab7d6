"""Dynamic fine-tuning: each target weighted by its own probability."""

import jax
import jax.numpy as jnp

from luthier.objectives.logits import normalise
from luthier.objectives.objective import TokenLoss


def dft() -> TokenLoss:
    """−sg[π(x)] log π(x) of the target x: what the model finds unlikely pulls less.

    Source: the authors' code, yongliang-wu/DFT, and TRL's `loss_type="dft"`.
    """

    def token_fn(logits, tok, keys):
        del keys
        _, logprob, metrics = normalise(logits, tok["targets"])
        weight = jax.lax.stop_gradient(jnp.exp(logprob))
        return {"loss": -weight * logprob, "gold_probability": weight, **metrics}

    return TokenLoss(token_fn)

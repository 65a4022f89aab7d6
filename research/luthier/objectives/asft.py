"""Anchored supervised fine-tuning: a token loss, tied to the model that the stage began with."""

import jax
import jax.numpy as jnp

from luthier.errors import LuthierError, near
from luthier.objectives.logits import kl_divergence, normalise
from luthier.objectives.objective import START, TokenLoss

BASES = ("dft", "sft")


def asft(*, kl_weight: float = 0.1, base: str = "dft") -> TokenLoss:
    """−sg[π(x)] log π(x) + λ KL(π_start ‖ π) of the target x, the divergence over the whole vocabulary.

    λ = 0 is `dft`, or `sft` with that base.

    Args:
      kl_weight: λ.
      base: `dft` weights the log-likelihood by sg[π(x)]; `sft` does not (the code's mode `sft+kl`).

    Metrics: `kl_start`, the divergence in nats, and `gold_probability`, π(x).

    Source: S169, and the authors' code, zhuchichi56/ASFT, `train_v2.py`: λ = 0.1.
    """
    if base not in BASES:
        raise LuthierError(f"unknown base {base!r}", where="asft.base", mend=near(base, BASES))

    def token_fn(logits, tok, keys):
        del keys
        _, logprob, metrics = normalise(logits, tok["targets"])
        gold = jnp.exp(logprob)
        weight = jax.lax.stop_gradient(gold) if base == "dft" else 1.0
        kl = kl_divergence(tok["reference"], logits)
        loss = -weight * logprob + kl_weight * kl
        return {"loss": loss, "kl_start": kl, "gold_probability": gold, **metrics}

    return TokenLoss(token_fn, reference=START)

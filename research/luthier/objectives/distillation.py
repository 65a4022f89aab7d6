"""Distillation: the whole distribution of a teacher as the target of each position."""

import math

import jax
import jax.numpy as jnp

from luthier.errors import LuthierError
from luthier.objectives.logits import kl_divergence, normalise
from luthier.objectives.objective import TokenLoss


def distillation(*, teacher: str, beta: float = 0.5, temperature: float = 1.0, sft_weight: float = 0.0) -> TokenLoss:
    """The generalised Jensen-Shannon divergence of teacher p and model π at each target.

    β KL(p ‖ m) + (1 − β) KL(π ‖ m), m = β p + (1 − β) π; β = 0 is KL(p ‖ π), β = 1 is KL(π ‖ p).

    Args:
      teacher: source of the teacher's weights; its tokenizer must be the model's. Where one of the two has
        more rows in its embedding, the tokens that both have are compared.
      beta: β.
      temperature: of both distributions; the loss is not rescaled by its square.
      sft_weight: of −log π(x) of the target x, added.

    Metrics: `divergence`, and what `sft` reports.

    Source: GKD, arXiv 2306.13649, equation 1; limits as in TRL's `generalized_jsd_loss`. On data as they are;
    on-policy samples come from a rollout.
    """
    if not 0 <= beta <= 1 or temperature <= 0:
        raise LuthierError("beta must be in [0, 1] and temperature positive", where="distillation")

    def token_fn(logits, tok, keys):
        del keys
        theirs = tok["reference"]
        both = min(logits.shape[-1], theirs.shape[-1])
        divergence = jensen_shannon(theirs[:, :both] / temperature, logits[:, :both] / temperature, beta)
        _, logprob, metrics = normalise(logits, tok["targets"])
        return {"loss": divergence - sft_weight * logprob, "divergence": divergence, **metrics}

    return TokenLoss(token_fn, reference=teacher)


def jensen_shannon(teacher, student, beta: float) -> jax.Array:
    """The generalised divergence `[n]` of two rows of logits `[n, V]`, in nats."""
    if beta == 0:
        return kl_divergence(teacher, student)
    if beta == 1:
        return kl_divergence(student, teacher)
    teacher, student = jax.nn.log_softmax(teacher), jax.nn.log_softmax(student)
    mixture = jnp.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * kl_divergence(teacher, mixture) + (1 - beta) * kl_divergence(student, mixture)

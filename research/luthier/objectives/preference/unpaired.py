"""Losses of single answers labelled desirable or not.

r = β(log π(y) − log π_ref(y)). Rewards and log-probabilities among the metrics are means over the desirable (`chosen`)
and over the others (`rejected`). Their margin is the difference of two means over different examples, which sums over
parts of a batch don't give: it is a metric of KTO alone, which sees the whole batch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from luthier.objectives.preference.sequences import (
    Metrics,
    SequenceLoss,
    Unpaired,
    require_beta,
    require_weights,
)


def _reward(inputs: Unpaired, beta: float) -> tuple[Array, Metrics]:
    reward = beta * (inputs.logprob - inputs.reference)
    chosen, rejected = inputs.valid & inputs.desirable, inputs.valid & ~inputs.desirable
    return reward, {
        "rewards/chosen": (reward, chosen),
        "rewards/rejected": (reward, rejected),
        "logps/chosen": (inputs.logprob, chosen),
        "logps/rejected": (inputs.logprob, rejected),
    }


def _margin(metrics: Metrics) -> tuple[Array, Array]:
    """Mean reward of the desirable less that of the others, of a whole batch that has both."""
    mean = lambda x, counted: jnp.sum(jnp.where(counted, x, 0)) / jnp.maximum(jnp.sum(counted), 1)  # noqa: E731
    (reward, chosen), (_, rejected) = metrics["rewards/chosen"], metrics["rewards/rejected"]
    has_both = jnp.any(chosen) & jnp.any(rejected)
    return jnp.full_like(reward, mean(reward, chosen) - mean(reward, rejected)), (chosen | rejected) & has_both


def kto(*, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> SequenceLoss:
    """λ_D σ(−(r − βz)) of a desirable answer, λ_U σ(r − βz) of another; no gradient through z.

    z = max(0, mean over the batch of log π(y′) − log π_ref(y′)) of answers y′ to other prompts: an estimate of
    KL(π ‖ π_ref), so micro-batches are another loss.

    Over several turns (S124, arXiv 2409.02392) the sums are over what the model wrote, with `train_on="assistant"`.

    Source: arXiv 2402.01306, equation 7, and TRL.
    """
    require_beta(beta)
    require_weights(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)

    def fn(inputs):
        reward, metrics = _reward(inputs, beta)
        ratios = jnp.where(inputs.valid, inputs.kl_logprob - inputs.kl_reference, 0)
        mean = jnp.sum(ratios) / jnp.maximum(jnp.sum(inputs.valid), 1)
        kl = jax.lax.stop_gradient(jnp.maximum(mean, 0))
        x = reward - beta * kl
        gained, avoided = desirable_weight * jax.nn.sigmoid(-x), undesirable_weight * jax.nn.sigmoid(x)
        metrics["kl"] = (jnp.full_like(reward, kl), inputs.valid)
        metrics["rewards/margins"] = _margin(metrics)
        return jnp.where(inputs.desirable, gained, avoided), metrics

    return SequenceLoss(fn, Unpaired, ("reference", "kl_logprob", "kl_reference"), coupled=True)


def apo_zero_unpaired(
    *, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0
) -> SequenceLoss:
    """λ_D σ(−r) of a desirable answer, λ_U σ(r) of another: KTO with z = 0.

    Source: S122, arXiv 2408.06266, equation 7; TRL's KTO with `loss_type="apo_zero_unpaired"`.
    """
    require_beta(beta)
    require_weights(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)

    def fn(inputs):
        reward, metrics = _reward(inputs, beta)
        gained, avoided = desirable_weight * jax.nn.sigmoid(-reward), undesirable_weight * jax.nn.sigmoid(reward)
        return jnp.where(inputs.desirable, gained, avoided), metrics

    return SequenceLoss(fn, Unpaired, ("reference",))


def bco_unpaired(*, beta: float = 0.1) -> SequenceLoss:
    """−log σ(r − δ) of a desirable answer, −log σ(−(r − δ)) of another.

    δ is the inputs' `shift`: the running mean, kept by the caller, of ½ (mean r of the desirable + mean r of the
    others).

    Source: arXiv 2404.04656, equation 6.
    """
    require_beta(beta)

    def fn(inputs):
        reward, metrics = _reward(inputs, beta)
        x = reward - jax.lax.stop_gradient(inputs.shift)
        return -jax.nn.log_sigmoid(jnp.where(inputs.desirable, x, -x)), metrics

    return SequenceLoss(fn, Unpaired, ("reference", "shift"))

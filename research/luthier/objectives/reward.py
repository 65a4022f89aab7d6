"""Losses of reward models: scalar rewards of whole answers, from a head on the last token."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from luthier.objectives.preference.sequences import SequenceLoss, require_weights


class RewardPairs(NamedTuple):
    """Rewards of a preferred and a dispreferred answer to each prompt.

    Attributes:
      chosen, rejected: the rewards.
      margin: how much better the preferred answer is.
      chosen_nll: as in `preference.Pairs`.
      valid: which examples count; None for all.
    """

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    margin: Float[Array, " B"] | None = None
    chosen_nll: Float[Array, " B"] | None = None
    valid: Bool[Array, " B"] | None = None


class RewardLabels(NamedTuple):
    """The reward of one answer to each prompt, and whether the answer is good."""

    reward: Float[Array, " B"]
    desirable: Bool[Array, " B"]
    valid: Bool[Array, " B"] | None = None


class RewardRankings(NamedTuple):
    """Rewards of K answers to each prompt, and the scores that rank them (higher is better).

    `present` says which answers exist; None for all.
    """

    reward: Float[Array, "B K"]
    scores: Float[Array, "B K"]
    present: Bool[Array, "B K"] | None = None
    valid: Bool[Array, " B"] | None = None


def _pair_loss(inputs: RewardPairs, margin: Array | float = 0.0):
    gap = inputs.chosen - inputs.rejected
    values = {
        "mean_reward": (inputs.chosen + inputs.rejected) / 2,
        "accuracy": (gap > 0).astype(jnp.float32),
        "margin": gap,
    }
    return -jax.nn.log_sigmoid(gap - margin), {name: (value, inputs.valid) for name, value in values.items()}


def bradley_terry(*, margin: bool = False, centring: float = 0.0) -> SequenceLoss:
    """−log σ(r_w − r_l − m) + κ (r_w + r_l)².

    Args:
      margin: take m from the inputs (Llama 2, arXiv 2307.09288, equation 2); else m = 0.
      centring: κ, pulls the mean reward to 0 (arXiv 2312.09244).

    Metrics: `mean_reward`, `accuracy`, `margin`.

    Source: arXiv 2203.02155; TRL's `RewardTrainer`.
    """

    require_weights(centring=centring)

    def fn(inputs):
        loss, metrics = _pair_loss(inputs, inputs.margin if margin else 0.0)
        return (loss + centring * (inputs.chosen + inputs.rejected) ** 2 if centring else loss), metrics

    return SequenceLoss(fn, RewardPairs, ("margin",) if margin else ())


def preference_pretraining(*, nll_weight: float = 1.0) -> SequenceLoss:
    """−log σ(r_w − r_l) + μ NLL(y_w): a stage on ranked pairs from public forums, before human preferences.

    Source: S119, arXiv 2112.00861, section 4.
    """

    require_weights(nll_weight=nll_weight)

    def fn(inputs):
        loss, metrics = _pair_loss(inputs)
        return loss + nll_weight * inputs.chosen_nll, metrics | {"nll_loss": (inputs.chosen_nll, inputs.valid)}

    return SequenceLoss(fn, RewardPairs, ("chosen_nll",))


def binary_discrimination() -> SequenceLoss:
    """−log σ(r) of a good answer, −log σ(−r) of another: good from bad without a comparison.

    Source: S119, arXiv 2112.00861, section 3.
    """

    def fn(inputs):
        signed = jnp.where(inputs.desirable, inputs.reward, -inputs.reward)
        correct = (signed > 0).astype(jnp.float32)
        metrics = {"mean_reward": (inputs.reward, inputs.valid), "accuracy": (correct, inputs.valid)}
        return -jax.nn.log_sigmoid(signed), metrics

    return SequenceLoss(fn, RewardLabels)


def ranking() -> SequenceLoss:
    """Mean over a prompt's pairs with score_i > score_k of −log σ(r_i − r_k): all pairs of K answers at once.

    A prompt whose answers all have one score has loss 0.

    Source: arXiv 2203.02155, equation 1.
    """

    def fn(inputs):
        present = jnp.ones(inputs.reward.shape, bool) if inputs.present is None else inputs.present
        better = inputs.scores[:, :, None] > inputs.scores[:, None, :]
        better &= present[:, :, None] & present[:, None, :]
        gap = inputs.reward[:, :, None] - inputs.reward[:, None, :]
        pairs = jnp.sum(better, axis=(1, 2))
        mean = lambda x: jnp.sum(jnp.where(better, x, 0), axis=(1, 2)) / jnp.maximum(pairs, 1)  # noqa: E731
        counted = inputs.valid & (pairs > 0)
        mean_reward = jnp.sum(jnp.where(present, inputs.reward, 0), axis=1) / jnp.maximum(jnp.sum(present, axis=1), 1)
        metrics = {
            "mean_reward": (mean_reward, inputs.valid),
            "accuracy": (mean((gap > 0).astype(jnp.float32)), counted),
            "margin": (mean(gap), counted),
        }
        return mean(-jax.nn.log_sigmoid(gap)), metrics

    return SequenceLoss(fn, RewardRankings)

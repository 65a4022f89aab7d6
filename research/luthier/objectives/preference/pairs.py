"""Losses of pairs against a reference: DPO and its relatives.

In each equation c = log π(y_w) − log π_ref(y_w) of the preferred answer and j that of the dispreferred one; n_w and n_l
are their tokens, σ is the logistic function and s the implicit reward of a divergence (`implicit_reward`), s(c) = c for
the reverse KL. A pair's rewards, as metrics, are βc and βj.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from luthier.objectives.preference.divergence import implicit_reward
from luthier.objectives.preference.sequences import (
    Pairs,
    SequenceLoss,
    pair_metrics,
    per_token,
    require,
    require_beta,
    require_smoothing,
    smoothed_logistic,
)

log_sigmoid, sigmoid = jax.nn.log_sigmoid, jax.nn.sigmoid


def log_ratio_loss(
    loss: Callable[[Array, Array, Pairs], Array], beta: float, *, needs: tuple[str, ...] = (), coupled: bool = False
) -> SequenceLoss:
    """A loss of c and j, with the metrics of rewards βc and βj."""
    require_beta(beta)

    def fn(inputs):
        chosen, rejected = inputs.chosen - inputs.ref_chosen, inputs.rejected - inputs.ref_rejected
        metrics = pair_metrics(inputs, beta * chosen, beta * rejected, inputs.chosen, inputs.rejected)
        return loss(chosen, rejected, inputs), metrics

    return SequenceLoss(fn, Pairs, ("ref_chosen", "ref_rejected", *needs), coupled)


def dpo(
    *, beta: float = 0.1, label_smoothing: float = 0.0, divergence: str = "reverse_kl", alpha: float | None = None
) -> SequenceLoss:
    """−(1 − ε) log σ(βΔ) − ε log σ(−βΔ), Δ = s(c) − s(j); log 2 where the policy is the reference.

    Over several turns (S124, arXiv 2409.02392) the sums are over what the model wrote, with `train_on="assistant"`;
    contexts that a preference depends on (S128, arXiv 2407.14916) are part of the prompt.

    Args:
      label_smoothing: ε, the probability that a label is flipped (conservative DPO). It acts, where TRL 1.16's
        `sigmoid` ignores it.

    Source: arXiv 2305.18290, equation 7; f-DPO, arXiv 2309.16240; smoothing: E. Mitchell's note on cDPO.
    """
    require_smoothing(label_smoothing)
    score = implicit_reward(divergence, alpha)
    return log_ratio_loss(lambda c, j, _: smoothed_logistic(beta * (score(c) - score(j)), label_smoothing), beta)


def hinge(*, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float | None = None) -> SequenceLoss:
    """max(0, 1 − β(s(c) − s(j))). Source: SLiC-HF, arXiv 2305.10425, with the normalised likelihood of RSO."""
    score = implicit_reward(divergence, alpha)
    return log_ratio_loss(lambda c, j, _: jax.nn.relu(1 - beta * (score(c) - score(j))), beta)


def ipo(*, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float | None = None) -> SequenceLoss:
    """(s(c)/n_w − s(j)/n_l − 1/(2β))²; β is the paper's τ.

    Source: arXiv 2310.12036, equation 17; means over tokens as in TRL, which its authors asked for.
    """
    score = implicit_reward(divergence, alpha, largest=40.0)

    def loss(c, j, inputs):
        gap = per_token(score(c), inputs.chosen_tokens) - per_token(score(j), inputs.rejected_tokens)
        return (gap - 1 / (2 * beta)) ** 2

    return log_ratio_loss(loss, beta, needs=("chosen_tokens", "rejected_tokens"))


def sigmoid_norm(*, beta: float = 5.0, divergence: str = "reverse_kl", alpha: float | None = None) -> SequenceLoss:
    """−log σ(β(s(c)/n_w − s(j)/n_l)): length-normalised DPO.

    Source: Tülu 3, arXiv 2411.15124, section 5; its β is said to be 5, which was not checked.
    """
    score = implicit_reward(divergence, alpha)

    def loss(c, j, inputs):
        gap = per_token(score(c), inputs.chosen_tokens) - per_token(score(j), inputs.rejected_tokens)
        return -log_sigmoid(beta * gap)

    return log_ratio_loss(loss, beta, needs=("chosen_tokens", "rejected_tokens"))


def exo(
    *, beta: float = 0.1, label_smoothing: float = 1e-3, divergence: str = "reverse_kl", alpha: float | None = None
) -> SequenceLoss:
    """KL of (σ(βΔ), σ(−βΔ)) from (1 − ε, ε), Δ = s(c) − s(j).

    Args:
      label_smoothing: ε, in (0, 1).

    Source: arXiv 2402.00856, equation 16.
    """
    require_smoothing(label_smoothing)
    require(
        label_smoothing > 0, "must be positive: the divergence from (1, 0) is infinite", "objective.label_smoothing"
    )
    score = implicit_reward(divergence, alpha)
    log_target = math.log1p(-label_smoothing), math.log(label_smoothing)

    def loss(c, j, _):
        x = beta * (score(c) - score(j))
        return sigmoid(x) * (log_sigmoid(x) - log_target[0]) + sigmoid(-x) * (log_sigmoid(-x) - log_target[1])

    return log_ratio_loss(loss, beta)


def robust(
    *, beta: float = 0.1, label_smoothing: float = 0.1, divergence: str = "reverse_kl", alpha: float | None = None
) -> SequenceLoss:
    """(−(1 − ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε): unbiased for labels flipped with probability ε < ½.

    Source: robust DPO, arXiv 2403.00409, equation 12.
    """
    require_smoothing(label_smoothing, below=0.5)
    score = implicit_reward(divergence, alpha)

    def loss(c, j, _):
        x = beta * (score(c) - score(j))
        kept, flipped = (1 - label_smoothing) * log_sigmoid(x), label_smoothing * log_sigmoid(-x)
        return (flipped - kept) / (1 - 2 * label_smoothing)

    return log_ratio_loss(loss, beta)


def discopop(
    *, beta: float = 0.1, tau: float = 0.05, divergence: str = "reverse_kl", alpha: float | None = None
) -> SequenceLoss:
    """−log σ(x) σ(−x/τ) + e^(−x) σ(x/τ), x = β(s(c) − s(j)).

    The second term is formed as a power of log σ: −x for x → −∞, where TRL's product is not a number.

    Source: arXiv 2406.08414, equation 5.
    """
    require(tau > 0, f"tau must be positive, got {tau}", "objective.tau")
    score = implicit_reward(divergence, alpha)

    def loss(c, j, _):
        x = beta * (score(c) - score(j))
        exponential = jnp.exp(jnp.minimum(log_sigmoid(x / tau) - x, 80.0))
        return -log_sigmoid(x) * sigmoid(-x / tau) + exponential

    return log_ratio_loss(loss, beta)


def nca(*, beta: float = 0.01) -> SequenceLoss:
    """−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βj): raises the preferred answer itself; gradients at the start are ∓β/4.

    Source: S129, arXiv 2402.05369, with the paper's β; `ranked.nca_rewards` is the same for K scored answers.
    """

    def loss(c, j, _):
        return -log_sigmoid(beta * c) - (log_sigmoid(-beta * c) + log_sigmoid(-beta * j)) / 2

    return log_ratio_loss(loss, beta)


def bco(*, beta: float = 0.1, shifted: bool = False) -> SequenceLoss:
    """−log σ(βc − δ) − log σ(−(βj − δ)): a classifier of each answer by itself.

    Args:
      shifted: take δ from the inputs' `shift`, which the caller keeps: the running mean of the rewards βc and βj of
        all pairs so far. Without it δ = 0, as in TRL's `bco_pair`.

    Source: arXiv 2404.04656, equation 6.
    """

    def loss(c, j, inputs):
        shift = jax.lax.stop_gradient(inputs.shift) if shifted else 0.0
        return -log_sigmoid(beta * c - shift) - log_sigmoid(shift - beta * j)

    return log_ratio_loss(loss, beta, needs=("shift",) if shifted else ())


def sppo(*, beta: float = 0.001) -> SequenceLoss:
    """(c − 1/(2β))² + (j + 1/(2β))²: TRL's `sppo_hard`, the win probability of the preferred answer taken as 1.

    Source: arXiv 2405.00675, equation 4.7; the authors' β is said to be 0.001, which was not checked.
    """
    return log_ratio_loss(lambda c, j, _: (c - 0.5 / beta) ** 2 + (j + 0.5 / beta) ** 2, beta)


def apo_zero(*, beta: float = 0.1) -> SequenceLoss:
    """σ(−βc) + σ(βj): raise the preferred answer, lower the other. Source: S122, arXiv 2408.06266, equation 7."""
    return log_ratio_loss(lambda c, j, _: sigmoid(-beta * c) + sigmoid(beta * j), beta)


def apo_down(*, beta: float = 0.1) -> SequenceLoss:
    """σ(βc) + σ(−β(c − j)): lower both, the dispreferred answer more. For a model that is better than both.

    Source: S122, arXiv 2408.06266, equation 8.
    """
    return log_ratio_loss(lambda c, j, _: sigmoid(beta * c) + sigmoid(beta * (j - c)), beta)


def spin(*, beta: float = 0.1, link: str = "logistic") -> SequenceLoss:
    """ℓ(β(c − j)) with the SFT answer preferred to one that the previous iterate, the reference, wrote.

    Args:
      link: `logistic` for ℓ(x) = −log σ(x), `hinge` for max(0, 1 − x).

    Source: S132, arXiv 2401.01335, equation 4.7, and the authors' code.
    """
    require(link in ("logistic", "hinge"), f"unknown link {link!r}. Known: logistic, hinge", "objective.link")
    return dpo(beta=beta) if link == "logistic" else hinge(beta=beta)


def aot(*, beta: float = 0.1, label_smoothing: float = 0.0) -> SequenceLoss:
    """Smoothed −log σ(βδ_i), δ_i the i-th smallest log π(y_w)/π(y_l) less the i-th smallest of the reference's.

    Whole distributions over the batch are compared, so micro-batches are another loss.

    Source: arXiv 2406.05882, paired.
    """
    require_smoothing(label_smoothing)

    def loss(c, j, inputs):
        ours, theirs = inputs.chosen - inputs.rejected, inputs.ref_chosen - inputs.ref_rejected
        return smoothed_logistic(beta * (ours - _quantile_of(ours, theirs, inputs.valid)), label_smoothing)

    return log_ratio_loss(loss, beta, coupled=True)


def aot_unpaired(*, beta: float = 0.1, label_smoothing: float = 0.0) -> SequenceLoss:
    """Smoothed −log σ(βδ_i), δ_i the i-th smallest c less the i-th smallest j of the batch.

    Source: arXiv 2406.05882, unpaired.
    """
    require_smoothing(label_smoothing)

    def loss(c, j, inputs):
        return smoothed_logistic(beta * (c - _quantile_of(c, j, inputs.valid)), label_smoothing)

    return log_ratio_loss(loss, beta, coupled=True)


def _quantile_of(values: Array, others: Array, valid: Array) -> Array:
    """For each valid value, that of the valid `others` with the same rank."""
    order = jnp.argsort(jnp.where(valid, values, jnp.inf))
    rank = jnp.argsort(order)
    return others[jnp.argsort(jnp.where(valid, others, jnp.inf))][rank]

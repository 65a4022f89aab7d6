"""What is done around a loss: sums of several, weights of pairs, weights of tokens.

In a recipe the losses are specs, as in `spec("wpo", loss=spec("dpo", beta=0.05))`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from luthier.config import resolve
from luthier.objectives.preference.sequences import Pairs, SequenceLoss, require


def combine(*, losses: Sequence[SequenceLoss | Mapping[str, Any]], weights: Sequence[float]) -> SequenceLoss:
    """Σ weight · loss. A metric that several report is the first one's.

    Args:
      weights: none below 0 and not all 0; of a loss with weight 0 only the metrics are left.
    """
    losses = [_resolved(loss) for loss in losses]
    require(len(losses) == len(weights) > 0, f"{len(losses)} losses and {len(weights)} weights", "objective.weights")
    allowed = min(weights) >= 0 and sum(weights) > 0
    require(allowed, f"must be none below 0 and not all 0, got {tuple(weights)}", "objective.weights")
    kinds, tails = {loss.inputs for loss in losses}, {loss.tail for loss in losses}
    require(len(kinds) == 1, "losses of different kinds of data can't be combined", "objective.losses")
    require(len(tails) == 1, "desensitise their sum to length, not one of them", "objective.losses")

    def fn(inputs):
        total, metrics = 0.0, {}
        for loss, weight in zip(losses, weights):
            value, own = loss.fn(inputs)
            total, metrics = total + weight * value, own | metrics
        return total, metrics

    needs = dict.fromkeys(name for loss in losses for name in loss.needs)
    coupled, reads_sums = (any(getattr(loss, name) for loss in losses) for name in ("coupled", "reads_sums"))
    return SequenceLoss(fn, kinds.pop(), tuple(needs), coupled, tails.pop(), reads_sums)


def wpo(*, loss: SequenceLoss | Mapping[str, Any]) -> SequenceLoss:
    """A loss of pairs, each weighted by how likely the policy is to write both answers; no gradient through weights.

    weight = exp(m_w + m_l), m = mean over the answer of log π(y_t) − log Σ_v π(v)².

    Source: WPO, arXiv 2406.11827, equation 2 with the alignment of weights.
    """
    loss = _resolved(loss)
    require(loss.inputs is Pairs, f"wpo weights losses of pairs, not of {loss.inputs.__name__}", "objective.loss")

    def fn(inputs):
        value, metrics = loss.fn(inputs)
        weight = jnp.exp(jax.lax.stop_gradient(inputs.chosen_alignment + inputs.rejected_alignment))
        return weight * value, metrics | {"wpo_weight": (weight, inputs.valid)}

    needs = (*loss.needs, "chosen_alignment", "rejected_alignment")
    return dataclasses.replace(loss, fn=fn, needs=needs)


def length_desensitised(*, loss: SequenceLoss | Mapping[str, Any], alpha: float) -> SequenceLoss:
    """A loss of pairs, of sums in which tokens beyond the shorter answer's length count α (`tail_weights`).

    It says how the sums are to be made, which a recipe's objective does; as a function of sums it is an error.

    Args:
      alpha: α, in [0, 1]; 1 is the loss itself, the end of a sweep.

    Source: LD-DPO, arXiv 2409.06411.
    """
    loss = _resolved(loss)
    require(0 <= alpha <= 1, f"must be in [0, 1], got {alpha}", "objective.alpha")
    require(loss.inputs is Pairs, f"it is for losses of pairs, not of {loss.inputs.__name__}", "objective.loss")
    require(loss.reads_sums, "the loss reads no sums of log-probabilities that it could act on", "objective.loss")
    require(loss.tail == 1, "the loss is desensitised to length already", "objective.loss")
    return dataclasses.replace(loss, tail=alpha)


def tail_weights(position: Int[Array, "*n"], shared: Int[Array, "*n"], *, alpha: float) -> Float[Array, "*n"]:
    """The weight of a token's log-probability in an answer's sum: 1 within the length that both answers have, else α.

    For the policy and the reference alike. α = 1 is the plain sum, 0 drops the longer answer's tail.

    Args:
      position: index of the token in its answer, from 0.
      shared: number of tokens of the shorter answer of its pair.
    """
    return jnp.where(position < shared, 1.0, alpha)


def _resolved(loss: SequenceLoss | Mapping[str, Any]) -> SequenceLoss:
    made = loss if isinstance(loss, SequenceLoss) else resolve(ConfigDict(loss), "objective")()
    require(isinstance(made, SequenceLoss), "it is not a loss of whole answers", "objective.loss")
    return made

"""What is minimised: token losses, and the objective that the train step sums."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from luthier.objectives.fused_head import weighted_sum
from luthier.parallel import Sharder

Batch = Mapping[str, jax.Array]
Sums = dict[str, tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """A loss of one token's logits.

    Attributes:
      token_fn: `(logits[n, V], tok, keys[n]) -> {name: [n]}`. `tok` holds `targets` and the batch
        fields in `extras`, each `[n]`. The output `loss` is differentiated; the others are metrics,
        reported as means over targets. `keys` are random keys, one a token.
      extras: further batch fields that `token_fn` reads.
    """

    token_fn: Callable[[jax.Array, Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]]
    extras: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Objective:
    """What the train step needs of any loss: sums over a micro-batch, and what divides them.

    Attributes:
      count: `batch -> scalar`, the number of terms of the mean; taken over the whole batch, before
        it is cut into micro-batches.
      sums: `(bound, variables, batch, rng) -> (loss sum, {metric: (sum, count)})`. Random numbers
        are keyed by `rng` (of the step) and `batch["token_ids"]`.
    """

    count: Callable[[Batch], jax.Array]
    sums: Callable[[Any, Mapping, Batch, jax.Array], tuple[jax.Array, Sums]]


def count_targets(batch: Batch) -> jax.Array:
    """Number of tokens with a non-zero loss weight."""
    return jnp.sum(batch["loss_weights"] != 0)


def token_objective(loss: TokenLoss, sharder: Sharder, *, dropout: bool = False) -> Objective:
    """Σ weight · loss over all targets, by the fused head.

    Args:
      dropout: whether the model draws dropout masks in training.
    """

    def sums(bound, variables, batch, rng):
        head_rng, dropout_rng = jax.random.split(rng)
        inputs = batch if dropout else {key: x for key, x in batch.items() if key != "token_ids"}
        hidden, _ = bound.hidden(variables, inputs, rngs={"dropout": dropout_rng} if dropout else None)
        tok = {"targets": batch["targets"], **{name: batch[name] for name in loss.extras}}
        total, outputs = weighted_sum(
            bound.unembed, loss.token_fn, sharder, bound.head(variables), hidden, batch["loss_weights"], tok,
            batch["token_ids"], head_rng,
        )  # fmt: skip
        is_target = batch["loss_weights"] != 0
        targets = jnp.sum(is_target)
        metrics = {
            name: (jnp.sum(jnp.where(is_target, x, 0)), targets) for name, x in outputs.items() if name != "loss"
        }
        return total, metrics

    return Objective(count_targets, sums)

"""What a loss of whole sequences reads and returns: log-probabilities of answers in, a loss an example out."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from luthier.errors import LuthierError

REFERENCES = ("ref_chosen", "ref_rejected", "reference")
Metrics = dict[str, tuple[Float[Array, " B"], Bool[Array, " B"]]]


class Pairs(NamedTuple):
    """A preferred and a dispreferred answer to each prompt.

    Log-probabilities (nats) are sums over the answer's trained tokens: in a conversation of several turns, those that
    the model wrote. Fields that are None are needed only by the losses that say so.

    Attributes:
      chosen, rejected: log π(y).
      ref_chosen, ref_rejected: the reference's, which get no gradient.
      chosen_tokens, rejected_tokens: how many tokens the sums are over.
      valid: which examples count; None for all.
      chosen_nll: −log π summed over the tokens of the SFT term, divided by the mean number of such tokens an example
        over the whole batch: its mean over examples is then the mean over tokens.
      chosen_alignment, rejected_alignment: mean over the answer of log π(y_t) − log Σ_v π(v)².
      shift: BCO's δ, a scalar.
    """

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    ref_chosen: Float[Array, " B"] | None = None
    ref_rejected: Float[Array, " B"] | None = None
    chosen_tokens: Int[Array, " B"] | None = None
    rejected_tokens: Int[Array, " B"] | None = None
    valid: Bool[Array, " B"] | None = None
    chosen_nll: Float[Array, " B"] | None = None
    chosen_alignment: Float[Array, " B"] | None = None
    rejected_alignment: Float[Array, " B"] | None = None
    shift: Float[Array, ""] | None = None


class Unpaired(NamedTuple):
    """One answer to each prompt, and whether it is desirable.

    Attributes:
      logprob, reference: log π(y) and the reference's, summed as in `Pairs`.
      desirable: the label.
      valid: which examples count; None for all.
      kl_logprob, kl_reference: the same of an answer that belongs to another prompt.
      shift: BCO's δ, a scalar.
    """

    logprob: Float[Array, " B"]
    reference: Float[Array, " B"]
    desirable: Bool[Array, " B"]
    valid: Bool[Array, " B"] | None = None
    kl_logprob: Float[Array, " B"] | None = None
    kl_reference: Float[Array, " B"] | None = None
    shift: Float[Array, ""] | None = None


class Ranked(NamedTuple):
    """K answers to each prompt, with scores.

    Attributes:
      logprob, reference: log π(y) and the reference's, summed as in `Pairs`.
      scores: higher is better.
      tokens: how many tokens the sums are over.
      present: which answers exist, at least two an example; None for all.
      valid: which examples count; None for all.
    """

    logprob: Float[Array, "B K"]
    reference: Float[Array, "B K"] | None = None
    scores: Float[Array, "B K"] | None = None
    tokens: Int[Array, "B K"] | None = None
    present: Bool[Array, "B K"] | None = None
    valid: Bool[Array, " B"] | None = None


@dataclasses.dataclass(frozen=True)
class SequenceLoss:
    """A loss of the log-probabilities of whole answers. Call it: `loss(inputs) -> (loss [B], metrics)`.

    The objective is the mean of the loss over the valid examples. Metrics are `{name: (values [B], counted [B])}`,
    to be averaged over the examples that count. Everything is computed in float32, whatever the inputs' type.

    Attributes:
      fn: `(inputs) -> (loss, metrics)`, with `inputs.valid` given.
      inputs: the type of what it reads, such as `Pairs`.
      needs: those of the optional fields that it reads.
      coupled: whether an example's loss depends on the others of its batch: then micro-batches are another loss.
      tail: weight of an answer's tokens beyond the length of the shorter one (`tail_weights`), in all sums.
      reads_sums: whether it reads the sums of log-probabilities that `tail` is about.
    """

    fn: Callable[[Any], tuple[Array, Metrics]]
    inputs: type
    needs: tuple[str, ...] = ()
    coupled: bool = False
    tail: float = 1.0
    reads_sums: bool = True

    @property
    def needs_reference(self) -> bool:
        """Whether it reads a reference model's log-probabilities."""
        return any(name in self.needs for name in REFERENCES)

    def __call__(self, inputs: Any) -> tuple[Float[Array, " B"], Metrics]:
        if not isinstance(inputs, self.inputs):
            raise ValueError(f"the loss reads {self.inputs.__name__}, got {type(inputs).__name__}")
        if self.tail != 1:
            raise ValueError("make the sums with `tail_weights` and give them to the loss inside length_desensitised")
        missing = [name for name in self.needs if getattr(inputs, name) is None]
        if missing:
            raise ValueError(f"the loss needs {', '.join(missing)}")
        inputs = jax.tree.map(_float32, inputs)
        fixed = {name: jax.lax.stop_gradient(getattr(inputs, name)) for name in REFERENCES if name in self.needs}
        inputs = inputs._replace(**fixed)
        if inputs.valid is None:
            inputs = inputs._replace(valid=jnp.ones(inputs[0].shape[0], bool))
        loss, metrics = self.fn(inputs)
        return jnp.where(inputs.valid, loss, 0), metrics


def _float32(x: Array) -> Array:
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x


def pair_metrics(inputs: Any, chosen: Array, rejected: Array, chosen_logp: Array, rejected_logp: Array) -> Metrics:
    """The metrics of rewards and log-probabilities, named as in TRL."""
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": chosen_logp,
        "logps/rejected": rejected_logp,
    }
    return {name: (value, inputs.valid) for name, value in values.items()}


def per_token(total: Array, tokens: Array) -> Array:
    """Mean over tokens; 0 for an answer without any."""
    return total / jnp.maximum(tokens, 1)


def smoothed_logistic(x: Array, smoothing: float) -> Array:
    """−(1 − ε) log σ(x) − ε log σ(−x)."""
    loss = -jax.nn.log_sigmoid(x)
    return loss + smoothing * x if smoothing else loss


def expm1(x: Array, largest: float = 80.0) -> Array:
    """eˣ − 1 with exponents cut at `largest`; unlike `jnp.expm1`'s, its gradient eˣ keeps its digits for x → −∞."""
    x = jnp.minimum(x, largest)
    small = x > -1
    return jnp.where(small, jnp.expm1(jnp.where(small, x, 0)), jnp.exp(x) - 1)


def require(condition: bool, what: str, where: str) -> None:
    """An error for the option `where` unless `condition`."""
    if not condition:
        raise LuthierError(what, where=where)


def require_beta(beta: float) -> None:
    require(beta > 0, f"beta must be positive, got {beta}", "objective.beta")


def require_weights(**weights: float) -> None:
    for name, weight in weights.items():
        require(weight >= 0, f"must not be negative, got {weight}", f"objective.{name}")


def require_smoothing(smoothing: float, below: float = 1.0) -> None:
    require(
        0 <= smoothing < below, f"must be at least 0 and below {below}, got {smoothing}", "objective.label_smoothing"
    )

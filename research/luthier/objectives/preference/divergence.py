"""The implicit reward of a log-ratio under several divergences from the reference (f-DPO, arXiv 2309.16240)."""

import math
from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from luthier.objectives.preference.sequences import expm1, require

Score = Callable[[Float[Array, " B"]], Float[Array, " B"]]
KNOWN = ("reverse_kl", "forward_kl", "js", "alpha")


def implicit_reward(divergence: str, alpha: float | None, largest: float = 80.0) -> Score:
    """f′(t) up to a constant, as a function of log t = log π(y) − log π_ref(y).

    reverse_kl: log t. forward_kl: 1 − 1/t. js: log 2 + log σ(log t). alpha: (t^(α−1) − 1) / (α − 1), with α → 1 the
    reverse KL.

    Args:
      alpha: α; given with `alpha`, and only then.
      largest: where exponents are cut, as in TRL's α-divergence; beyond it the gradient is 0. float32 ends at 88.7:
        what is left holds β, 1/τ and the sum over a batch (and half of it, for a squared loss, the squares). TRL's
        forward KL is not cut: between the two its loss grows and has a gradient.
    """
    require(
        divergence in KNOWN, f"unknown divergence {divergence!r}. Known: {', '.join(KNOWN)}", "objective.divergence"
    )
    require((alpha is not None) == (divergence == "alpha"), "alpha belongs to divergence 'alpha'", "objective.alpha")
    power = {"forward_kl": -1.0, "alpha": (alpha or 0.0) - 1}.get(divergence, 0.0)
    if divergence == "js":
        return lambda log_ratio: math.log(2) + jax.nn.log_sigmoid(log_ratio)
    if power == 0:
        return lambda log_ratio: log_ratio
    return lambda log_ratio: expm1(power * log_ratio, largest) / power

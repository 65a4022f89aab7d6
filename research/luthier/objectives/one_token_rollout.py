"""One-token rollout: every position of ordinary SFT data as a one-step reinforcement-learning problem.

At each position the current policy proposes next tokens; the target earns 1, any other token β.
The same forward pass gives proposals and log-probabilities, so a step costs about one of SFT.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from luthier.errors import LuthierError
from luthier.objectives.logits import normalise
from luthier.objectives.objective import TokenLoss

MODES = ("mc", "exact")
QUANTILES = (0.01, 0.1, 0.5, 0.9)  # probabilities of the target below which a share of positions is reported


def one_token_rollout(
    *, k: int = 256, temperature: float = 1.3, beta: float = -0.1, mode: str = "mc", norm: str = "sequence"
) -> TokenLoss:
    """−(1/K) Σ_j sg[R(a_j)] log π(a_j) with a_j ~ π' = softmax(z / κ), R = 1 for the target x and β otherwise.

    `exact` takes the expectation over proposals instead of K of them:
    −[π'(x) log π(x) + β Σ_{a ≠ x} π'(a) log π(a)], π' without gradient. At κ = 1 its gradient is 1 − β times
    that of `dft`, because E_π[∇ log π] = 0.

    Args:
      k: K, proposals a position (mode `mc`).
      temperature: κ of the proposals; log π is at temperature 1.
      beta: β, the reward of a token that is not the target; below 0 pushes proposals away.
      norm: `sequence` divides by the targets of each example and averages examples, as the paper does;
        `tokens` averages all targets.

    Metrics: `hit_rate`, the share of proposals that are the target (`exact`: its probability π'(x));
    `gold_probability`, π(x), and `gold_probability/below_Q`, the share of positions where it is less than Q.

    Source: S159, arXiv 2509.26313. No code of the authors is public: K, κ and β are secondary, and that log π
    is at temperature 1 is a reading. Proposals are keyed by (seed, step, global token id).
    """
    if mode not in MODES:
        raise LuthierError(f"unknown mode {mode!r}", where="one_token_rollout.mode", mend=f"Known: {', '.join(MODES)}")
    if k < 1 or temperature <= 0:
        raise LuthierError("k and temperature must be positive", where="one_token_rollout")

    def token_fn(logits, tok, keys):
        targets = tok["targets"]
        log_z, logprob, metrics = normalise(logits, targets)
        tempered = jax.lax.stop_gradient(logits / temperature)
        if mode == "mc":
            proposals = sample(keys, tempered, k)
            is_hit = proposals == targets[:, None]
            logprobs = jnp.take_along_axis(logits, proposals, axis=-1) - log_z[:, None]
            loss = -jnp.mean(jnp.where(is_hit, 1.0, beta) * logprobs, axis=-1)
            hit_rate = jnp.mean(is_hit, axis=-1)
        else:
            proposed = jax.nn.softmax(tempered)
            hit_rate = jnp.take_along_axis(proposed, targets[:, None], axis=-1)[:, 0]
            mean_logit = jnp.sum(jnp.where(proposed > 0, proposed * logits, 0), axis=-1)
            loss = -((1 - beta) * hit_rate * logprob + beta * (mean_logit - log_z))
        gold = jnp.exp(logprob)
        below = {f"gold_probability/below_{q}": gold < q for q in QUANTILES}
        return {"loss": loss, "hit_rate": hit_rate, "gold_probability": gold, **below, **metrics}

    return TokenLoss(token_fn, norm=norm)


def sample(keys: Array, logits: Float[Array, "n V"], k: int) -> Int[Array, "n k"]:
    """K independent draws a row from softmax(logits), by inverting the distribution function.

    Two levels, blocks of about √V tokens and the tokens of a block, keep its sums exact to float32 where one
    running sum over a large vocabulary would lose the rare tokens; no array has more than V or K entries a row.
    """
    vocabulary = logits.shape[-1]
    size = math.ceil(math.sqrt(vocabulary))
    blocks = math.ceil(vocabulary / size)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, blocks * size - vocabulary))).reshape(-1, blocks, size)
    within = jnp.cumsum(weights, axis=-1)
    ends = jnp.cumsum(within[..., -1], axis=-1)
    u = jax.vmap(lambda key: jax.random.uniform(key, (k,), logits.dtype))(keys) * ends[:, -1:]
    block = _first_above(ends, jnp.minimum(u, _just_below(ends[:, -1:])), jnp.zeros(u.shape, jnp.int32), blocks)
    begins = jnp.take_along_axis(ends - within[..., -1], block, axis=-1)
    total = jnp.take_along_axis(within[..., -1], block, axis=-1)
    flat = within.reshape(within.shape[0], -1)
    drawn = _first_above(flat, jnp.clip(u - begins, 0, _just_below(total)), block * size, size)
    # A compiler may form a sum twice and round it apart, so a total can lie above its block's last sum, in the padding.
    return jnp.minimum(drawn, vocabulary - 1)


def _just_below(x):
    return jnp.nextafter(x, jnp.zeros_like(x))


def _first_above(sums: Float[Array, "n m"], u: Float[Array, "n k"], start: Int[Array, "n k"], length: int):
    """The first index of `sums[start : start + length]`, ascending, whose sum exceeds u, by bisection."""
    low, high = start, start + length - 1
    for _ in range(math.ceil(math.log2(length)) if length > 1 else 0):
        middle = (low + high) // 2
        above = jnp.take_along_axis(sums, middle, axis=-1) > u
        low, high = jnp.where(above, low, middle + 1), jnp.where(above, middle, high)
    return low

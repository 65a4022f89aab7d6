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
BLOCK = 64  # tokens, at most, among which a draw is looked for one by one
THRESHOLDS = (0.01, 0.1, 0.5, 0.9)  # probabilities of the target below which a share of positions is reported


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
        below = {f"gold_probability/below_{q}": gold < q for q in THRESHOLDS}
        return {"loss": loss, "hit_rate": hit_rate, "gold_probability": gold, **below, **metrics}

    return TokenLoss(token_fn, norm=norm)


def sample(keys: Array, logits: Float[Array, "n V"], k: int) -> Int[Array, "n k"]:
    """K independent draws a row from softmax(logits), by inverting the distribution function.

    Three levels: groups of blocks, the blocks of a group, about as many, and the tokens of a block. That keeps sums
    exact to float32 where one running sum over a large vocabulary would lose the rare tokens, reads whole rows, which
    accelerators gather well, and no array has more than V or K √V entries a row.
    """
    vocabulary = logits.shape[-1]
    tokens = max(1, min(BLOCK, vocabulary // k))  # of a block
    size = math.ceil(math.sqrt(math.ceil(vocabulary / tokens)))  # of a group, and groups
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.pad(weights, ((0, 0), (0, size * size * tokens - vocabulary))).reshape(-1, size * size, tokens)
    blocks = jnp.cumsum(weights.sum(axis=-1).reshape(-1, size, size), axis=-1)
    groups = jnp.cumsum(blocks[..., -1], axis=-1)[:, None]
    u = jax.vmap(lambda key: jax.random.uniform(key, (k,), logits.dtype))(keys) * groups[..., -1]
    group, u = _place(groups, u)
    block, u = _place(jnp.take_along_axis(blocks, group[..., None], axis=1), u)
    block += group * size
    token, _ = _place(jnp.cumsum(jnp.take_along_axis(weights, block[..., None], axis=1), axis=-1), u)
    return block * tokens + token


def _place(sums: Float[Array, "n k m"], u: Float[Array, "n k"]) -> tuple[Int[Array, "n k"], Float[Array, "n k"]]:
    """The first of `sums`, ascending, that exceeds u, and what u exceeds the one before by.

    What rounding put beyond the last sum lies just below it: a weight of 0 is never found.
    """
    last = sums[..., -1]
    u = jnp.minimum(u, jnp.nextafter(last, jnp.zeros_like(last)))
    is_before = sums <= u[..., None]
    return jnp.sum(is_before, axis=-1, dtype=jnp.int32), u - jnp.max(jnp.where(is_before, sums, 0), axis=-1)

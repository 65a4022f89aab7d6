"""Masked thought: a part of the answer's tokens is hidden from the model that must go on with it."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from luthier.errors import LuthierError

Batch = Mapping[str, jax.Array]


def masked_thought(
    steps: int, vocabulary: int, *, rate: float = 0.4, warmup: float = 0.66, mask_token: int | None = None
) -> Callable[[Batch, jax.Array, jax.Array], Batch]:
    """Each target token is replaced, where the model reads it, with probability p; targets stay as they are.

    p rises from 0 to `rate` over the first `warmup` of the steps. Rate 0 is plain training. The draw is keyed
    by (seed, step, global token id), so that it depends on no mesh or micro-batch.

    Args:
      steps: of the stage.
      vocabulary: tokens that a random replacement is drawn from.
      rate: largest share of replaced tokens (GSM8K 0.4, MATH 0.2).
      warmup: share of the steps over which p rises.
      mask_token: id of the token put there; None draws one at random.

    Returns:
      `(batch, rng, step) -> batch`.

    Source: S174, and the authors' code, ChangyuChen347/MaskedThought: the script for GSM8K replaces by random
    tokens (`replace_rate 1`), the text speaks of a mask.
    """
    if not 0 <= rate <= 1 or not 0 <= warmup <= 1:
        raise LuthierError("rate and warmup must be in [0, 1]", where="masked_thought")
    if mask_token is not None and not 0 <= mask_token < vocabulary:
        raise LuthierError(f"{mask_token} is no token of {vocabulary}", where="masked_thought.mask_token")

    def transform(batch: Batch, rng: jax.Array, step: jax.Array) -> Batch:
        share = rate * jnp.minimum(1.0, step / (warmup * steps)) if warmup else rate
        keys = jax.vmap(jax.vmap(lambda token: jax.random.split(jax.random.fold_in(rng, token))))(batch["token_ids"])
        hidden = jax.vmap(jax.vmap(jax.random.uniform))(keys[..., 0]) < share
        if mask_token is None:
            other = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), 0, vocabulary)))(keys[..., 1])
        else:
            other = mask_token
        # The weight stands where a token is predicted: one before where it is read.
        is_target = jnp.pad(batch["loss_weights"] != 0, ((0, 0), (1, 0)))[:, :-1]
        return {**batch, "tokens": jnp.where(hidden & is_target, other, batch["tokens"])}

    return transform

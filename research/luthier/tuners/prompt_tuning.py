"""Prompt tuning: learned vectors in front of the embedded input."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from luthier.errors import LuthierError, near
from luthier.models.transformer import Hook
from luthier.tuners.tuner import Tuner

INITS = ("uniform", "uniform_positive", "vocabulary")
COMMON = 5000  # tokens that `vocabulary` draws from: the first, which most vocabularies sort by frequency


def prompt_tuning(
    *,
    length: int = 20,
    prompts: int = 1,
    init: str = "vocabulary",
    scale: float = 0.5,
    tokens: tuple = (),
    seed: int = 0,
    collection: str = "prompt",
) -> Tuner:
    """The embeddings of the first `length` positions of an example are rows of P `[prompts · length, embed]`.

    The positions are placeholders that the data pipeline makes (`prompt_slots`: rows of P, -1 elsewhere), so
    packed examples each have a prompt, and several tasks each their own (`data(prompt=...)`).

    Args:
      length: vectors of one prompt.
      prompts: how many prompts there are.
      init: `uniform` in ±`scale`, `uniform_positive` in [0, `scale`) as the published code draws, `vocabulary`
        copies the embeddings of random tokens.
      tokens: ids whose embeddings each prompt begins with, before the rest of `init`: those of class labels or of
        a text.
      seed: of the draw of `vocabulary`.

    Source: S148, arXiv 2104.08691, and google-research/prompt-tuning (length 100, uniform with scale 0.5).
    """
    if init not in INITS:
        raise LuthierError(f"unknown init {init!r}", where="tuner prompt_tuning: init", mend=near(init, INITS))
    if length < 1 or prompts < 1 or len(tokens) > length:
        raise LuthierError(
            f"length={length}, prompts={prompts} and {len(tokens)} tokens to begin with do not go together",
            where="tuner prompt_tuning",
            mend="length must be at least 1 and hold the tokens",
        )

    def start_value(rng, shape):
        low = -scale if init == "uniform" else 0.0
        return jax.random.uniform(rng, shape, minval=low, maxval=scale)

    def transform(site: Hook, call, args, kwargs):
        x, batch = args
        rng = site.make_rng("params") if site.is_initializing() else None
        begin = nn.with_partitioning(start_value, (None, None))
        vectors = site.variable(collection, "vectors", begin, rng, (prompts * length, x.shape[-1])).value
        if "prompt_slots" in batch:
            slots = batch["prompt_slots"]
            prompt = jnp.take(vectors, jnp.maximum(slots, 0), axis=0).astype(x.dtype)
            x = jnp.where((slots >= 0)[..., None], prompt, x)
        return call(x, batch, **kwargs)

    def start(variables):
        embedding = variables["params"]["embed"]["embedding"]
        vectors = variables[collection]["inputs"]["vectors"]
        rows = vectors.reshape(prompts, length, -1)
        if init == "vocabulary":
            drawn = jax.random.randint(jax.random.key(seed), (prompts, length), 0, min(COMMON, len(embedding)))
            rows = embedding[drawn]
        if tokens:
            rows = rows.at[:, : len(tokens)].set(embedding[jnp.asarray(tokens)])
        return {collection: {"inputs": {"vectors": rows.reshape(vectors.shape).astype(vectors.dtype)}}}

    return Tuner(
        "prompt_tuning",
        collection,
        ("inputs",),
        Hook,
        transform,
        start=start if tokens or init == "vocabulary" else None,
        prompt_length=length,
        prompts=prompts,
    )

"""A reward in place of logits: one number a token, read at the end of an answer."""

import flax.linen as nn
import jax.numpy as jnp

from luthier.models.transformer import Head
from luthier.tuners.tuner import Tuner


def reward_head(*, std: float = 0.02, collection: str = "reward") -> Tuner:
    """r = h · w in place of the logits, with w `[E, 1]` and no bias; h is the hidden state after the final norm.

    w starts as normal(0, std), or as the model's own where that is a reward model. Merged, it takes the place of the
    model's head, and an export is a Hugging Face directory of a sequence classifier with one label.

    Args:
      std: standard deviation of w at the start.

    Source: transformers' `LlamaForSequenceClassification`; std is its `initializer_range`.
    """

    def transform(site: Head, call, args, kwargs):
        x = args[0]
        rng = None
        if site.is_initializing():
            call(*args, **kwargs)  # the model keeps its own head
            rng = site.make_rng("params")
        start = nn.with_partitioning(nn.initializers.normal(std), ("embed", None))
        kernel = site.variable(collection, "kernel", start, rng, (x.shape[-1], 1)).value
        wide = jnp.promote_types(site.dtype, jnp.float32)
        return jnp.einsum("...e,ef->...f", x, kernel.astype(site.dtype), preferred_element_type=wide)

    def start(variables):
        own = variables["params"].get("head", {}).get("kernel")
        if own is None or own.shape[-1] != 1:
            return {collection: variables[collection]}
        return {collection: {"head": {"kernel": own.astype(jnp.promote_types(own.dtype, jnp.float32))}}}

    def merge(variables, frozen):
        del frozen
        params, kernel = variables["params"], variables[collection]["head"]["kernel"]
        return {**params, "head": {"kernel": kernel.astype(params["embed"]["embedding"].dtype)}}

    return Tuner("reward_head", collection, ("head",), Head, transform, merge, start=start, reward=True)

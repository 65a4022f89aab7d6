"""Which activations of a layer the backward pass keeps, and which it computes again."""

import functools

import jax
from jax.ad_checkpoint import checkpoint_name

saved = functools.partial(checkpoint_name, name="saved")
saved.__doc__ = "Marks the result of a product that the policy `dots` keeps; the identity."

POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names("saved"),
    "full": jax.checkpoint_policies.nothing_saveable,
}

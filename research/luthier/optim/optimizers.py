"""optax optimisers by name, with weight decay only where it belongs (not on norms and biases)."""

import jax
import jax.numpy as jnp
import optax


def adamw(
    learning_rate: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    first_moment_dtype: str | None = None,
) -> optax.GradientTransformation:
    """Adam with decoupled weight decay (arXiv 1711.05101).

    Args:
      first_moment_dtype: dtype of the first moment, such as `bfloat16`; None keeps the weights'.
    """
    dtype = None if first_moment_dtype is None else jnp.dtype(first_moment_dtype)
    return optax.chain(
        _scale_by_adam(b1, b2, eps, dtype),
        optax.add_decayed_weights(weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_adam(b1: float, b2: float, eps: float, first_moment_dtype) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, whose update is computed from the new moments as they lie in memory.

    Otherwise XLA computes the new moments twice, once to keep them and once within the update, and
    the second reading of the old ones costs a copy of both on a CPU.
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=first_moment_dtype)
    if first_moment_dtype is not None:  # the update takes the first moment before it is rounded
        return adam

    def update(grads, state, params=None):
        _, state = adam.update(grads, state, params)
        mu, nu = jax.lax.optimization_barrier((state.mu, state.nu))
        mean = optax.tree.bias_correction(mu, b1, state.count)
        square = optax.tree.bias_correction(nu, b2, state.count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return updates, state._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(adam.init, update)


def adafactor(
    learning_rate: optax.Schedule,
    *,
    decay_rate: float = 0.8,
    weight_decay: float = 0.0,
    multiply_by_parameter_scale: bool = False,
    clipping_threshold: float | None = 1.0,
    momentum: float | None = None,
    min_dim_size_to_factor: int = 128,
) -> optax.GradientTransformation:
    """Adam's memory-saving cousin with factored second moments (arXiv 1804.04235)."""
    return optax.adafactor(
        learning_rate,
        min_dim_size_to_factor=min_dim_size_to_factor,
        decay_rate=decay_rate,
        multiply_by_parameter_scale=multiply_by_parameter_scale,
        clipping_threshold=clipping_threshold,
        momentum=momentum,
        weight_decay_rate=weight_decay or None,
        weight_decay_mask=decays,
    )


def sgd(
    learning_rate: optax.Schedule, *, momentum: float = 0.0, nesterov: bool = False
) -> optax.GradientTransformation:
    """Stochastic gradient descent."""
    return optax.sgd(learning_rate, momentum or None, nesterov)


def lion(
    learning_rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """The sign of an interpolated momentum (arXiv 2302.06675)."""
    return optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=decays)


def rmsprop(learning_rate: optax.Schedule, *, decay: float = 0.99, eps: float = 1e-8) -> optax.GradientTransformation:
    """Gradients over the root of their running mean square, ε outside the root as in PyTorch."""
    return optax.rmsprop(learning_rate, decay, eps, eps_in_sqrt=False)


def decays(params):
    """True for leaves that weight decay acts on: all but norm scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)

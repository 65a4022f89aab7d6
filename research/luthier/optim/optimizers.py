"""optax optimisers by name, with weight decay only where it belongs (not on norms and biases)."""

import jax
import jax.numpy as jnp
import optax

from luthier.errors import LuthierError


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
    """Adam's memory-saving cousin with factored second moments (arXiv 1804.04235).

    A matrix is a layer's own, though layers are stacked: the sizes that an update is clipped at and scaled by are
    not averaged over layers (as in T5X). Weight decay takes a share of the weight, whatever the learning rate.

    Args:
      decay_rate: c of the second moment's decay 1 − t⁻ᶜ.
      multiply_by_parameter_scale: the learning rate is relative to the weight's root mean square, at least 1e-3.
      clipping_threshold: the largest root mean square of an update before it meets the learning rate.
      min_dim_size_to_factor: both sides of a matrix must have it, or its second moments are kept whole.

    Raises:
      LuthierError: at `init`, where that is so few that layers would be taken for the side of a matrix.
    """
    factored = optax.scale_by_factored_rms(decay_rate=decay_rate, min_dim_size_to_factor=min_dim_size_to_factor)

    def init(params):
        for weight in (leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _is_stacked(path)):
            layers, *sides = weight.shape
            if layers >= min_dim_size_to_factor and sides and sum(side > layers for side in sides) < 2:
                raise LuthierError(
                    f"{min_dim_size_to_factor} does not exceed the number of layers",
                    where="optimizer.min_dim_size_to_factor",
                    mend=f"Give {layers + 1} or more",
                )
        return factored.init(params)

    chain = [optax.GradientTransformation(init, factored.update)]
    if clipping_threshold is not None:
        chain.append(_each_layer(optax.clip_by_block_rms(clipping_threshold)))
    chain.append(optax.scale_by_learning_rate(learning_rate, flip_sign=False))
    if multiply_by_parameter_scale:
        chain.append(_each_layer(optax.scale_by_param_block_rms()))
    if momentum is not None:
        chain.append(optax.ema(momentum, debias=False, accumulator_dtype=jnp.float32))
    if weight_decay:
        chain.append(optax.add_decayed_weights(weight_decay, decays))
    return optax.chain(*chain, optax.scale(-1.0))


def _each_layer(stateless: optax.GradientTransformation) -> optax.GradientTransformation:
    """`stateless`, which acts on one leaf at a time, on every layer of stacked ones by itself."""

    def update(updates, state, params):
        def of_leaf(path, update, weight):
            one = lambda update, weight: stateless.update(update, state, weight)[0]  # noqa: E731
            return (jax.vmap(one) if _is_stacked(path) else one)(update, weight)

        return jax.tree_util.tree_map_with_path(of_leaf, updates, params), state

    return optax.GradientTransformation(stateless.init, update)


def _is_stacked(path) -> bool:
    """Whether a leaf holds all layers, along its first axis."""
    return any(getattr(part, "key", None) == "layers" for part in path)


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

"""Update masks: which of a model's weights an optimizer moves, with state only for those."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

Mask = Mapping[str, Any]  # as the weights: a bool for a leaf, or bools [layers] for one of stacked layers


def half(weights: Mapping[str, Any], *, seed: int = 0) -> Mask:
    """Half fine-tuning: in every layer a random half of the attention matrices, of the MLP's and of the norms.

    Where a category has an odd number, as the three matrices of an MLP, layers take the smaller and the larger half
    in turn. Embeddings and head always train. Another `seed` draws another half: a stage is a round.

    Source: S106, HFT, arXiv 2404.18466 (secondary: the paper's own code was not seen).
    """
    rng, flat = np.random.default_rng(seed), flatten_dict(weights)
    mask = dict.fromkeys(flat, True)
    stacked = [path for path in flat if "layers" in path]
    for category in sorted({_category(path) for path in stacked}):
        modules = sorted({path[:-1] for path in stacked if _category(path) == category})
        layers = flat[next(path for path in stacked if path[:-1] == modules[0])].shape[0]
        turn = rng.integers(2)
        chosen = np.zeros((len(modules), layers), bool)
        for layer in range(layers):
            count = (len(modules) + (layer + turn) % 2) // 2
            chosen[rng.choice(len(modules), count, replace=False), layer] = True
        for path in stacked:
            if path[:-1] in modules:
                mask[path] = chosen[modules.index(path[:-1])]
    return unflatten_dict(mask)


def _category(path: tuple[str, ...]) -> str:
    """`norm`, `attention` or `mlp`."""
    if "norm" in path[-2]:
        return "norm"
    return "attention" if "attention" in path else "mlp"


def norms(weights: Mapping[str, Any], *, head: bool = False) -> Mask:
    """Only the scales of the norms, and the head with `head` (the embedding, where it is tied).

    Source: S109, "LayerNorm: A key component in parameter-efficient fine-tuning", which also trains the head.
    """
    flat = flatten_dict(weights)
    untied = any("head" in path for path in flat)
    of_head = "head" if untied else "embed"
    return unflatten_dict({path: path[-1] == "scale" or (head and of_head in path) for path in flat})


def masked(optimizer: optax.GradientTransformation, mask: Mask) -> optax.GradientTransformation:
    """`optimizer` on the weights that the mask chooses; the others get no update and no state."""

    def chosen(tree):
        """{path: the chosen part of a leaf}."""
        flat, kept = flatten_dict(tree), flatten_dict(mask)
        parts = {path: _part(x, kept[path]) for path, x in flat.items()}
        return unflatten_dict({path: x for path, x in parts.items() if x is not None})

    def init(weights):
        return optimizer.init(chosen(weights))

    def update(grads, state, weights):
        updates, state = optimizer.update(chosen(grads), state, chosen(weights))
        moved, kept = flatten_dict(updates), flatten_dict(mask)
        whole = {path: _whole(x, kept[path], moved.get(path)) for path, x in flatten_dict(grads).items()}
        return unflatten_dict(whole), state

    return optax.GradientTransformation(init, update)


def keep(grads: Mapping[str, Any], mask: Mask) -> Mapping[str, Any]:
    """The gradient with zeros where the mask has False, so that nothing computes what no update uses."""
    flat, kept = flatten_dict(grads), flatten_dict(mask)
    return unflatten_dict({path: _whole(x, kept[path], _part(x, kept[path])) for path, x in flat.items()})


def count(weights: Mapping[str, Any], mask: Mask) -> int:
    """Numbers that train."""
    flat, kept = flatten_dict(weights), flatten_dict(mask)
    return int(sum(x.size * np.mean(kept[path]) for path, x in flat.items()))


def _part(x: jax.Array, kept) -> jax.Array | None:
    if np.ndim(kept) == 0:
        return x if kept else None
    return x[np.flatnonzero(kept)] if kept.any() else None


def _whole(x: jax.Array, kept, part: jax.Array | None) -> jax.Array:
    if part is None:
        return jnp.zeros_like(x)
    if np.ndim(kept) == 0:
        return part
    return jnp.zeros_like(x).at[np.flatnonzero(kept)].set(part.astype(x.dtype))

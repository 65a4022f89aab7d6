"""The form of weights and cache in which one CPU decodes fastest: every layer apart.

A program that indexes stacked weights copies each layer's before its products, which for a few rows
costs more than the products do. And a product with few rows is fastest where the weights of each
output lie together, `[out, in]`.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from luthier.models.cache import KVCache

# Bytes of kernels that are copied into this form; larger models keep the one they have.
LARGEST_COPY = 1 << 32


class Columns(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """A kernel `[in, out]` that lies in memory as `[out, in]`."""

    columns: jax.Array

    def unbox(self) -> jax.Array:
        return self.columns.T

    def replace_boxed(self, value):
        return Columns(value.T)

    def add_axis(self, index, params):
        raise NotImplementedError

    def remove_axis(self, index, params):
        raise NotImplementedError


def product(x: Float[Array, "*rows i"], kernel: Columns, dtype=None) -> Float[Array, "*rows o"]:
    """x W, as (Wᵀ xᵀ)ᵀ."""
    rows = x.reshape(-1, x.shape[-1])
    columns = kernel.columns.astype(x.dtype)
    y = jax.lax.dot_general(columns, rows, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    # Without the barrier XLA turns the product round again.
    return jax.lax.optimization_barrier(y).T.reshape(*x.shape[:-1], -1)


def cache_apart(cache: KVCache) -> KVCache:
    """The same cache with an array a layer, as attention's products read them."""
    keys, values = cache.keys.transpose(0, 1, 3, 4, 2), cache.values.swapaxes(2, 3)
    return cache.replace(keys=tuple(keys), values=tuple(values))


def variables_apart(variables: Mapping[str, Any], dtype: Any, tied: bool) -> Mapping[str, Any] | None:
    """A copy of the layers, a tree each under `layers`, with kernels as `Columns` of the dtype of their products.

    The rest is the same memory; a tied head gets a kernel of its own, the embedding as it lies. None where the
    kernels would take more than LARGEST_COPY bytes.
    """
    kernels = [x for path, x in jax.tree_util.tree_leaves_with_path(variables) if _is_kernel(path)]
    if sum(x.size for x in kernels) * jnp.dtype(dtype).itemsize > LARGEST_COPY:
        return None
    cut = functools.partial(_cut, dtype=dtype)
    layers = {name: {"layers": cut(tree["layers"])} for name, tree in variables.items() if "layers" in tree}
    apart = {name: {**tree, **layers.get(name, {})} for name, tree in variables.items()}
    kernel = variables["params"]["embed"]["embedding"] if tied else variables["params"]["head"]["kernel"].T
    apart["params"]["head"] = {**variables["params"].get("head", {}), "kernel": Columns(kernel)}
    return apart


def _is_kernel(path) -> bool:
    return path[-1].key == "kernel"


@functools.partial(jax.jit, static_argnames="dtype")
def _cut(layers, dtype) -> list[Any]:
    def slices(path, x):
        return [Columns(one) for one in x.swapaxes(1, 2).astype(dtype)] if _is_kernel(path) else list(x)

    leaves, structure = jax.tree_util.tree_flatten_with_path(layers)
    return [jax.tree.unflatten(structure, layer) for layer in zip(*(slices(path, x) for path, x in leaves))]

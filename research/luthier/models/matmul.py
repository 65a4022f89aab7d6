"""Matrix products whose derivatives transpose only the narrower operand in memory."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "*rows i"], w: Float[Array, "*batch i o"], dtype=None) -> Float[Array, "*rows o"]:
    """x W, for each index of the batch dimensions that W has and x begins with.

    The derivative is the usual one. Left to itself, JAX forms dW as (gᵀ x)ᵀ, which on a CPU costs a
    transposing copy of g; here it is xᵀ g where x is the narrower of the two.

    Args:
      dtype: of the result and of its accumulation; default that of the operands.
    """
    return _dot(x, w, dtype)


def _dot(x, w, dtype=None):
    batch = tuple(range(w.ndim - 2))
    return lax.dot_general(x, w, (((x.ndim - 1,), (w.ndim - 2,)), (batch, batch)), preferred_element_type=dtype)


def _forward(x, w, dtype):
    return _dot(x, w, dtype), (x, w)


def _backward(dtype, residuals, g):
    x, w = residuals
    g = g.astype(x.dtype)
    batch = tuple(range(w.ndim - 2))
    rows = tuple(range(w.ndim - 2, x.ndim - 1))
    contract = lambda a, b: lax.dot_general(a, b, ((rows, rows), (batch, batch)))  # noqa: E731
    dw = contract(x, g) if w.shape[-2] <= w.shape[-1] else jnp.swapaxes(contract(g, x), -1, -2)
    return _dot(g, jnp.swapaxes(w, -1, -2)), dw.astype(w.dtype)


matmul.defvjp(_forward, _backward)

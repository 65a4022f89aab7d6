"""Products with weights: their derivatives, and what devices tell each other for them.

On one device the derivative is arranged so that only the narrower operand is transposed in memory.
On a mesh each product says its own communication, that of fully sharded data parallelism
(ZeRO-3, arXiv 1910.02054) and of tensor parallelism (arXiv 1909.08053): the weight is gathered in
the dtype of the product, forwards and again backwards, and its gradient leaves as a reduce-scatter
in the weight's own dtype. Left to the compiler, the gradient is summed whole on every device.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from luthier.parallel import BATCH_AXES, Axis, Sharder, spread, sum_parts

ROW_AXES = (*BATCH_AXES, "sequence")
ROW_DIMENSION = {"data": 0, "fsdp": 0, "sequence": 1}  # of `[B, T]`


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def matmul(
    x: Float[Array, "*rows i"],
    w: Float[Array, "i o"],
    sharder: Sharder,
    axes: tuple[Axis, Axis],
) -> Float[Array, "*rows o"]:
    """x W in the dtype of x.

    Args:
      axes: logical names of the axes of W.
    """
    layout = _layout(x.shape[:-1], w.shape, sharder, axes)
    if layout is None:
        return x @ w.astype(x.dtype)
    x_spec, w_spec, y_spec = layout

    def product(x, w):
        y = x @ _gathered(w, x.dtype, w_spec)
        return jax.lax.psum(y, "tensor") if "tensor" in spread(w_spec[0]) else y

    return _on_mesh(product, sharder, (x_spec, w_spec), y_spec)(x, w)


def _forward(x, w, sharder, axes):
    """Keeps x only for a trained weight, and tells by () that x itself has a derivative."""
    kept = (x.value if w.perturbed else None, w.value, () if x.perturbed else None)
    return matmul(x.value, w.value, sharder, axes), kept


def _backward(sharder, axes, kept, g):
    x, w, moves = kept
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        return None, None
    layout = _layout(g.shape[:-1], w.shape, sharder, axes)
    if layout is None:
        dx = None if moves is None else g @ w.astype(g.dtype).T
        return dx, None if x is None else _outer(x, g, w).astype(w.dtype)
    x_spec, w_spec, y_spec = layout

    def of_x(g, w):
        dx = g @ _gathered(w, g.dtype, w_spec).T
        return jax.lax.psum(dx, "tensor") if "tensor" in spread(w_spec[1]) else dx

    def of_w(x, g):
        dw = _contract_rows(x, g, jnp.promote_types(x.dtype, jnp.float32))
        return sum_parts(dw, tuple(axis for axis in ROW_AXES if sharder.size(axis) > 1), w_spec, sharder).astype(
            w.dtype
        )

    dx = None if moves is None else _on_mesh(of_x, sharder, (y_spec, w_spec), x_spec)(g, w)
    return dx, None if x is None else _on_mesh(of_w, sharder, (x_spec, y_spec), w_spec)(x, g)


matmul.defvjp(_forward, _backward, symbolic_zeros=True)


def lookup(table: Float[Array, "V E"], tokens: Int[Array, "B T"], dtype, sharder: Sharder) -> Float[Array, "B T E"]:
    """The rows of a table.

    Where its columns lie on different devices, each looks all tokens up in its own, and the devices
    exchange parts of the result: neither the table nor its gradient is ever whole anywhere.
    """
    take = functools.partial(jnp.take, axis=0, mode="clip")
    table_spec = sharder.spec(("vocab", "embed"), table.shape) if sharder.mesh is not None else P(None, None)
    rows, columns = _rows(sharder, tokens.shape), spread(table_spec[1])
    if rows is None or not columns or not _served(table_spec):
        return take(table, tokens).astype(dtype)

    def look_up(table, tokens):
        for axis in columns:
            tokens = jax.lax.all_gather(tokens, axis, axis=ROW_DIMENSION[axis], tiled=True)
        if table_spec[0] == "tensor":
            tokens -= jax.lax.axis_index("tensor") * table.shape[0]
            mine = (tokens >= 0) & (tokens < table.shape[0])
            x = jax.lax.psum(jnp.where(mine[..., None], take(table, tokens), 0).astype(dtype), "tensor")
        else:
            x = take(table, tokens).astype(dtype)
        for axis in reversed(columns):
            x = jax.lax.all_to_all(x, axis, split_axis=ROW_DIMENSION[axis], concat_axis=2, tiled=True)
        return x

    return _on_mesh(look_up, sharder, (table_spec, rows), rows)(table, tokens)


def _outer(x, g, w):
    """Σ_rows xᵀ g. JAX by itself forms (gᵀ x)ᵀ, which on a CPU costs a transposing copy of g."""
    return _contract_rows(x, g) if w.shape[0] <= w.shape[1] else _contract_rows(g, x).T


def _contract_rows(a, b, dtype=None):
    rows = tuple(range(a.ndim - 1))
    return jnp.tensordot(a, b, (rows, rows), preferred_element_type=dtype)


def _layout(rows_shape, w_shape, sharder: Sharder, axes) -> tuple[P, P, P] | None:
    """Where x `[B, T, i]`, W and x W lie; None leaves it to the compiler."""
    if len(rows_shape) != 2 or sharder.mesh is None:
        return None
    rows, w_spec = _rows(sharder, rows_shape), sharder.spec(axes, w_shape)
    if rows is None or not _served(w_spec):
        return None
    of_rows = lambda part: P(*rows, "tensor" if "tensor" in spread(part) else None)  # noqa: E731
    return of_rows(w_spec[0]), w_spec, of_rows(w_spec[1])


def _rows(sharder: Sharder, shape) -> P | None:
    """How `[B, T]` is split over every axis for rows; None where it is not, for rows that do not divide."""
    if sharder.mesh is None or sharder.mesh.size == 1:
        return None
    rows = sharder.spec(("batch", "time"), shape)
    return rows if _axes(rows) == {axis for axis in ROW_AXES if sharder.size(axis) > 1} else None


def _served(spec: P) -> bool:
    """A dimension of the weight is split over `tensor`, and within its parts over axes of the rows."""
    return all(set(_within_tensor(part)) <= set(ROW_AXES) for part in spec)


def _within_tensor(part) -> tuple[str, ...]:
    """The mesh axes of a dimension but for `tensor` before them."""
    axes = spread(part)
    return axes[1:] if axes[:1] == ("tensor",) else axes


def _axes(spec: P) -> set[str]:
    return {axis for part in spec for axis in spread(part)}


def _on_mesh(f, sharder: Sharder, in_specs, out_specs):
    return jax.shard_map(f, mesh=sharder.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _gathered(w, dtype, spec: P):
    """The weight in the dtype of its product, whole but for `tensor`."""
    w = w.astype(dtype)
    for dimension, part in enumerate(spec):
        if axes := _within_tensor(part):
            w = jax.lax.all_gather(w, axes, axis=dimension, tiled=True)
    return w

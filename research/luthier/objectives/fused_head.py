"""The unembedding and a token loss in one loop over time, so that all logits never exist at once.

Both functions run the same loop over chunks of time. On a mesh the loop runs inside a `shard_map`
over every axis (rows over data and fsdp, time over sequence and tensor), so the head is gathered
once and its gradient summed once.

- `weighted_sum` knows its weights beforehand and forms the gradient while the chunk's logits are
  there: two matrix products forward-and-backward beyond the first, none repeated.
- `token_outputs` gives one value a token and takes any cotangents; its backward pass makes the
  logits of a chunk again.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from luthier.parallel import BATCH_AXES, Sharder

CHUNK_BYTES = 1 << 26  # logits of one chunk on one device, in float32
ROWS = P(BATCH_AXES, ("sequence", "tensor"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def weighted_sum(
    unembed: Callable,
    token_fn: Callable,
    sharder: Sharder,
    head: Mapping,
    hidden: Float[Array, "B T E"],
    weights: Float[Array, "B T"],
    tok: Mapping[str, Array],
    token_ids: Int[Array, "B T"],
    rng: jax.Array,
) -> tuple[jax.Array, dict[str, Float[Array, "B T"]]]:
    """Σ weights · loss, and every output of `token_fn` a token.

    Differentiable in `head` and `hidden`, through the sum only.

    Args:
      unembed: `(head, hidden[n, E]) -> logits[n, V]`.
      token_fn: `(logits[n, V], tok, keys[n]) -> {"loss": [n], …}`.
      head: variables that `unembed` reads.
      tok: per-token arrays `[B, T]` for `token_fn`.
      token_ids: global ids; token i's key is `fold_in(rng, token_ids[i])`.
    """
    outputs, _ = _loop(unembed, token_fn, sharder, head, hidden, weights, tok, token_ids, rng, wanted=None)
    return jnp.sum(weights * outputs["loss"]), outputs


def _weighted_sum_forward(unembed, token_fn, sharder, head, hidden, weights, tok, token_ids, rng):
    head_needs = jax.tree.map(lambda leaf: leaf.perturbed, head, is_leaf=_is_primal)
    head, hidden, weights, tok, token_ids, rng = jax.tree.map(
        lambda leaf: leaf.value, (head, hidden, weights, tok, token_ids, rng), is_leaf=_is_primal
    )
    outputs, gradients = _loop(unembed, token_fn, sharder, head, hidden, weights, tok, token_ids, rng, head_needs)
    return (jnp.sum(weights * outputs["loss"]), outputs), gradients


def _weighted_sum_backward(unembed, token_fn, sharder, gradients, cotangents):
    scale = cotangents[0]
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        scale = jnp.zeros((), scale.dtype)
    head, hidden = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    return head, hidden, None, None, None, None


def _is_primal(leaf) -> bool:
    return hasattr(leaf, "perturbed")


weighted_sum.defvjp(_weighted_sum_forward, _weighted_sum_backward, symbolic_zeros=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def token_outputs(
    unembed: Callable,
    token_fn: Callable,
    sharder: Sharder,
    head: Mapping,
    hidden: Float[Array, "B T E"],
    tok: Mapping[str, Array],
    token_ids: Int[Array, "B T"],
    rng: jax.Array,
) -> dict[str, Float[Array, "B T"]]:
    """Every output of `token_fn` a token; `loss` is differentiable in `head` and `hidden`.

    Arguments as in `weighted_sum`. This serves losses of whole sequences, whose weights depend on
    the values.
    """
    weights = jnp.zeros(hidden.shape[:2])
    return _loop(unembed, token_fn, sharder, head, hidden, weights, tok, token_ids, rng, wanted=None)[0]


def _token_outputs_forward(unembed, token_fn, sharder, head, hidden, tok, token_ids, rng):
    needs = jax.tree.map(lambda leaf: leaf.perturbed, head, is_leaf=_is_primal)
    values = jax.tree.map(lambda leaf: leaf.value, (head, hidden, tok, token_ids, rng), is_leaf=_is_primal)
    return token_outputs(unembed, token_fn, sharder, *values), (needs, values)


def _token_outputs_backward(unembed, token_fn, sharder, residuals, cotangents):
    needs, (head, hidden, tok, token_ids, rng) = residuals
    weights = cotangents["loss"]
    if isinstance(weights, jax.custom_derivatives.SymbolicZero):
        weights = jnp.zeros(weights.shape, weights.dtype)
    _, gradients = _loop(unembed, token_fn, sharder, head, hidden, weights, tok, token_ids, rng, needs)
    return *gradients, None, None, None


token_outputs.defvjp(_token_outputs_forward, _token_outputs_backward, symbolic_zeros=True)


def _loop(unembed, token_fn, sharder, head, hidden, weights, tok, token_ids, rng, wanted):
    """Outputs `{name: [B, T]}` and, if `wanted` (bools shaped like `head`), the gradients of
    Σ weights · loss in (head, hidden); unwanted leaves of the head get zeros."""
    shape = hidden.shape[:2]
    parts = 1 if sharder.mesh is None else math.prod(sharder.mesh.shape[axis] for axis in ("sequence", "tensor"))
    pad = -shape[1] % parts
    rows = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)), (hidden, weights, tok, token_ids)
    )
    body = functools.partial(_chunks, unembed, token_fn, wanted)
    if sharder.mesh is None or sharder.mesh.size == 1:
        outputs, head_gradient, hidden_gradient = body(head, rng, *rows)
    else:
        body = functools.partial(_summed, body, sharder.mesh.axis_names)
        body = jax.shard_map(
            body,
            mesh=sharder.mesh,
            in_specs=(P(), P(), ROWS, ROWS, ROWS, ROWS),
            out_specs=(ROWS, P(), ROWS),
            check_vma=False,
        )
        outputs, head_gradient, hidden_gradient = body(head, rng, *rows)
    cut = functools.partial(jax.tree.map, lambda x: x[:, : shape[1]])
    return cut(outputs), (head_gradient, cut(hidden_gradient))


def _summed(body, axes, *arguments):
    outputs, head_gradient, hidden_gradient = body(*arguments)
    return outputs, jax.lax.psum(head_gradient, axes), hidden_gradient


def _chunks(unembed, token_fn, wanted, head, rng, hidden, weights, tok, token_ids):
    batch, time = hidden.shape[:2]
    vocabulary = jax.eval_shape(unembed, head, jax.ShapeDtypeStruct(hidden.shape[-1:], hidden.dtype)).shape[-1]
    size = max(1, min(time, CHUNK_BYTES // (4 * vocabulary * batch)))
    count = math.ceil(time / size)
    size = math.ceil(time / count)

    def cut(x):  # [B, T, …] -> [chunks, B · size, …]
        x = jnp.pad(x, ((0, 0), (0, count * size - time)) + ((0, 0),) * (x.ndim - 2))
        return x.reshape(batch, count, size, *x.shape[2:]).swapaxes(0, 1).reshape(count, batch * size, *x.shape[2:])

    def join(x):
        return (
            x.reshape(count, batch, size, *x.shape[2:])
            .swapaxes(0, 1)
            .reshape(batch, count * size, *x.shape[2:])[:, :time]
        )

    leaves, structure = jax.tree.flatten(head)
    flags = [False] * len(leaves) if wanted is None else jax.tree.leaves(wanted)

    def total(trained, hidden, weights, tok, token_ids):
        moving = iter(trained)
        whole = structure.unflatten([next(moving) if flag else leaf for flag, leaf in zip(flags, leaves)])
        keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(token_ids)
        outputs = token_fn(unembed(whole, hidden), tok, keys)
        return jnp.sum(weights * outputs["loss"]), outputs

    trained = [leaf for flag, leaf in zip(flags, leaves) if flag]

    def step(gradient, chunk):
        if wanted is None:
            return gradient, (total(trained, *chunk)[1], ())
        (_, outputs), (more, hidden_gradient) = jax.value_and_grad(total, (0, 1), has_aux=True)(trained, *chunk)
        return jax.tree.map(jnp.add, gradient, more), (outputs, hidden_gradient)

    chunks = jax.tree.map(cut, (hidden, weights, tok, token_ids))
    start = jax.tree.map(jnp.zeros_like, trained)
    gradient, (outputs, hidden_gradient) = jax.lax.scan(step, start, chunks)
    moving = iter(gradient)
    head_gradient = structure.unflatten(
        [next(moving) if flag else jnp.zeros_like(leaf) for flag, leaf in zip(flags, leaves)]
    )
    if wanted is None:
        return jax.tree.map(join, outputs), (), ()
    return jax.tree.map(join, outputs), head_gradient, join(hidden_gradient)

"""The unembedding and a token loss in one loop over tokens, so that all logits never exist at once.

Both functions run the same loop over chunks of tokens, `chunk_fn(head, hidden[n, E], tok, keys[n]) ->
{"loss": [n], …}`: it makes the logits of n tokens (of a reference model too, whose hidden states are then
in `tok`) and what a loss needs of them. On a mesh the loop runs inside a `shard_map`
over every axis (rows over data and fsdp, time over sequence and tensor), so the head is gathered
once, in the dtype of the products, and its gradient summed once, each device keeping its part.
Each device takes its tokens of weight 0, such as prompts, last, and skips chunks of nothing else.

- `weighted_sum` knows its weights beforehand and forms the gradient while the chunk's logits are
  there: two matrix products forward-and-backward beyond the first, none repeated.
- `token_outputs` gives one value a token and takes any cotangents; its backward pass makes the
  logits of a chunk again, unless the head is fixed, as under LoRA.
"""

import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from luthier.parallel import BATCH_AXES, Sharder, sum_parts

CHUNK_BYTES = 1 << 26  # logits of one chunk on one device, in float32: what the caches of a CPU like
CHUNK_TOKENS = 256  # at most, on a CPU: the finer, the more of the tokens without weight are skipped
ACCELERATOR_CHUNKS = 4  # times as large elsewhere, or reading the head for each chunk would bound the speed
ROWS = P(BATCH_AXES, ("sequence", "tensor"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def weighted_sum(
    chunk_fn: Callable,
    logits: int,
    sharder: Sharder,
    head: Mapping,
    hidden: Float[Array, "B T E"],
    weights: Float[Array, "B T"],
    tok: Mapping[str, Array],
    token_ids: Int[Array, "B T"],
    rng: jax.Array,
) -> tuple[jax.Array, dict[str, Float[Array, "B T"]]]:
    """Σ weights · loss, and every output of `chunk_fn` a token, 0 where the weight is 0.

    Differentiable in `head` and `hidden`, through the sum only.

    Args:
      chunk_fn: as above; differentiated in `head` and `hidden`.
      logits: how many `chunk_fn` makes a token, over all models; chunks are sized by it.
      head: variables that `chunk_fn` reads.
      tok: per-token arrays `[B, T, …]` for `chunk_fn`.
      token_ids: global ids; token i's key is `fold_in(rng, token_ids[i])`.
    """
    outputs, _ = _loop(chunk_fn, logits, sharder, head, hidden, weights, tok, token_ids, rng, wanted=None)
    return jnp.sum(weights * outputs["loss"]), outputs


def _weighted_sum_forward(chunk_fn, logits, sharder, head, hidden, weights, tok, token_ids, rng):
    head_needs = jax.tree.map(lambda leaf: leaf.perturbed, head, is_leaf=_is_primal)
    head, hidden, weights, tok, token_ids, rng = jax.tree.map(
        lambda leaf: leaf.value, (head, hidden, weights, tok, token_ids, rng), is_leaf=_is_primal
    )
    outputs, gradients = _loop(chunk_fn, logits, sharder, head, hidden, weights, tok, token_ids, rng, head_needs)
    return (jnp.sum(weights * outputs["loss"]), outputs), gradients


def _weighted_sum_backward(chunk_fn, logits, sharder, gradients, cotangents):
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
    chunk_fn: Callable,
    logits: int,
    sharder: Sharder,
    head: Mapping,
    hidden: Float[Array, "B T E"],
    mask: Bool[Array, "B T"],
    tok: Mapping[str, Array],
    token_ids: Int[Array, "B T"],
    rng: jax.Array,
) -> dict[str, Float[Array, "B T"]]:
    """Every output of `chunk_fn` a token, 0 outside the mask; `loss` is differentiable in `head` and `hidden`.

    Other arguments as in `weighted_sum`. This serves losses of whole sequences, whose weights depend on
    the values.
    """
    weights = mask.astype(jnp.float32)
    return _loop(chunk_fn, logits, sharder, head, hidden, weights, tok, token_ids, rng, wanted=None)[0]


def _token_outputs_forward(chunk_fn, logits, sharder, head, hidden, mask, tok, token_ids, rng):
    needs = jax.tree.map(lambda leaf: leaf.perturbed, head, is_leaf=_is_primal)
    values = jax.tree.map(lambda leaf: leaf.value, (head, hidden, mask, tok, token_ids, rng), is_leaf=_is_primal)
    if any(jax.tree.leaves(needs)):
        return token_outputs(chunk_fn, logits, sharder, *values), (needs, values)
    head, hidden, mask, *rest = values
    outputs, (_, each) = _loop(chunk_fn, logits, sharder, head, hidden, mask.astype(jnp.float32), *rest, needs)
    return outputs, (None, (each, mask))


def _token_outputs_backward(chunk_fn, logits, sharder, residuals, cotangents):
    needs, values = residuals
    weights = cotangents["loss"]
    if isinstance(weights, jax.custom_derivatives.SymbolicZero):
        weights = jnp.zeros(weights.shape, weights.dtype)
    if needs is None:  # a token's gradient is that of its loss, which the forward pass has, times the cotangent
        each, mask = values
        return None, (each * jnp.where(mask, weights, 0)[..., None]).astype(each.dtype), None, None, None, None
    head, hidden, mask, tok, token_ids, rng = values
    weights = jnp.where(mask, weights, 0)
    again = lambda *arguments: {"loss": chunk_fn(*arguments)["loss"]}  # noqa: E731 — metrics are known
    _, gradients = _loop(again, logits, sharder, head, hidden, weights, tok, token_ids, rng, needs)
    return *gradients, None, None, None, None


token_outputs.defvjp(_token_outputs_forward, _token_outputs_backward, symbolic_zeros=True)


def _loop(chunk_fn, logits, sharder, head, hidden, weights, tok, token_ids, rng, wanted):
    """Outputs `{name: [B, T]}`, 0 where the weight is, and, if `wanted` (bools shaped like `head`), the
    gradients of Σ weights · loss in (head, hidden); unwanted leaves of the head get zeros."""
    shape = hidden.shape[:2]
    parts = 1 if sharder.mesh is None else math.prod(sharder.mesh.shape[axis] for axis in ("sequence", "tensor"))
    pad = -shape[1] % parts
    rows = jax.tree.map(
        lambda x: jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2)), (hidden, weights, tok, token_ids)
    )
    leaves, structure = jax.tree.flatten(head)
    flags = None if wanted is None else jax.tree.leaves(wanted)
    on_cpu = sharder.device().platform == "cpu"
    limits = (CHUNK_BYTES, CHUNK_TOKENS) if on_cpu else (CHUNK_BYTES * ACCELERATOR_CHUNKS, math.inf)
    body = functools.partial(_chunks, chunk_fn, logits, structure, flags, limits)
    if sharder.mesh is None or sharder.mesh.size == 1:
        outputs, gradients, hidden_gradient = body(leaves, rng, *rows)
    else:
        narrow = [x.astype(hidden.dtype) if x.dtype.itemsize > hidden.dtype.itemsize else x for x in leaves]
        specs = [_head_spec(sharder, x.shape, hidden.shape[-1]) for x, flag in zip(leaves, flags or ()) if flag]
        body = jax.shard_map(
            functools.partial(_summed, body, sharder, specs),
            mesh=sharder.mesh,
            in_specs=(P(), P(), ROWS, ROWS, ROWS, ROWS),
            out_specs=(ROWS, specs, ROWS),
            check_vma=False,
        )
        # The barrier has the head's gradient, whole on every device until it is summed, gone before the layers' begins.
        outputs, gradients, hidden_gradient = jax.lax.optimization_barrier(body(narrow, rng, *rows))
    cut = functools.partial(jax.tree.map, lambda x: x[:, : shape[1]])
    if wanted is None:
        return cut(outputs), ()
    moving = iter(gradients)
    gradients = [next(moving).astype(x.dtype) if flag else jnp.zeros_like(x) for flag, x in zip(flags, leaves)]
    return cut(outputs), (structure.unflatten(gradients), cut(hidden_gradient))


def _head_spec(sharder: Sharder, shape, width: int) -> P:
    """Where a leaf of the head lies: an axis as long as a hidden state is `embed`. Only speed depends on it."""
    return sharder.spec(["embed" if size == width else "vocab" for size in shape], shape)


def _summed(body, sharder, specs, *arguments):
    outputs, gradients, hidden_gradient = body(*arguments)
    return (
        outputs,
        [sum_parts(x, sharder.mesh.axis_names, spec, sharder) for x, spec in zip(gradients, specs)],
        hidden_gradient,
    )


def _chunks(chunk_fn, logits, structure, flags, limits, leaves, rng, hidden, weights, tok, token_ids):
    """`_loop` on one device's rows; the gradients are those of the leaves that `flags` tell, in float32 at least."""
    shape, tokens = hidden.shape[:2], math.prod(hidden.shape[:2])
    size = max(1, min(tokens, limits[0] // (4 * logits), limits[1]))
    count = math.ceil(tokens / size)
    size = math.ceil(tokens / count)
    order = jnp.argsort(weights.reshape(-1) == 0, stable=True)
    rank = jnp.argsort(order)

    def cut(x):  # [B, T, …] -> [chunks, size, …]
        x = x.reshape(tokens, *x.shape[2:])[order]
        return jnp.pad(x, ((0, count * size - tokens),) + ((0, 0),) * (x.ndim - 1)).reshape(count, size, *x.shape[1:])

    def join(x):
        return x.reshape(count * size, *x.shape[2:])[rank].reshape(*shape, *x.shape[2:])

    trained = [x for x, flag in zip(leaves, flags or ()) if flag]

    def total(trained, hidden, weights, tok, token_ids):
        moving = iter(trained)
        whole = leaves if flags is None else [next(moving) if flag else x for flag, x in zip(flags, leaves)]
        keys = jax.vmap(functools.partial(jax.random.fold_in, rng))(token_ids)
        outputs = chunk_fn(structure.unflatten(whole), hidden, tok, keys)
        return jnp.sum(weights * outputs["loss"]), outputs

    def work(gradients, chunk):
        if flags is None:
            return gradients, (total(trained, *chunk)[1], ())
        (_, outputs), (more, hidden_gradient) = jax.value_and_grad(total, (0, 1), has_aux=True)(trained, *chunk)
        return [old + new.astype(old.dtype) for old, new in zip(gradients, more)], (outputs, hidden_gradient)

    def skip(gradients, chunk):
        return gradients, jax.tree.map(jnp.zeros_like, jax.eval_shape(work, gradients, chunk)[1])

    def step(gradients, chunk):
        return jax.lax.cond(jnp.any(chunk[1] != 0), work, skip, gradients, chunk)

    chunks = jax.tree.map(cut, (hidden, weights, tok, token_ids))
    start = [jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32)) for x in trained]
    gradients, (outputs, hidden_gradient) = jax.lax.scan(step, start, chunks)
    outputs = jax.tree.map(lambda x: jnp.where(weights != 0, join(x), jnp.zeros((), x.dtype)), outputs)
    return outputs, gradients, jax.tree.map(join, hidden_gradient)

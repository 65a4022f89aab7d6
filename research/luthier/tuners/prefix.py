"""Prefix tuning: learned keys and values before those of every example, in every layer."""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from luthier.models import init_cache
from luthier.models.attention import moved_keys
from luthier.models.transformer import Attend
from luthier.tuners.tuner import Bound, Reparameterisation, Tuner, Variables


def prefix(
    *,
    length: int = 20,
    hidden: int = 0,
    std: float = 1.0,
    collection: str = "prefix",
) -> Tuner:
    """o = attend(q, [P_k; k], [P_v; v]), with P_k and P_v `[length, kv_heads, head_dim]` a layer.

    Every segment of a packed row sees the same prefix, whole, and a cache never holds it. P_k are keys
    as they lie after rotary positions, at −length … −1 of a segment that starts at 0; a layer with a
    sliding window sees of them what its window reaches. Numbers start as normal(0, std), so training
    does not start at the frozen model. Where `splash` would have masked by itself, XLA attends.

    Args:
      length: keys and values a layer.
      hidden: width of an MLP that makes the prefixes of all layers while training: row i of them is
        W₂ tanh(W₁ eᵢ + b₁) + b₂, with eᵢ `[kv_heads · head_dim]`, W₁ to `[hidden]` and W₂ to
        `[layers, 2, kv_heads, head_dim]`. What is saved is its output. 0 trains the numbers themselves.

    Source: arXiv 2101.00190, sections 4.2 and 4.3; without an MLP: P-tuning v2, arXiv 2110.07602.
    """

    def transform(site: Attend, call, args, kwargs):
        q, k, v, mask, is_local = args
        start = nn.with_partitioning(nn.initializers.normal(std), (None, None, "kv_heads", None))
        rng = site.make_rng("params") if site.is_initializing() else None
        pair = site.variable(collection, "kv", start, rng, (2, length, *k.shape[2:])).value
        k, v = (_before(own, tokens) for own, tokens in zip(pair, (k, v)))
        return call(q, k, v, mask.behind(length), is_local)

    def plain(variables):
        return {"hidden": 0}, _mlp(variables[collection])

    tuner = Tuner("prefix", collection, ("layers/attention/attend",), Attend, transform)
    if not hidden:
        return tuner
    through = Reparameterisation(lambda rng, sites: _mlp_start(rng, sites, hidden), _mlp)
    return dataclasses.replace(tuner, plain=plain, through=through)


def _before(prefix, tokens):
    """`[length, K, D]` and `[B, S, K, D]` as `[B, length + S, K, D]`."""
    same = jnp.broadcast_to(prefix.astype(tokens.dtype), (tokens.shape[0], *prefix.shape))
    return jnp.concatenate([same, tokens], axis=1)


def _tree(kv) -> Variables:
    """`[L, 2, length, K, D]` at its site."""
    return {"layers": {"attention": {"attend": {"kv": kv}}}}


def _mlp(numbers: Variables) -> Variables:
    inner = jnp.tanh(numbers["rows"] @ numbers["w1"] + numbers["b1"])
    return _tree(jnp.einsum("ph,hlskd->lspkd", inner, numbers["w2"]) + numbers["b2"][:, :, None])


def _mlp_start(rng: jax.Array, sites: Variables, hidden: int) -> Variables:
    """As PyTorch starts an embedding and two linear maps: normal(0, 1), and uniform in ±1/sqrt(inputs)."""
    layers, _, length, heads, dim = nn.unbox(sites)["layers"]["attention"]["attend"]["kv"].shape
    keys = iter(jax.random.split(rng, 5))

    def uniform(inputs, shape, *axes):
        edge = inputs**-0.5
        return nn.Partitioned(jax.random.uniform(next(keys), shape, minval=-edge, maxval=edge), axes)

    width, made, axes = heads * dim, (layers, 2, heads, dim), (None, None, "kv_heads", None)
    return {
        "rows": nn.Partitioned(jax.random.normal(next(keys), (length, width)), (None, None)),
        "w1": uniform(width, (width, hidden), None, None),
        "b1": uniform(width, (hidden,), None),
        "w2": uniform(hidden, (hidden, *made), "embed", *axes),
        "b2": uniform(hidden, made, *axes),
    }


def prefix_of(bound: Bound, variables: Variables, tokens: Sequence[int]) -> Variables:
    """The prefix that is these tokens: an example behind it goes on from them.

    The paper's start from real words (section 7.4). Its collection, for `hidden=0`.
    """
    row = jnp.asarray(tokens, jnp.int32)[None]
    batch = {"tokens": row, "positions": jnp.arange(row.shape[1])[None], "segment_ids": jnp.ones_like(row)}
    model = bound.model
    _, cache = bound.hidden(variables, batch, cache=init_cache(model.config, 1, row.shape[1], model.dtype))
    keys = moved_keys(model.config, cache.keys[:, 0], -row.shape[1])
    return _tree(jnp.stack([keys, cache.values[:, 0]], axis=1))

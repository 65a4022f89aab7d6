"""LoRA: a low-rank update beside a frozen linear map; DoRA's magnitudes and PiSSA's start as options."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from luthier.errors import LuthierError, near
from luthier.models.matmul import matmul
from luthier.models.remat import saved
from luthier.models.transformer import Linear
from luthier.tuners.tuner import Tuner

INITS = ("uniform", "pissa")


def lora(
    *,
    rank: int = 16,
    alpha: float = 32.0,
    rslora: bool = False,
    dora: bool = False,
    init: str = "uniform",
    patterns: tuple = ("layers/attention/[qkvo]", "layers/mlp/(gate|up|down)"),
    collection: str = "lora",
) -> Tuner:
    """y = x W + s · (x A) B, with A `[in, rank]` and B `[rank, out]`; s = alpha / rank.

    A starts as PEFT's does, uniform in ±1/sqrt(in) (Kaiming uniform with a = sqrt 5), and B as zero,
    so that training starts at the frozen model.

    Args:
      rslora: s = alpha / sqrt(rank), which keeps the update's size steady in the rank.
      dora: y = x V ⊙ m / |V|, where V = W + s A B, |V| `[out]` is the length of each of its columns,
        without a derivative, and m `[out]` is trained and starts at |W|. W is the
        frozen map whatever tuners it has besides.
      init: `pissa` starts at the largest singular triplets of W = U S Vᵀ, A₀ = U sqrt(S / s) and
        B₀ = sqrt(S / s) Vᵀ, and trains A and B in y = x W + s · (x A B − x A₀ B₀). That is PiSSA's
        residual matrix with W left as it is: A₀ and B₀ are a frozen collection of their own.
      patterns: regular expressions of site paths; each must match a linear map.

    Source: arXiv 2106.09685; rank-stabilised scaling: arXiv 2312.03732; DoRA: arXiv 2402.09353,
    sections 4.1 and 4.3; PiSSA: arXiv 2404.02948, section 3.
    """
    if init not in INITS:
        raise LuthierError(f"unknown init {init!r}", where="tuner lora", mend=near(init, INITS))
    scale = alpha / rank**0.5 if rslora else alpha / rank
    beginning = f"{collection}_start"

    def transform(site: Linear, call, args, kwargs):
        (x,) = args
        # The long side of either is split as the map's is, and within that as weights are over `fsdp`.
        a_axes, b_axes = ((site.in_axis, "embed"), None), (None, (site.out_axis, "embed"))
        a_init = nn.with_partitioning(nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), a_axes)
        b_init = nn.with_partitioning(nn.initializers.zeros, b_axes)
        rng = site.make_rng("params") if site.is_initializing() else None
        a = site.variable(collection, "a", a_init, rng, (x.shape[-1], rank)).value
        b = site.variable(collection, "b", b_init, rng, (rank, site.features)).value
        if init == "pissa":
            a0 = site.variable(beginning, "a", a_init, rng, a.shape).value
            b0 = site.variable(beginning, "b", b_init, rng, b.shape).value
            a, b = _difference(a, b, a0, b0)
        low = scale * saved(matmul(x, a, site.sharder, a_axes))
        y, update = call(*args, **kwargs), matmul(low, b, site.sharder, b_axes)
        if not dora:
            return y + update
        m_init = nn.with_partitioning(nn.initializers.ones, (site.out_axis,))
        m = site.variable(collection, "m", m_init, rng, (site.features,)).value
        kernel = nn.unbox(site.get_variable("params", "kernel"))
        bias = nn.unbox(site.get_variable("params", "bias")).astype(y.dtype) if site.use_bias else 0
        ratio = m / jax.lax.stop_gradient(_lengths(kernel + scale * (a @ b)))
        return (y - bias + update) * ratio.astype(y.dtype) + bias

    def start(variables):
        """`m` and PiSSA's A and B from the weights."""
        kernels = flatten_dict(variables["params"])
        numbers, first = flatten_dict(variables[collection]), {}
        for site in {path[:-1] for path in numbers}:
            kernel = kernels[(*site, "kernel")]
            if dora:
                numbers[(*site, "m")] = _lengths(kernel)
            if init == "pissa":
                pair = _principal(kernel, rank, scale)
                first |= {(*site, name): value for name, value in zip("ab", pair)}
        made = {collection: unflatten_dict({**numbers, **first})}
        return {**made, beginning: unflatten_dict(first)} if first else made

    def full(variables):
        """A and B of the whole update."""
        numbers = flatten_dict(variables[collection])
        if init == "pissa":
            first = flatten_dict(variables[beginning])
            for site in {path[:-1] for path in first}:
                a, b = (*site, "a"), (*site, "b")
                numbers[a], numbers[b] = _difference(numbers[a], numbers[b], first[a], first[b])
        return numbers

    def merge(variables, frozen):
        params, numbers, frozen = flatten_dict(variables["params"]), full(variables), flatten_dict(frozen)
        for site in {path[:-1] for path in numbers}:
            kernel = params[(*site, "kernel")]
            update = scale * jnp.einsum("...ir,...ro->...io", numbers[(*site, "a")], numbers[(*site, "b")])
            tuned = kernel + update
            if dora:
                ratio = numbers[(*site, "m")] / _lengths(frozen[(*site, "kernel")] + update)
                tuned *= ratio[..., None, :]
                if (bias := (*site, "bias")) in params:  # what tuners before this one have made of it is scaled too
                    moved = (params[bias] - frozen[bias]) * ratio + frozen[bias]
                    params[bias] = moved.astype(params[bias].dtype)
            params[(*site, "kernel")] = tuned.astype(kernel.dtype)
        return unflatten_dict(params)

    def plain(variables):
        """Twice the rank, in LoRA's own form."""
        options = {"init": "uniform", "rank": 2 * rank, "alpha": alpha * 2**0.5 if rslora else alpha * 2}
        return options, unflatten_dict(full(variables))

    tuner = Tuner("lora", collection, tuple(patterns), Linear, transform, merge, start=start if dora else None)
    if init == "pissa":
        tuner = dataclasses.replace(tuner, frozen=(beginning,), start=start, plain=plain)
    return tuner


def _difference(a, b, a0, b0):
    """The factors of A B − A₀ B₀."""
    return jnp.concatenate([a, a0], axis=-1), jnp.concatenate([b, -b0], axis=-2)


def _principal(kernel, rank: int, scale: float):
    """A and B of rank `rank` with s A B nearest to the kernels `[..., in, out]`."""
    if rank > min(kernel.shape[-2:]):
        sizes = " to ".join(map(str, kernel.shape[-2:]))
        raise LuthierError(f"a map of {sizes} has no {rank} singular values", where="tuner lora", mend="Lower rank")
    u, s, v = jnp.linalg.svd(_wide(kernel), full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / scale)
    return u[..., :rank] * root[..., None, :], root[..., :, None] * v[..., :rank, :]


def _lengths(kernel):
    """Lengths `[..., out]` of the columns of `[..., in, out]`."""
    return jnp.linalg.norm(_wide(kernel), axis=-2)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))

"""LoRA: a low-rank update beside a frozen linear map."""

import flax.linen as nn
import flax.traverse_util
import jax.numpy as jnp

from luthier.models.matmul import matmul
from luthier.models.remat import saved
from luthier.models.transformer import Linear
from luthier.tuners.tuner import Tuner


def lora(
    *,
    rank: int = 16,
    alpha: float = 32.0,
    rslora: bool = False,
    patterns: tuple = ("layers/attention/[qkvo]", "layers/mlp/(gate|up|down)"),
    collection: str = "lora",
) -> Tuner:
    """y = x W + s · (x A) B, with A `[in, rank]` and B `[rank, out]`; s = alpha / rank.

    A starts as PEFT's does, uniform in ±1/sqrt(in) (Kaiming uniform with a = sqrt 5), and B as zero,
    so that training starts at the frozen model.

    Args:
      rslora: s = alpha / sqrt(rank), which keeps the update's size steady in the rank.
      patterns: regular expressions of site paths; each must match a linear map.

    Source: arXiv 2106.09685; rank-stabilised scaling: arXiv 2312.03732.
    """
    scale = alpha / rank**0.5 if rslora else alpha / rank

    def transform(site: Linear, call, args, kwargs):
        (x,) = args
        a_init = nn.with_partitioning(
            nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"), (site.in_axis, None)
        )
        b_init = nn.with_partitioning(nn.initializers.zeros, (None, site.out_axis))
        rng = site.make_rng("params") if site.is_initializing() else None
        a = site.variable(collection, "a", a_init, rng, (x.shape[-1], rank)).value
        b = site.variable(collection, "b", b_init, rng, (rank, site.features)).value
        low = scale * saved(matmul(x, a, site.sharder, (site.in_axis, None)))
        return call(*args, **kwargs) + matmul(low, b, site.sharder, (None, site.out_axis))

    def merge(params, variables):
        flat = flax.traverse_util.flatten_dict(params)
        low = flax.traverse_util.flatten_dict(variables)
        for path in {path[:-1] for path in low}:
            kernel = flat[(*path, "kernel")]
            update = scale * jnp.einsum("...ir,...ro->...io", low[(*path, "a")], low[(*path, "b")])
            flat[(*path, "kernel")] = (kernel + update).astype(kernel.dtype)
        return flax.traverse_util.unflatten_dict(flat)

    return Tuner("lora", collection, tuple(patterns), Linear, transform, merge)

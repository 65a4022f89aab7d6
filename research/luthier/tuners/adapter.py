"""Bottleneck adapters: a small MLP behind or beside attention and MLP."""

import functools

import flax.linen as nn
import jax

from luthier.errors import LuthierError, near
from luthier.models.matmul import matmul
from luthier.models.remat import saved
from luthier.models.transformer import MLP, Attention
from luthier.tuners.tuner import Tuner

PLACEMENTS = ("sequential", "parallel")
ACTIVATIONS = {
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "none": lambda x: x,
}


def adapter(
    *,
    size: int = 64,
    placement: str = "sequential",
    scale: float = 1.0,
    activation: str = "relu",
    patterns: tuple = ("layers/attention", "layers/mlp"),
    collection: str = "adapter",
) -> Tuner:
    """h ← h + scale · (f(z W_down + b_down) W_up + b_up), with h what a branch gives to the residual stream.

    W_down is `[embed, size]` and W_up `[size, embed]`. W_down starts uniform in ±1/sqrt(embed), the
    rest at 0, hence the model at the frozen one.

    Args:
      placement: `sequential`, z = h; `parallel`, z = what the branch reads (after its norm).
      activation: f: `relu`, `gelu`, `silu` or `none`.
      patterns: sequential behind both branches is Houlsby's adapter, behind `layers/mlp` alone
        Pfeiffer's; parallel to `layers/mlp`, with a scale of 4, is that of the MAM adapter.

    Source: arXiv 1902.00751, section 2.1; Pfeiffer: arXiv 2005.00247; parallel and scaled:
    arXiv 2110.04366, section 3.3 and table 1.
    """
    if placement not in PLACEMENTS:
        raise LuthierError(f"unknown placement {placement!r}", where="tuner adapter", mend=near(placement, PLACEMENTS))
    if activation not in ACTIVATIONS:
        mend = near(activation, ACTIVATIONS)
        raise LuthierError(f"unknown activation {activation!r}", where="tuner adapter", mend=mend)

    def transform(site: Attention | MLP, call, args, kwargs):
        result = call(*args, **kwargs)
        h, *more = result if isinstance(result, tuple) else (result,)
        h = h + scale * bottleneck(site, h if placement == "sequential" else args[0])
        return (h, *more) if more else h

    def bottleneck(site, z):
        width = z.shape[-1]
        rng = site.make_rng("params") if site.is_initializing() else None
        spread = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")

        def variable(name, start, shape, *axes):
            return site.variable(collection, name, nn.with_partitioning(start, axes), rng, shape).value

        w_down = variable("w_down", spread, (width, size), "embed", None)
        b_down = variable("b_down", nn.initializers.zeros, (size,), None)
        w_up = variable("w_up", nn.initializers.zeros, (size, width), None, "embed")
        b_up = variable("b_up", nn.initializers.zeros, (width,), None)
        inner = saved(matmul(z, w_down, site.sharder, ("embed", None))) + b_down.astype(z.dtype)
        return matmul(ACTIVATIONS[activation](inner), w_up, site.sharder, (None, "embed")) + b_up.astype(z.dtype)

    return Tuner("adapter", collection, tuple(patterns), (Attention, MLP), transform)

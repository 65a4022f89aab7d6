"""(IA)³: learned vectors that rescale activations."""

import functools

import flax.linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from luthier.errors import LuthierError
from luthier.models.transformer import Hook, Linear
from luthier.tuners.tuner import Tuner

# Hooks with the linear map that reads them and nothing else.
_BEHIND = {"layers/mlp/inner": "down", "layers/attention/heads": "o"}


def ia3(
    *,
    patterns: tuple = ("layers/attention/[kv]", "layers/mlp/inner"),
    collection: str = "ia3",
) -> Tuner:
    """y ← l ⊙ y, with a vector l `[features]` a site that starts at 1, hence at the frozen model.

    By default l rescales keys, values and what goes into the MLP's last product; other linear maps
    and hooks can be named. Merging is exact: y's map takes l into its columns (and bias), a hook's
    l goes into the rows of the map behind it.

    Args:
      patterns: regular expressions of site paths; each must match a linear map or a hook.

    Source: arXiv 2205.05638, section 3.3.
    """

    def transform(site: Linear | Hook, call, args, kwargs):
        y = call(*args, **kwargs)
        axes = (site.out_axis,) if isinstance(site, Linear) else site.axes
        start = nn.with_partitioning(nn.initializers.ones, axes)
        scale = site.variable(collection, "scale", start, None, y.shape[2:]).value
        return y * scale.astype(y.dtype)

    def merge(variables, frozen, rows=False):
        del frozen
        flat = flatten_dict(variables["params"])
        for (*site, _), scale in flatten_dict(variables[collection]).items():
            behind = _BEHIND.get("/".join(site))
            if bool(behind) != rows:
                continue
            linear = (*site[:-1], behind) if behind else tuple(site)
            if (*linear, "kernel") not in flat:
                raise LuthierError(f"no linear map takes in the vector of {'/'.join(site)}", where="tuner ia3")
            kernel, bias = flat[(*linear, "kernel")], flat.get((*linear, "bias"))
            scale = scale.reshape(*kernel.shape[:-2], -1)
            wide = scale[..., :, None] if behind else scale[..., None, :]
            flat[(*linear, "kernel")] = (kernel * wide).astype(kernel.dtype)
            if bias is not None and not behind:
                flat[(*linear, "bias")] = (bias * scale).astype(bias.dtype)
        return unflatten_dict(flat)

    rows = functools.partial(merge, rows=True)
    return Tuner("ia3", collection, tuple(patterns), (Linear, Hook), transform, merge, rows)

"""The device mesh: four named axes, of which any may be 1."""

import math

import jax
import numpy as np
from jax.sharding import Mesh

from luthier.errors import LuthierError

AXES = ("data", "fsdp", "tensor", "sequence")


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, devices=None) -> Mesh:
    """A mesh over all devices (or the given ones); one size may be -1 and takes what is left.

    Raises:
      LuthierError: when the sizes do not multiply to the number of devices.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "sequence": sequence}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1:
        raise LuthierError("only one size may be -1", where="mesh", mend=f"Fix all but one of {', '.join(free)}")
    if any(size < 1 for size in sizes.values() if size != -1):
        raise LuthierError(f"sizes must be positive or -1, got {sizes}", where="mesh")
    if devices.size % fixed or (not free and fixed != devices.size):
        raise LuthierError(
            f"{' x '.join(f'{a}={n}' for a, n in sizes.items() if n != -1)} does not divide {devices.size} devices",
            where="mesh",
            mend=f"Choose sizes whose product is {devices.size}, or set one to -1",
        )
    if free:
        sizes[free[0]] = devices.size // fixed
    return Mesh(devices.reshape([sizes[axis] for axis in AXES]), AXES)

"""Floating-point operations of a traced program: those of its matrix products."""

import math

import jax
from jax.extend import core


def matmul_flops(jaxpr: core.ClosedJaxpr, *, kernel_share: float = 1.0) -> float:
    """2 · m · n · k over every matrix product that one run executes, recomputation included, over all devices.

    Args:
      jaxpr: of the program before it is partitioned, such as `jax.jit(f).trace(*args).jaxpr`.
      kernel_share: of a Pallas kernel's grid, the share that is not skipped (`causal_share`, the mean of all layers:
        of branches the one with the whole grid counts).
    """
    return _count(jaxpr.jaxpr, kernel_share)


def causal_share(length: int, window: int | None = None, tile: int = 512) -> float:
    """Of the square of tiles over queries and keys, what a causal kernel computes.

    Args:
      length: of a row, in tokens.
      window: a query attends to the last so many tokens, itself included; None to all.
      tile: the kernel's, where it divides the length.
    """
    tile = math.gcd(length, tile)
    tiles = length // tile
    back = tiles - 1 if window is None else min(tiles - 1, -(-(window - 1) // tile))
    return sum(min(row, back) + 1 for row in range(tiles)) / tiles**2


def _count(jaxpr, share: float) -> float:
    return sum(_one(equation, share) for equation in jaxpr.eqns)


def _one(equation, share: float) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    times = 1
    if name == "scan":
        times = params["length"]
    elif name == "shard_map":
        if not equation.outvars:  # its results were saved for the backward pass; the compiler drops what is left of it
            return 0.0
        manual = params.get("newly_manual_axes", params.get("manual_axes"))
        times = math.prod(params["mesh"].shape[axis] for axis in manual)
    elif name == "pallas_call":
        times = share * math.prod(params["grid_mapping"].grid)
    inner = [_count(sub, share) for sub in _inner(params)]
    if not inner:
        return 0.0
    return times * (max(inner) if name == "cond" else sum(inner))


def _inner(params):
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            one = getattr(one, "jaxpr", one)
            if isinstance(one, core.Jaxpr) or isinstance(one, jax.core.Jaxpr if hasattr(jax.core, "Jaxpr") else ()):
                yield one

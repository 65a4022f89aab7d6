"""Floating-point operations of a traced program: those of its matrix products."""

import math

import jax
from jax.extend import core


def matmul_flops(jaxpr: core.ClosedJaxpr, *, kernel_share: float = 1.0) -> float:
    """2 · m · n · k over every matrix product that one run executes, recomputation included, over all devices.

    Args:
      jaxpr: of the program before it is partitioned, such as `jax.jit(f).trace(*args).jaxpr`.
      kernel_share: of a Pallas kernel's grid, the share that is not skipped (0.5 for causal attention).
    """
    return _count(jaxpr.jaxpr, kernel_share)


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

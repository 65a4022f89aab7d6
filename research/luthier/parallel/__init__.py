"""Meshes, sharding rules and the start of several processes."""

from luthier.parallel.collectives import reduce_scatter, sum_parts
from luthier.parallel.mesh import AXES, make_inference_mesh, make_mesh
from luthier.parallel.sharding import BATCH_AXES, RULES, Axis, Sharder, make_sharder, spread

__all__ = [
    "AXES",
    "BATCH_AXES",
    "RULES",
    "Axis",
    "Sharder",
    "make_inference_mesh",
    "make_mesh",
    "make_sharder",
    "reduce_scatter",
    "spread",
    "sum_parts",
]

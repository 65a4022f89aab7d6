"""Sharding by logical axis names: one rule table says which mesh axes an array axis goes to."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from luthier.errors import LuthierError, near
from luthier.parallel.mesh import AXES, torus_sizes

BATCH_AXES = ("data", "fsdp")
Axis = str | tuple[str, ...] | None  # what a dimension is, by name

RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", BATCH_AXES),
    ("time", ("sequence",)),
    ("embed", ("fsdp", "sequence")),
    ("vocab", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
)


@dataclasses.dataclass(frozen=True)
class Sharder:
    """A mesh and the rules that map logical axes to it; without a mesh it leaves arrays alone.

    An axis is split over as many of its rule's mesh axes as divide it evenly (attention axes: by whole
    heads), first to last; a mesh axis serves the first logical axis of an array that asks for it. An axis
    of several names, such as ("mlp", "embed"), is split by the rule of each, one within the other.

    Attributes:
      units: indivisible counts of flattened axes, such as ("heads", 9).
    """

    mesh: Mesh | None = None
    rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES
    units: tuple[tuple[str, int], ...] = ()

    def device(self) -> jax.Device:
        """One of the devices that this computes on, or will."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    def size(self, axis: str) -> int:
        """Parts of a mesh axis."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def torus(self, axis: str) -> tuple[int, ...]:
        """Sizes of the lines of the torus that a mesh axis runs through, outermost first."""
        return torus_sizes(self.mesh, axis)

    def spec(self, axes: Sequence[Axis], shape: Sequence[int]) -> PartitionSpec:
        """Where each dimension of an array with these logical axes goes."""
        rules, units, used, parts = dict(reversed(self.rules)), dict(self.units), set(), []
        for names, size in zip(axes, shape):
            part = ()
            for name in spread(names):
                wanted = tuple(m for m in rules.get(name, ()) if m not in used and self.mesh.shape[m] > 1)
                while math.gcd(units.get(name, size), size) % math.prod(self.mesh.shape[m] for m in wanted):
                    wanted = wanted[:-1]
                used.update(wanted)
                part += wanted
                size //= math.prod(self.mesh.shape[m] for m in wanted)
            parts.append(part if len(part) > 1 else part[0] if part else None)
        return PartitionSpec(*parts)

    def sharding(self, axes: Sequence[Axis], shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(axes, shape))

    def __call__(self, x: jax.Array, *axes: Axis) -> jax.Array:
        """Constrains an activation with these logical axes."""
        if self.mesh is None or self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    def tree(self, boxed: Any) -> Any:
        """Shardings of a tree whose leaves carry logical axes (`nn.Partitioned`) or none."""

        def one(leaf):
            if isinstance(leaf, nn.Partitioned):
                return self.sharding(leaf.names, leaf.value.shape)
            return NamedSharding(self.mesh, PartitionSpec())

        return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))

    def batch(self) -> NamedSharding:
        """Sharding of `[batch, time]` arrays."""
        return NamedSharding(self.mesh, PartitionSpec(BATCH_AXES, "sequence"))

    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def make_sharder(mesh: Mesh, *, num_heads: int, num_kv_heads: int, rules: Sequence[tuple] = ()) -> Sharder:
    """The sharder of a model on a mesh.

    Args:
      rules: pairs (logical axis, mesh axis, tuple of them, or None) that go before the defaults.

    Raises:
      LuthierError: if heads do not divide over `tensor`, or a rule names an unknown mesh axis.
    """
    tensor = mesh.shape["tensor"]
    if num_heads % tensor or (num_kv_heads % tensor and tensor % num_kv_heads):
        raise LuthierError(
            f"tensor={tensor} divides neither into {num_heads} query heads nor over {num_kv_heads} key/value heads",
            where="mesh.tensor",
            mend=f"Use a divisor of {num_heads} that divides {num_kv_heads} or is a multiple of it",
        )
    return Sharder(mesh, (*_normal(rules), *RULES), (("heads", num_heads), ("kv_heads", num_kv_heads)))


def _normal(rules: Sequence[tuple]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    normal = []
    for logical, target in rules:
        target = (target,) if isinstance(target, str) else tuple(target or ())
        for axis in target:
            if axis not in AXES:
                raise LuthierError(f"unknown mesh axis {axis!r}", where="mesh.rules", mend=near(axis, AXES))
        normal.append((logical, target))
    return tuple(normal)


def spread(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of one dimension of a `PartitionSpec` or of logical axes, the outermost first."""
    return () if part is None else (part,) if isinstance(part, str) else part


def place(tree: Mapping, shardings: Mapping) -> Mapping:
    """Puts a tree of host or device arrays where the shardings say."""
    return jax.tree.map(jax.device_put, tree, shardings)

"""The training state, and how a model's variables are cut into trained and frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict

from luthier.errors import LuthierError, near
from luthier.parallel import Sharder
from luthier.tuners import Bound

Variables = Mapping[str, Any]


@flax.struct.dataclass
class TrainState:
    """Everything an update changes; a checkpoint holds exactly this. Frozen weights stay outside.

    Attributes:
      step: int32 scalar, updates done in this stage.
      trainable: the trained collections of the model's variables.
      opt_state: of the optax transformation over `trainable`.
      ema: moving average of `trainable`, or None.
      loss_scale: of float16 training, or None.
    """

    step: jax.Array
    trainable: Variables
    opt_state: Any
    ema: Variables | None = None
    loss_scale: "LossScale | None" = None


@flax.struct.dataclass
class LossScale:
    """The factor that keeps float16 gradients above underflow.

    It halves when a gradient overflows, and doubles after 2,000 steps without
    ("Mixed Precision Training", arXiv 1710.03740, and NVIDIA's dynamic scheme).

    Attributes:
      factor: float32 scalar.
      steps: int32 scalar, updates since the last change.
    """

    factor: jax.Array
    steps: jax.Array

    @classmethod
    def start(cls) -> "LossScale":
        return cls(jnp.float32(2**15), jnp.int32(0))

    def after(self, overflowed: jax.Array) -> "LossScale":
        doubles = ~overflowed & (self.steps >= 1999)
        factor = jnp.where(overflowed, self.factor / 2, jnp.where(doubles, self.factor * 2, self.factor))
        return LossScale(factor, jnp.where(overflowed | doubles, 0, self.steps + 1))


def split(variables: Variables, train: Sequence[str]) -> tuple[dict, dict]:
    """(trainable, frozen) collections; trainable leaves become float32 at least.

    Raises:
      LuthierError: if a collection to train does not exist.
    """
    for name in train:
        if name not in variables:
            raise LuthierError(f"no collection {name!r} to train", where="stage.train", mend=near(name, variables))
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))  # noqa: E731
    trainable = {name: jax.tree.map(wide, tree) for name, tree in variables.items() if name in train}
    return trainable, {name: tree for name, tree in variables.items() if name not in train}


def init_variables(bound: Bound, sharder: Sharder, seed: int, known: Variables) -> dict[str, Any]:
    """All variables of a bound model: the known collections as given, the others freshly initialised.

    Initial values depend on `seed`, and where a tuner says so on the weights, not on the mesh.
    """
    rng = jax.random.key(seed)
    boxed = jax.eval_shape(bound.init, rng)
    fresh = [name for name in boxed if name not in known]
    shardings = {name: sharder.tree(boxed[name]) for name in fresh}
    made = jax.jit(lambda rng: {name: nn.unbox(bound.init(rng)[name]) for name in fresh}, out_shardings=shardings)(rng)
    variables = {name: known[name] if name in known else made[name] for name in boxed}
    if not any(tuner.start and tuner.collection in fresh for tuner in bound.tuners):
        return variables
    # One product after another: in one program their exchanges wait for one another for ever on simulated devices.
    started = bound.start(variables, fresh)
    return {**variables, **jax.device_put({name: started[name] for name in fresh}, shardings)}


def init_state(
    trainable: Variables,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    *,
    ema: bool = False,
    loss_scale: bool = False,
) -> TrainState:
    """The state before the first update; moments are sharded like their weights."""
    shardings = _optimizer_shardings(trainable, optimizer, sharder)
    return TrainState(
        step=jax.device_put(jnp.int32(0), sharder.replicated()),
        trainable=trainable,
        opt_state=jax.jit(optimizer.init, out_shardings=shardings)(trainable),
        ema=jax.tree.map(jnp.copy, trainable) if ema else None,
        loss_scale=jax.device_put(LossScale.start(), sharder.replicated()) if loss_scale else None,
    )


def abstract_state(
    trainable: Variables,
    optimizer: optax.GradientTransformation,
    sharder: Sharder,
    *,
    ema: bool = False,
    loss_scale: bool = False,
) -> TrainState:
    """The state's shapes, dtypes and shardings, from arrays or `ShapeDtypeStruct`s with shardings."""
    abstract = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)  # noqa: E731
    weights = jax.tree.map(lambda x: abstract(x, x.sharding), trainable)
    moments = jax.eval_shape(optimizer.init, trainable)
    return TrainState(
        step=jax.ShapeDtypeStruct((), jnp.int32, sharding=sharder.replicated()),
        trainable=weights,
        opt_state=jax.tree.map(abstract, moments, _optimizer_shardings(trainable, optimizer, sharder)),
        ema=weights if ema else None,
        loss_scale=jax.tree.map(lambda x: abstract(x, sharder.replicated()), jax.eval_shape(LossScale.start))
        if loss_scale
        else None,
    )


def _optimizer_shardings(trainable, optimizer, sharder: Sharder):
    """An optimiser leaf at the path of a weight and of its shape, or of some of its layers, is its moment; the rest is
    replicated."""
    weights = flatten_dict(trainable)

    def sharding(path, leaf):
        keys = tuple(part.key for part in path if isinstance(part, jax.tree_util.DictKey))
        weight = weights.get(keys)
        is_moment = weight is not None and weight.ndim == leaf.ndim > 0
        same = is_moment and (weight.shape == leaf.shape or ("layers" in keys and weight.shape[1:] == leaf.shape[1:]))
        return weight.sharding if same else sharder.replicated()

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, trainable))

"""Which meshes, micro-batches and remat of a slice fit a recipe: estimated all, compiled the most promising."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from luthier import config as configs
from luthier.errors import LuthierError
from luthier.models import ModelConfig, splash
from luthier.parallel import AXES
from luthier.training import aot
from luthier.training.estimate import Estimate, Layers, Work, estimate
from luthier.training.run import config_sharder, make_model
from luthier.training.stages import resolve_stages
from luthier.training.step import check_batch

# Those that keep more come later. `none` computes no less than `dots`, and keeps more.
REMATS = ("full", "dots")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh over all chips of a slice, micro-batches and remat, and what they should need of a chip's capacity."""

    mesh: Mapping[str, int]
    micro_batches: int
    estimate: Estimate
    capacity: float
    remat: str = "full"


def candidates(
    config: ConfigDict, shape: ModelConfig, topology: str, *, stage: int = 0, weights_dtype: str = "bfloat16"
) -> list[Candidate]:
    """Every mesh that divides heads, rows and time, with all micro-batches that divide the rows, and `REMATS`.

    Raises:
      LuthierError: if there is none.
    """
    place, chosen = aot.describe(topology), config.stages[stage]
    served = [mesh for mesh in meshes(len(place.devices)) if _serves(config, shape, place.devices, stage, mesh)]
    if not served:
        raise LuthierError(
            f"no mesh over {len(place.devices)} chips divides {shape.num_heads} heads, {chosen.batch_size} rows of "
            f"{chosen.sequence_length} tokens",
            where="--search",
            mend="Use a stage.batch_size that more of the chips divide",
        )
    layers, work = Layers.of(shape), work_of(config, shape, place.devices, stage, weights_dtype)

    def needs(mesh: Mapping[str, int], count: int, remat: str) -> Estimate:
        return estimate(layers, dataclasses.replace(work, remat=remat), mesh, place, micro_batches=count)

    return [
        Candidate(mesh, count, needs(mesh, count, remat), place.chip.capacity, remat)
        for mesh in served
        for count in divisors(chosen.batch_size // (mesh["data"] * mesh["fsdp"]))
        for remat in REMATS
    ]


def in_order(
    tried: Sequence[Candidate], compiled: Callable[[Candidate], aot.Check], *, most: int
) -> Iterator[tuple[Candidate, aot.Check]]:
    """Compiles candidates, those that should fit with the best bound first, and yields each as it is done.

    Of a mesh that fits, what has no better bound is left out; of one that does not, what keeps as much (no more
    micro-batches, nothing else computed again), and candidates that should need as much memory wait. Ends early where
    something fits and nothing left should.

    Args:
      most: compilations.
    """
    left, fits, capacity = list(tried), False, tried[0].capacity
    for _ in range(most):
        if not left or (fits and all(one.estimate.peak > 1.25 * capacity for one in left)):
            return
        one = min(left, key=functools.partial(_promise, capacity=capacity))
        left.remove(one)
        check = compiled(one)
        yield one, check
        fits |= check.fits
        if not check.fits:
            capacity = min(capacity, one.estimate.peak)
        left = [other for other in left if other.mesh != one.mesh or not _settled(other, one, check.fits)]


def _settled(other: Candidate, one: Candidate, fits: bool) -> bool:
    """Whether what became of `one` answers for `other` on the same mesh."""
    if fits:
        return _rounded(other.estimate.seconds) >= _rounded(one.estimate.seconds)
    return other.micro_batches <= one.micro_batches and REMATS.index(other.remat) >= REMATS.index(one.remat)


def ranked(done: Sequence[tuple[Candidate, aot.Check]]) -> list[tuple[Candidate, aot.Check]]:
    """What fits before what does not, the best bound first; of equal bounds (1%) the one that receives less."""

    def key(pair):
        candidate, check = pair
        if not check.fits:
            return (1, check.peak or math.inf, 0.0)
        network = check.bounds.get("network", candidate.estimate.bounds.get("network", 0.0))
        return (0, _rounded(check.seconds), network)

    return sorted(done, key=key)


def changed(
    config: ConfigDict, stage: int, mesh: Mapping[str, int], micro_batches: int, remat: str | None = None
) -> ConfigDict:
    """The recipe on another mesh."""
    other = configs.from_json(configs.to_json(config))
    other.mesh.update(mesh)
    other.stages[stage].micro_batches = micro_batches
    other.model.remat = remat or config.model.remat
    return other


def words(candidate: Candidate, stage: int = 0) -> str:
    """What makes a recipe such a one on the command line."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in candidate.mesh.items()]
    sizes += [f"--config.stages[{stage}].micro_batches={candidate.micro_batches}"]
    return " ".join([*sizes, f"--config.model.remat={candidate.remat}"])


def meshes(chips: int) -> Iterator[dict[str, int]]:
    """Every way to write a number of chips as a product over the mesh axes."""
    for data in divisors(chips):
        for fsdp in divisors(chips // data):
            for tensor in divisors(chips // data // fsdp):
                yield dict(zip(AXES, (data, fsdp, tensor, chips // data // fsdp // tensor)))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def work_of(config: ConfigDict, shape: ModelConfig, devices, stage: int, weights_dtype: str) -> Work:
    """What one stage's step has to do, from the shapes of its state."""
    chosen = config.stages[stage]
    sharder = config_sharder(changed(config, stage, dict.fromkeys(AXES, 1), 1), shape, devices[:1])
    _, (state, frozen, _), _ = aot.abstract_step(config, chosen, shape, sharder, weights_dtype)
    resolved = resolve_stages(config, make_model(config, shape, sharder))[stage]
    size = lambda tree: sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))  # noqa: E731
    tuners = {name: tree for name, tree in state.trainable.items() if name != "params"}
    return Work(
        rows=chosen.batch_size,
        length=chosen.sequence_length,
        state_bytes=size((state.trainable, state.opt_state, state.ema)),
        frozen_bytes=size(frozen),
        remat=config.model.remat,
        trains_model="params" in state.trainable,
        tuner=sum(leaf.size for leaf in jax.tree.leaves(tuners)),
        activation_bytes=jnp.dtype(config.model.compute_dtype).itemsize,
        compares=resolved.reference_in_step is not None,
        makes_logits_twice=resolved.batching.answers > 0 and "params" in state.trainable,
    )


def _serves(config: ConfigDict, shape: ModelConfig, devices, stage: int, mesh: Mapping[str, int]) -> bool:
    """Whether a mesh divides what it must."""
    chosen = config.stages[stage]
    try:
        sharder = config_sharder(changed(config, stage, mesh, 1), shape, devices)
        check_batch(chosen.batch_size, 1, sharder)
    except LuthierError:
        return False
    # XLA's attention, which takes any length, needs memory that grows with its square.
    return mesh["sequence"] == 1 or chosen.sequence_length % splash.multiple(sharder) == 0


def _promise(one: Candidate, capacity: float) -> tuple:
    peak, bounds = one.estimate.peak, one.estimate.bounds
    if peak >= capacity:
        return (1, peak, one.micro_batches)
    computes = _rounded(bounds["compute"])
    return (0, _rounded(one.estimate.seconds), one.micro_batches, computes, bounds.get("network", 0.0), peak)


def _rounded(seconds: float) -> float:
    """To 1%."""
    return round(math.log(seconds) * 100)

"""The real train step, compiled for a TPU slice that is not here: does it fit, and what bounds its speed?

libtpu compiles for a described slice on any x86 Linux machine; nothing runs. Peak memory and
collectives are the compiler's. Times are roofline bounds: no step can be faster, most are slower.
"""

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from luthier.errors import LuthierError
from luthier.models import ModelConfig
from luthier.parallel import Sharder
from luthier.training.flops import causal_share, matmul_flops
from luthier.training.hlo import Collective, collectives
from luthier.training.run import config_sharder, make_model, model_flops_per_token
from luthier.training.stages import make_stage_step, make_update, resolve_stages
from luthier.training.state import TrainState, Variables, abstract_state
from luthier.training.step import check_batch, jit_step

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU generation whose chip is one device.

    Attributes:
      topologies: slices whose description libtpu has.
      capacity: bytes of memory that the compiler lets a program use.
      flops: bfloat16 operations a second.
      memory_bandwidth: bytes a second.
      link_bandwidth: bytes a second over one link in one direction; a chip has one link to each neighbour.
      ring: an axis of the slice closes to a ring where this divides its length.
      dollars: on demand, a chip and hour, United States.
    """

    topologies: tuple[str, ...]
    capacity: float
    flops: float
    memory_bandwidth: float
    link_bandwidth: float
    ring: int
    dollars: float


# Speeds: jax-ml.github.io/scaling-book, "How to Think About TPUs". Capacity: what libtpu 0.0.51 allows.
# Prices: lists of 2025, US regions, not verified since (cloud.google.com/tpu/pricing); `--prices` replaces them.
CHIPS: Mapping[str, Chip] = {
    "v5e": Chip(
        ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"), 15.75 * GIB, 1.97e14, 8.1e11, 5e10, 16, 1.20
    ),
    "v5p": Chip(
        ("1x1x1", "2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "8x8x8"), 95.73 * GIB, 4.59e14, 2.8e12, 1e11, 4, 4.20
    ),
    "v6e": Chip(("1x1", "2x2", "4x4", "8x8", "16x16"), 31.24 * GIB, 9.2e14, 1.6e12, 1e11, 16, 2.70),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """TPU slices: their shape, such as `4x4`, number, generation, and devices where libtpu describes them."""

    shape: str
    count: int
    chip: Chip
    devices: tuple[jax.Device, ...] = ()

    def network_bandwidth(self) -> float:
        """Bytes a second that the worst-placed chip can receive: a link an axis, two where it closes to a ring."""
        sizes = [int(n) for n in self.shape.split("x")]
        links = sum((2 if size % self.chip.ring == 0 else 1) for size in sizes if size > 1)
        return links * self.chip.link_bandwidth


def describe(topology: str) -> Slice:
    """The slices of a name such as `v5e:4x4`, or `2*v5e:16x16` for two of them.

    Raises:
      LuthierError: for an unknown slice, or without libtpu.
    """
    count, name = re.fullmatch(r"(?:(\d+)\*)?(.*)", topology).groups()
    known = [f"{generation}:{shape}" for generation, chip in CHIPS.items() for shape in chip.topologies]
    if name not in known or count == "0":
        mend = f"Known: {', '.join(known)}; 2*v5e:16x16 is two slices"
        raise LuthierError(f"unknown topology {topology!r}", where="--topology", mend=mend)
    # This machine has no TPU to take from another process, nor a metadata server or other hosts to ask.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    try:
        more = {} if count is None else {"num_slices": int(count)}
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **more).devices
    except (ImportError, RuntimeError, ValueError, jax.errors.JaxRuntimeError) as error:
        raise LuthierError(
            f"libtpu gives no description of {topology}: {str(error).splitlines()[0]}",
            where="--topology",
            mend="pip install libtpu (Linux, x86-64)",
        ) from error
    generation, _, shape = name.partition(":")
    return Slice(shape, int(count or 1), CHIPS[generation], tuple(devices))


@dataclasses.dataclass(frozen=True)
class Check:
    """What one compilation says; bytes and operations are a chip's.

    Attributes:
      peak: bytes of memory at once; None where the compiler refused.
      refusal: what it said then.
      arguments: bytes of what is held, as the compiler lays it out.
      temporaries: bytes of everything else, most of them not at one time.
      held: bytes of what lies there all the time, by kind.
      collectives: None where the program's text can't be had.
      bounds: {what: seconds} that a step needs at least.
      price: dollars a chip and hour.
      remat: as `model.remat`.
    """

    topology: str
    mesh: dict[str, int]
    tokens: int
    micro_batches: int
    compile_seconds: float
    capacity: float
    peak_flops: float
    peak: int | None = None
    refusal: str | None = None
    arguments: int = 0
    temporaries: int = 0
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flops: float = 0.0
    model_flops: float = 0.0
    collectives: tuple[Collective, ...] | None = None
    bounds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    price: float = 0.0
    remat: str = ""

    @property
    def fits(self) -> bool:
        return self.peak is not None and self.peak <= self.capacity

    @property
    def seconds(self) -> float:
        """The largest bound: no step is faster."""
        return max(self.bounds.values())

    @property
    def dollars(self) -> float:
        """Of 1,000 steps at that bound."""
        return 1000 * self.seconds / 3600 * math.prod(self.mesh.values()) * self.price

    @property
    def mfu(self) -> float:
        """Model-FLOP utilisation at that bound, as `time/mfu` counts it: recomputation is no work."""
        return self.model_flops / self.peak_flops / self.seconds


def check(
    config: ConfigDict,
    shape: ModelConfig,
    topology: str,
    *,
    stage: int = 0,
    weights_dtype: str = "bfloat16",
    prices: Mapping[str, float] | None = None,
) -> Check:
    """Compiles one stage's step of a recipe for a slice.

    Args:
      shape: of the model; no weights are read.
      weights_dtype: of frozen weights; trained ones are float32.
      prices: {generation: dollars a chip and hour} that replace the table's.
    """
    place, chosen = describe(topology), config.stages[stage]
    sharder = config_sharder(config, shape, place.devices)
    check_batch(chosen.batch_size, chosen.micro_batches, sharder)
    step, arguments, model_flops = abstract_step(config, chosen, shape, sharder, weights_dtype)
    start = time.perf_counter()
    traced = step.trace(*arguments)
    base = Check(
        topology=topology,
        mesh=dict(sharder.mesh.shape),
        tokens=chosen.batch_size * chosen.sequence_length,
        micro_batches=chosen.micro_batches,
        compile_seconds=0.0,
        capacity=place.chip.capacity,
        peak_flops=place.chip.flops,
        held=_held(*arguments),
        remat=config.model.remat,
    )
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = re.search(
            r"Used [\d.]+\w of [\d.]+\w hbm|\S+ \([\d.]+\w\) exceeds available HBM \([\d.]+\w\)", str(error)
        )
        seconds = time.perf_counter() - start
        return dataclasses.replace(base, refusal=said[0] if said else str(error)[:300], compile_seconds=seconds)
    memory = compiled.memory_analysis()
    try:
        talk = tuple(collectives(compiled.as_text(), sharder.mesh.shape))
    except jax.errors.JaxRuntimeError:  # v5p with jax 0.10
        talk = None
    chips = sharder.mesh.size
    windows = [shape.sliding_window if local else None for local in shape.local_layers]
    share = sum(causal_share(chosen.sequence_length, window) for window in windows) / shape.num_layers
    flops = matmul_flops(traced.jaxpr, kernel_share=share) / chips
    moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
    bounds = {"compute": flops / place.chip.flops, "memory": moved / place.chip.memory_bandwidth}
    if talk is not None:
        bounds["memory"] += 2 * sum(one.output_bytes for one in talk) / place.chip.memory_bandwidth
        if place.network_bandwidth():
            bounds["network"] = sum(one.wire_bytes for one in talk) / place.network_bandwidth()
    generation = topology.rpartition("*")[2].partition(":")[0]
    return dataclasses.replace(
        base,
        compile_seconds=time.perf_counter() - start,
        peak=memory.peak_memory_in_bytes,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=flops,
        model_flops=model_flops / chips,
        collectives=talk,
        bounds=bounds,
        price=(prices or {}).get(generation, place.chip.dollars),
    )


def abstract_step(config: ConfigDict, stage: ConfigDict, shape: ModelConfig, sharder: Sharder, weights_dtype) -> tuple:
    """(the jitted step of a stage, its arguments as shapes with shardings, its model FLOPs)."""
    stages = resolve_stages(config, make_model(config, shape, sharder))
    resolved = next(one for one in stages if one.config.name == stage.name)
    bound, trained = resolved.bound, resolved.train
    boxed = jax.eval_shape(bound.init, jax.random.key(0))

    def abstract(leaf, sharding, dtype):
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)

    variables = {}
    for name, tree in boxed.items():
        dtype = jnp.float32 if name in trained else jnp.dtype(weights_dtype)
        variables[name] = jax.tree.map(
            lambda leaf, sharding, dtype=dtype: abstract(leaf, sharding, dtype), nn.unbox(tree), sharder.tree(tree)
        )
    trainable = {name: variables[name] for name in trained}
    update = make_update(stage, trainable)
    state = abstract_state(
        trainable,
        update.optimizer,
        sharder,
        ema=resolved.average is not None,
        loss_scale=config.model.compute_dtype == "float16",
    )
    rows = (stage.batch_size, stage.sequence_length)
    fields = {"tokens": jnp.int32, "targets": jnp.int32, "loss_weights": jnp.float32}
    fields |= {"segment_ids": jnp.int32, "positions": jnp.int32}
    if bound.prompt_tuner:
        fields["prompt_slots"] = jnp.int32
    if resolved.batching.answers:
        fields["scores"] = jnp.float32
    if stage.cache_reference:
        fields["reference_logps"] = jnp.float32
    batch = {name: jax.ShapeDtypeStruct(rows, dtype, sharding=sharder.batch()) for name, dtype in fields.items()}
    frozen = {name: tree for name, tree in variables.items() if name not in trained}
    beside = resolved.reference_in_step
    if beside and beside.has_own_variables(trained):
        compared = beside.bound
        boxed = jax.eval_shape(compared.init, jax.random.key(0))
        frozen["reference"] = jax.tree.map(
            lambda leaf, sharding: abstract(leaf, sharding, jnp.dtype(weights_dtype)),
            nn.unbox(boxed),
            compared.model.sharder.tree(boxed),
        )
    step = jit_step(make_stage_step(resolved, update), state, sharder.device().platform)
    return step, (state, frozen, batch), model_flops_per_token(resolved) * math.prod(rows)


def _held(state: TrainState, frozen: Variables, batch: Mapping[str, Any]) -> dict[str, int]:
    """A chip's bytes of a step's arguments, by kind, those of none left out."""

    def size(tree) -> int:
        leaves = jax.tree.leaves(tree)
        return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)

    kinds = {"trained weights": state.trainable, "optimizer state": state.opt_state, "average of weights": state.ema}
    kinds |= {"frozen weights": frozen, "batch": batch}
    return {kind: count for kind, tree in kinds.items() if (count := size(tree))}


def advice(check: Check) -> list[str]:
    """At most three things to try, the most useful first."""
    full, mesh = check.peak is None or check.peak > check.capacity, check.mesh
    lines = []
    if full and mesh["data"] > 1:
        lines.append("mesh.fsdp=-1 with mesh.data=1 spreads weights and moments over all chips")
    if full:
        lines.append(
            "model.remat='full' and more stage.micro_batches keep fewer activations, a larger slice fewer weights"
        )
        lines.append("optimizer.first_moment_dtype='bfloat16' saves 2 bytes a trained weight, a LoRA tuner 12")
    elif check.peak < 0.6 * check.capacity:
        lines.append("memory is left: a larger stage.batch_size, or model.remat='dots', computes less twice")
    if not full and max(check.bounds, key=check.bounds.get) == "network":
        lines.append("the network bounds this: more tokens a chip and step, or mesh.data > 1 if the weights fit twice")
    return lines[:3]


def to_json(check: Check) -> dict[str, Any]:
    """The figures as plain values, with the derived ones."""
    record = dataclasses.asdict(check) | {"fits": check.fits}
    if check.bounds:
        record |= {"bound_seconds": check.seconds, "bound_mfu": check.mfu, "dollars": check.dollars}
    return record

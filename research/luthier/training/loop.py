"""The loop of one stage: batches in, updates, metrics and checkpoints out.

The device never waits for the host: the step after a result is dispatched before the result is
read. The loop knows no method.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding

from luthier.data.batches import Batches, prefetch
from luthier.errors import LuthierError
from luthier.reporting.progress import Progress
from luthier.training.checkpoints import Checkpoints
from luthier.training.metrics import MetricsWriter, Throughput, peak_memory_gib
from luthier.training.profile import Profile
from luthier.training.signals import Preempted, Preemption
from luthier.training.state import TrainState, Variables
from luthier.training.step import Step

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, ready to run.

    Attributes:
      name: of the stage.
      steps: number of updates.
      first: steps that earlier stages took; metrics are numbered from there.
      step: the compiled step.
      batches: where rows come from.
      sharding: of a `[batch, time]` array.
      log_every, evaluate_every: cadence in steps; `evaluate_every` 0 means never.
      evaluate: `(state, step) -> metrics`, run during training.
    """

    name: str
    steps: int
    first: int
    step: Step
    batches: Batches
    sharding: NamedSharding
    log_every: int = 1
    evaluate_every: int = 0
    evaluate: Callable[[TrainState, int], Mapping[str, float]] | None = None


def run_stage(
    stage: Stage,
    state: TrainState,
    frozen: Variables,
    *,
    start: int,
    checkpoints: Checkpoints,
    writer: MetricsWriter,
    throughput: Throughput,
    preemption: Preemption,
    profile: Profile,
    failures: epath.Path,
) -> TrainState:
    """Trains from `start` to the last step and returns the final state, saved.

    Raises:
      Preempted: a signal asked to stop; the state is saved.
      LuthierError: a loss or gradient is not finite; the step, the batch and the state are saved.
    """
    tokens = stage.batches.tokens_before(start)
    feed = prefetch(lambda step: device_batch(stage.batches, step, stage.sharding), start)
    with (
        contextlib.closing(feed),
        Progress(stage.steps, stage.name, start=start, quiet=jax.process_index() != 0) as progress,
    ):

        def report(step: int, metrics: Mapping[str, Any], extra: Mapping[str, float]) -> dict[str, float]:
            nonlocal tokens
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not values.pop("is_finite"):
                raise _stopped(stage, step, state, failures, checkpoints)
            seen = int(values["num_tokens"])
            tokens += seen
            values |= {
                "stage": stage.name,
                "num_tokens": tokens,
                "epoch": stage.batches.epoch(step),
                **throughput.measure(1, seen),
                "memory/peak_gib": peak_memory_gib(),
                **extra,
            }
            if step % stage.log_every == 0 or extra or step == stage.steps:
                writer.write(stage.first + step, values)
                progress.update(step, values)
            return values

        pending = None
        throughput.restart()
        for step in range(start + 1, stage.steps + 1):
            profile.before(stage.first + step)
            state, metrics = stage.step(state, frozen, next(feed)[1])
            profile.after(stage.first + step, metrics)
            if pending:
                report(*pending, {})
            pending = (step, metrics)
            evaluates = stage.evaluate_every and (step % stage.evaluate_every == 0 or step == stage.steps)
            stops = preemption.requested(stage.first + step)
            if evaluates or stops or checkpoints.due(step) or step == stage.steps:
                extra = dict(stage.evaluate(state, stage.first + step)) if evaluates else {}
                values = report(*pending, extra)
                pending = None
                writer.flush()
                checkpoints.save(step, state, {k: v for k, v in values.items() if isinstance(v, float)})
                throughput.restart()
            if stops and step < stage.steps:
                checkpoints.wait()
                raise Preempted(stage.first + step)
    checkpoints.wait()
    return state


def device_batch(batches: Batches, step: int, sharding: NamedSharding) -> dict[str, jax.Array]:
    """The global batch of a step; each process reads only the rows that its devices hold."""
    shape = (batches.batch_size, batches.sequence_length)
    spans = [index[0].indices(shape[0])[:2] for index in sharding.addressable_devices_indices_map(shape).values()]
    first, last = min(start for start, _ in spans), max(stop for _, stop in spans)
    rows = batches.rows(step, first, last)

    def part(array: np.ndarray):
        def read(index):
            start, stop, _ = index[0].indices(shape[0])
            return array[start - first : stop - first, *index[1:]]

        return jax.make_array_from_callback((shape[0], *array.shape[1:]), sharding, read)

    return {name: part(array) for name, array in rows.items()}


def _stopped(
    stage: Stage, step: int, state: TrainState, failures: epath.Path, checkpoints: Checkpoints
) -> LuthierError:
    """Saves what is needed to look into a loss that is not finite, and says where it is."""
    place = failures / f"{stage.name}-step-{stage.first + step}"
    place.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        rows = stage.batches.rows(step - 1, 0, stage.batches.batch_size)
        with (place / "batch.npz").open("wb") as file:
            np.savez(file, **rows)
    checkpoints.wait()
    with Checkpoints(place / "state", keep_last=1) as kept:
        kept.save(int(state.step), state)
    return LuthierError(
        f"the loss or its gradient is not finite at step {stage.first + step}; its update was not applied",
        where=f"stage {stage.name}",
        mend=f"Batch and newest state are in {place}; a lower learning rate or clip_norm is the usual cure",
    )

"""The one train step: every objective, tuner and optimiser goes through it."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from luthier.errors import LuthierError
from luthier.objectives import Objective
from luthier.optim.masks import Mask, keep
from luthier.parallel import Sharder
from luthier.training.state import TrainState, Variables
from luthier.tuners import Bound

Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class Average(NamedTuple):
    """A moving average of what is trained: every so many steps, average ← decay · average + (1 − decay) · weights."""

    decay: float
    every: int = 1


Step = Callable[[TrainState, Variables, Batch], tuple[TrainState, Metrics]]
Transform = Callable[[Batch, jax.Array, jax.Array], Batch]

_TRANSFORMS = 1 << 30  # folded into the key of a step: the transforms' draws are their own


def make_step(
    bound: Bound,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    schedule: optax.Schedule | None = None,
    micro_batches: int = 1,
    clip_norm: float = 0.0,
    average: Average | None = None,
    reference_is_average: bool = False,
    transforms: Sequence[Transform] = (),
    mask: Mask | None = None,
    seed: int = 0,
) -> Step:
    """`(state, frozen, batch) -> (state, metrics)`, to be jitted with the state donated.

    The gradient is that of `sum(loss) / count(batch)` and the tuners' penalties, whatever the number
    of micro-batches. An update that is not finite, or of a batch without targets, changes nothing
    but `step`; the metric `is_finite` tells the first. Where the state has a loss scale, an
    overflowing gradient is part of finding it, and only a loss that is not finite counts.

    Args:
      schedule: the optimiser's learning rate by step, for the metric `learning_rate`.
      micro_batches: the batch is run in so many equal parts, one after another.
      clip_norm: largest global norm of the gradient; 0 switches clipping off.
      average: what `state.ema` is; None if the state has none.
      reference_is_average: whether the objective compares with the average, in place of frozen weights.
      transforms: `(batch, rng, step) -> batch`, applied in order before the loss.
      mask: of the weights that `optimizer` moves; the others' gradients are left out of everything.
      seed: random numbers are keyed by (seed, step, global token id).
    """
    gradients = make_gradients(bound, objective, micro_batches=micro_batches, transforms=transforms, seed=seed)

    def step(state: TrainState, frozen: Variables, batch: Batch) -> tuple[TrainState, Metrics]:
        scale = 1.0 if state.loss_scale is None else state.loss_scale.factor
        beside = {**frozen, "reference": {**frozen, **state.ema}} if reference_is_average else frozen
        loss, grads, metrics = gradients(state.trainable, beside, batch, state.step, scale)
        if mask is not None:
            grads = keep(grads, mask)
        norm = optax.tree.norm(grads)
        clip = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-30)) if clip_norm else 1.0
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        acts = is_finite & (objective.count(batch) > 0)

        def update(trainable, opt_state, mean):
            updates, opt_state = optimizer.update(jax.tree.map(lambda g: g * clip, grads), opt_state, trainable)
            update_norm = optax.tree.norm(updates).astype(norm.dtype)
            # One, but known after the norm: new weights replace the old ones in place only when nothing reads these.
            one = jnp.where(update_norm >= 0, 1, jnp.nan).astype(norm.dtype)
            trainable = jax.tree.map(lambda p, u: p + (u * one).astype(p.dtype), trainable, updates)
            if average is not None:
                share = jnp.where((state.step + 1) % average.every, 0.0, 1 - average.decay)
                mean = jax.tree.map(lambda a, p: ((1 - share) * a + share * p).astype(a.dtype), mean, trainable)
            return (trainable, opt_state, mean), update_norm

        # A branch rather than a select of every number: the update is made in place.
        (trainable, opt_state, mean), update_norm = jax.lax.cond(
            acts, update, lambda *old: (old, jnp.zeros_like(norm)), state.trainable, state.opt_state, state.ema
        )
        new = TrainState(state.step + 1, trainable, opt_state, mean)
        if state.loss_scale is not None:
            new = new.replace(loss_scale=state.loss_scale.after(~is_finite))
            metrics["loss_scale"] = scale
            is_finite = jnp.isfinite(loss) & (scale >= 1)
        if schedule is not None:
            metrics["learning_rate"] = jnp.asarray(schedule(state.step))
        metrics |= {
            "loss": loss,
            "grad_norm": norm,
            "update_norm": update_norm,
            "num_tokens": jnp.sum(batch["segment_ids"] > 0),
            "is_finite": is_finite,
        }
        return new, metrics

    return step


def make_gradients(
    bound: Bound,
    objective: Objective,
    *,
    micro_batches: int = 1,
    transforms: Sequence[Transform] = (),
    seed: int = 0,
) -> Callable:
    """`(trainable, frozen, batch, step, scale=1) -> (loss, gradients, metrics)`, exact under accumulation.

    The backward pass runs on `scale` times the loss; what is returned is unscaled.
    """

    def gradients(trainable: Variables, frozen: Variables, batch: Batch, step: jax.Array, scale=1.0):
        batch = {**batch, "token_ids": _token_ids(batch["tokens"])}
        rng = jax.random.fold_in(jax.random.key(seed), step)
        for number, transform in enumerate(transforms):
            batch = transform(batch, jax.random.fold_in(jax.random.fold_in(rng, _TRANSFORMS), number), step)
        batch = objective.prepare(batch)
        count = jnp.maximum(objective.count(batch), 1)

        def loss(trainable, part):
            total, sums = objective.sums(bound, {**frozen, **trainable}, part, rng)
            value = total * scale / count
            for penalty in bound.penalties(frozen, trainable):
                value += penalty * scale / micro_batches
            return value, sums

        run = jax.value_and_grad(loss, has_aux=True)
        if micro_batches == 1:
            (value, sums), grads = run(trainable, batch)
        else:
            parts = {name: _cut(x, micro_batches) for name, x in batch.items()}
            shapes = jax.eval_shape(run, trainable, {name: x[0] for name, x in parts.items()})
            start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            add = lambda total, part: (jax.tree.map(jnp.add, total, run(trainable, part)), None)  # noqa: E731
            ((value, sums), grads), _ = jax.lax.scan(add, start, parts)
        grads = jax.tree.map(lambda g: g / scale, grads)
        return value / scale, grads, {name: total / jnp.maximum(n, 1) for name, (total, n) in sums.items()}

    return gradients


def jit_step(step: Step, state: TrainState, platform: str | None = None) -> Step:
    """The step compiled with the state donated: it returns in the buffers it came in, sharded as it came.

    Args:
      state: arrays, or shapes with shardings, of the state that goes in and out. Left to choose, XLA may hand small
        leaves back otherwise sharded: the next step would be compiled anew, and end in other bits after a resume.
      platform: that it will run on, if not JAX's default.
    """
    # Products that a CPU runs side by side contend for its caches: one after the other is 3 to 5% faster.
    on_cpu = (platform or jax.default_backend()) == "cpu"
    options = {"xla_cpu_enable_concurrency_optimized_scheduler": False} if on_cpu else None
    shardings = jax.tree.map(lambda x: x.sharding, state), None
    return jax.jit(step, donate_argnums=0, out_shardings=shardings, compiler_options=options)


def make_eval_step(bound: Bound, objective: Objective, *, seed: int = 0) -> Callable:
    """`(variables, batch) -> {metric: (sum, count)}` without dropout or update."""

    def evaluate(variables: Variables, batch: Batch):
        batch = objective.prepare({**batch, "token_ids": _token_ids(batch["tokens"])})
        total, sums = objective.sums(bound, variables, batch, jax.random.key(seed))
        return {**sums, "loss": (total, objective.count(batch))}

    return evaluate


def check_batch(batch_size: int, micro_batches: int, sharder: Sharder) -> None:
    """Raises a LuthierError unless rows divide evenly over micro-batches and devices."""
    ways = 1 if sharder.mesh is None else sharder.mesh.shape["data"] * sharder.mesh.shape["fsdp"]
    if batch_size % (micro_batches * ways):
        raise LuthierError(
            f"{batch_size} rows do not divide into {micro_batches} micro-batches over {ways} data-parallel devices",
            where="stage.batch_size",
            mend=f"Use a multiple of {micro_batches * ways}",
        )


def _token_ids(tokens: jax.Array) -> jax.Array:
    return jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape)


def _cut(x: jax.Array, parts: int) -> jax.Array:
    """[B, …] -> [parts, B / parts, …]; strided, so that each part stays spread over the devices."""
    return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

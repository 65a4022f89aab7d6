"""Learning-rate schedules: `(steps) -> optax.Schedule`, by name.

All warm up linearly from 0 over `warmup` steps, as transformers' do: the update of step 0 then has
rate 0. A `warmup` below 1 is a fraction of all steps.
"""

import jax.numpy as jnp
import optax


def constant(steps: int, *, peak: float = 1e-4, warmup: float = 0.0) -> optax.Schedule:
    """peak, after the warm-up."""
    return _warmed(steps, peak, warmup, lambda done, left: jnp.ones_like(done))


def linear(steps: int, *, peak: float = 1e-4, warmup: float = 0.0, final: float = 0.0) -> optax.Schedule:
    """peak · (1 − p) + peak · final · p, p the share of the steps after the warm-up that is done."""
    return _warmed(steps, peak, warmup, lambda done, left: 1 - (1 - final) * done / left)


def cosine(steps: int, *, peak: float = 1e-4, warmup: float = 0.03, final: float = 0.0) -> optax.Schedule:
    """peak · (final + (1 − final) · (1 + cos πp) / 2), p as in `linear`."""
    return _warmed(
        steps, peak, warmup, lambda done, left: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done / left))
    )


def inverse_sqrt(steps: int, *, peak: float = 1e-4, warmup: float = 200.0) -> optax.Schedule:
    """peak · sqrt(w / (w + done)), with w the warm-up steps (at least 1) and `done` the steps after it."""
    knee = max(_warmup_steps(steps, warmup), 1)
    return _warmed(steps, peak, warmup, lambda done, left: jnp.sqrt(knee / (knee + done)))


def _warmup_steps(steps: int, warmup: float) -> int:
    return round(warmup * steps) if warmup < 1 else round(warmup)


def _warmed(steps, peak, warmup, shape) -> optax.Schedule:
    rise = _warmup_steps(steps, warmup)
    left = max(steps - rise, 1)

    def schedule(step):
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip(step - rise, 0, left)
        return peak * jnp.where(step < rise, step / max(rise, 1), shape(done, left))

    return schedule

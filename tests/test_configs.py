"""Every choice of the shipped configs makes a step: traced on a tiny model, nothing is run (preference losses:
test_preference_runs.py)."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
import tiny_policy
from luthier.configs import one_token_rollout, promot, reward, tuners

from luthier import config as c
from luthier.training.aot import abstract_step
from luthier.training.run import config_sharder

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
CHOICES = {
    "quickstart": ("smollm2-135m",),
    "tuners": tuners.TUNERS,
    "one_token_rollout": one_token_rollout.OBJECTIVES,
    "promot": promot.STAGES,
    "reward": reward.OBJECTIVES,
}


@pytest.mark.parametrize("config, choice", [(name, choice) for name in CHOICES for choice in CHOICES[name]])
def test_every_shipped_choice_makes_a_step(config, choice):
    """In the state's own shapes and dtypes, so that the next step fits too."""
    recipe = c.load(f"{CONFIGS / config}.py:{choice}")
    shape = tiny_policy.config(num_hidden_layers=1)
    for stage in recipe.stages:
        step, arguments, _ = abstract_step(recipe, stage, shape, config_sharder(recipe, shape), jnp.float32)
        state, metrics = jax.eval_shape(step, *arguments)
        assert {"loss", "grad_norm"} <= metrics.keys()
        for made, given in zip(jax.tree.leaves(state), jax.tree.leaves(arguments[0]), strict=True):
            assert (made.shape, made.dtype) == (given.shape, given.dtype)

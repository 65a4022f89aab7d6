"""A tiny pretrained model and batches for it, shared by the tests of the train step."""

import hf_layout
import jax
import jax.numpy as jnp
import numpy as np

from luthier.models import Transformer
from luthier.objectives import token_objective
from luthier.objectives.sft import sft
from luthier.parallel import AXES, Sharder
from luthier.training.state import init_state, split
from luthier.training.step import jit_step, make_step
from luthier.tuners import bind

SHARDER = Sharder(jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1, 1), AXES))


def bound_model(name: str, tuners=(), dtype=jnp.float32):
    """(bound, params) of goldens/families/NAME; float64 weights for a float64 model."""
    config, params = hf_layout.load(hf_layout.GOLDENS / "families" / name, dtype)
    return bind(Transformer(config, dtype=dtype), tuners), jax.tree.map(jnp.asarray, params)


def sft_objective():
    return token_objective(sft(), SHARDER)


def unpacked(input_ids: np.ndarray, is_label: np.ndarray) -> dict[str, np.ndarray]:
    """A batch of one sequence a row; `is_label[b, t]` says whether token t is a target (of position t - 1).

    Rows are padded on the right with token 0, which no sequence of the goldens holds.
    """
    segments = (input_ids != 0).astype(np.int32)
    last = np.zeros_like(input_ids[:, :1])
    return {
        "tokens": input_ids.astype(np.int32),
        "targets": np.concatenate([input_ids[:, 1:], last], axis=1).astype(np.int32),
        "loss_weights": np.concatenate([is_label[:, 1:], last], axis=1).astype(np.float32),
        "segment_ids": segments,
        "positions": (np.arange(input_ids.shape[1]) * segments).astype(np.int32),
    }


def train(bound, variables, optimizer, batches, *, train=("params",), loss=None, **options):
    """(final state, frozen, metrics of each step) after one step a batch."""
    trainable, frozen = split(variables, train)
    state = init_state(jax.tree.map(jnp.copy, trainable), optimizer, SHARDER)
    step = jit_step(make_step(bound, token_objective(loss or sft(), SHARDER), optimizer, **options), state)
    log = []
    for batch in batches:
        state, metrics = step(state, frozen, batch)
        log.append({key: np.asarray(value) for key, value in metrics.items()})
    return state, frozen, log

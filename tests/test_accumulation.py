"""One gradient, however the batch is cut: micro-batches, packing and masks, and finite differences."""

import functools
import types

import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training

from luthier.objectives import token_objective
from luthier.objectives.one_token_rollout import one_token_rollout
from luthier.training.step import make_gradients

ROWS, TIME = 12, 13
# A float32 gradient of this batch is 0.7e-6 to 1.0e-6 off the exact one, however and wherever it is summed, so two of
# them are up to 1.4e-6 apart; float64 shows that the sums are the same.
LIMIT = {np.float32: 2e-6, np.float64: 1e-12}


def ragged(rows: int = ROWS) -> dict[str, np.ndarray]:
    """Rows of unequal lengths with 0 to 12 targets."""
    rng = np.random.default_rng(5)
    tokens, is_label = np.zeros((rows, TIME), np.int32), np.zeros((rows, TIME))
    for row in range(rows):
        length = int(rng.integers(3, TIME + 1))
        tokens[row, :length] = rng.integers(3, 128, length)
        is_label[row, rng.integers(1, length) : length] = 1
    is_label[1::4] = 0  # every fourth row has no target
    return tiny_training.unpacked(tokens, is_label)


def packed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same sequences, two to a row one after the other, padded at the end."""
    rows = {key: np.zeros((len(value) // 2, 2 * TIME), value.dtype) for key, value in batch.items()}
    for row in range(len(batch["tokens"])):
        length = int(batch["segment_ids"][row].sum())
        start = int((rows["segment_ids"][row // 2] > 0).sum())
        for key in rows:
            value = batch[key][row, :length]
            rows[key][row // 2, start : start + length] = row % 2 + 1 if key == "segment_ids" else value
    return rows


@functools.cache
def compiled(dtype, micro_batches):
    bound, params = tiny_training.bound_model("llama_mha", dtype=dtype)
    return params, jax.jit(make_gradients(bound, tiny_training.sft_objective(), micro_batches=micro_batches))


def gradient(batch, dtype, micro_batches=1) -> tuple[float, dict]:
    params, gradients = compiled(dtype, micro_batches)
    loss, grads, _ = gradients({"params": params}, {}, batch, 0)
    return float(loss), grads


@functools.cache
def full(dtype):
    return gradient(ragged(), dtype)


def distance(a, b) -> float:
    """Relative L2 distance of two trees."""
    flat = lambda tree: np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])  # noqa: E731
    return np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("micro_batches", [2, 3, 4])
def test_micro_batches_give_the_gradient_of_the_full_batch(micro_batches, dtype):
    with jax.enable_x64(dtype == np.float64):
        loss, grads = full(dtype)
        again, cut = gradient(ragged(), dtype, micro_batches=micro_batches)
        assert all(x.dtype == dtype for x in jax.tree.leaves(cut))
    assert abs(again - loss) <= LIMIT[dtype] * abs(loss)
    assert distance(cut, grads) <= LIMIT[dtype]


@pytest.mark.parametrize("norm", ["tokens", "sequence"])
@pytest.mark.parametrize("mode", ["mc", "exact"])
def test_micro_batches_give_the_rollouts_of_the_full_batch(mode, norm):
    """Proposals are drawn and examples counted as in one piece: packed rows, some examples without a target.

    In float64, where no rounding moves a draw to the next token; an embedding and a head are the model.
    """
    loss, batch = one_token_rollout(k=8, mode=mode, norm=norm), packed(ragged(16))
    rng = np.random.default_rng(0)
    params = {"embed": rng.standard_normal((128, 6)), "head": rng.standard_normal((6, 128))}
    bound = types.SimpleNamespace(
        model=tiny_training.bound_model("llama_mha")[0].model,
        hidden=lambda variables, batch, rngs: (variables["params"]["embed"][batch["tokens"]], None),
        head=lambda variables: {"params": {"head": variables["params"]["head"]}},
        unembed=lambda variables, hidden: hidden @ variables["params"]["head"],
        penalties=lambda frozen, trainable: [],
    )
    with jax.enable_x64(True):
        objective = token_objective(loss, tiny_training.SHARDER)
        trainable = {"params": jax.tree.map(jnp.asarray, params)}
        results = [
            jax.jit(make_gradients(bound, objective, micro_batches=parts))(trainable, {}, batch, 3)
            for parts in (1, 2, 4)
        ]
    whole, *cuts = ((float(loss), grads, {k: float(x) for k, x in told.items()}) for loss, grads, told in results)
    for cut in cuts:
        assert cut[0] == pytest.approx(whole[0], rel=LIMIT[np.float64])
        assert distance(cut[1], whole[1]) <= LIMIT[np.float64]
        assert cut[2] == pytest.approx(whole[2], rel=LIMIT[np.float64])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_packing_changes_nothing(dtype):
    with jax.enable_x64(dtype == np.float64):
        loss, grads = full(dtype)
        again, together = gradient(packed(ragged()), dtype)
    assert abs(again - loss) <= LIMIT[dtype] * abs(loss)
    assert distance(together, grads) <= LIMIT[dtype]


def test_packed_loss_is_the_weighted_mean_of_each_sequence_alone():
    batch = ragged()
    alone = [
        (gradient({key: value[[row]] for key, value in batch.items()}, np.float32)[0], batch["loss_weights"][row].sum())
        for row in range(4)
    ]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    got, _ = gradient(packed({key: value[:4] for key, value in batch.items()}), np.float32)
    assert abs(got - expected) <= 1e-6 * expected


@pytest.mark.parametrize("name", ["llama_mha", "gemma2"])
def test_gradient_equals_finite_differences(name):
    """Central differences of the loss along random directions, in float64."""
    with jax.enable_x64(True):
        bound, params = tiny_training.bound_model(name, dtype=np.float64)
        gradients = jax.jit(make_gradients(bound, tiny_training.sft_objective(), micro_batches=2))
        at = lambda p: gradients({"params": p}, {}, ragged(4), 0)  # noqa: E731
        _, grads, _ = at(params)
        rng, h = np.random.default_rng(0), 1e-5
        for _ in range(3):
            direction = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape)), params)
            moved = [at(jax.tree.map(lambda p, d, s=s: p + s * h * d, params, direction))[0] for s in (1, -1)]
            slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((g * d).sum()), grads["params"], direction)))
            assert float(moved[0] - moved[1]) / (2 * h) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("micro_batches", [3])
def test_a_batch_without_targets_is_no_update_and_no_nan(micro_batches):
    batch = ragged()
    empty = {**batch, "loss_weights": 0 * batch["loss_weights"]}
    padding = {key: 0 * value for key, value in batch.items()}
    bound, params = tiny_training.bound_model("llama_mha")
    start, _, _ = tiny_training.train(
        bound, {"params": params}, optax.adamw(1e-2), [batch], micro_batches=micro_batches, clip_norm=1.0
    )
    state, _, log = tiny_training.train(
        bound,
        {"params": params},
        optax.adamw(1e-2),
        [batch, empty, padding],
        micro_batches=micro_batches,
        clip_norm=1.0,
    )
    jax.tree.map(np.testing.assert_array_equal, state.trainable, start.trainable)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, start.opt_state)
    assert int(state.step) == 3
    for metrics in log:
        assert all(np.isfinite(value).all() for value in metrics.values())
    assert log[1]["loss"] == log[1]["grad_norm"] == log[1]["update_norm"] == 0


def test_the_first_gradient_is_torch_autograds():
    """TRL's first gradient norm on the same batch (goldens/make_trl_sft.py), in any cut."""
    golden = np.load(hf_layout.GOLDENS / "trl_sft.npz")
    batch = tiny_training.unpacked(golden["all_1/input_ids"][0], golden["all_1/labels"][0] != -100)
    for micro_batches in (1, 4):
        _, grads = gradient(batch, np.float32, micro_batches=micro_batches)
        assert float(optax.tree.norm(grads)) == pytest.approx(golden["all_1/grad_norms"][0], rel=2e-6)

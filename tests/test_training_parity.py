"""Four steps of TRL's real `SFTTrainer` (goldens/make_trl_sft.py) by our train step, from the same weights."""

import hf_layout
import numpy as np
import optax
import pytest
import tiny_training

from luthier.objectives.dft import dft
from luthier.objectives.sft import sft
from luthier.optim import optimizers, schedules

GOLDEN = hf_layout.GOLDENS / "trl_sft.npz"
CLIP = {"completion": 1.0, "all": 0.0, "dft": 1.0}  # TRL's 1e9 never acts


@pytest.mark.parametrize(
    "target, theirs, ours",
    [("completion", *parts) for parts in [(1, 1), (4, 4), (1, 4), (4, 2)]]
    + [(target, *parts) for target in ("all", "dft") for parts in [(1, 1), (4, 2)]],
)
def test_four_steps_equal_trl(target, theirs, ours):
    golden = np.load(GOLDEN)
    expected = {key.partition("/")[2]: golden[key] for key in golden if key.startswith(f"{target}_{theirs}/")}
    batches = [tiny_training.unpacked(i, y != -100) for i, y in zip(expected["input_ids"], expected["labels"])]
    rate = schedules.linear(len(batches), peak=2e-3)
    optimizer = optimizers.adamw(rate, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.1)
    bound, params = tiny_training.bound_model("llama_mha")
    state, _, log = tiny_training.train(
        bound,
        {"params": params},
        optimizer,
        batches,
        loss=dft() if target == "dft" else sft(),
        micro_batches=ours,
        clip_norm=CLIP[target],
    )
    losses = [float(metrics["loss"]) for metrics in log]
    np.testing.assert_allclose(losses, expected["losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose([float(m["grad_norm"]) for m in log], expected["grad_norms"], rtol=1e-5)
    np.testing.assert_allclose([float(rate(i)) for i in range(4)], expected["learning_rates"], rtol=1e-6)
    for name in (key.removeprefix("norm/") for key in expected if key.startswith("norm/")):
        weight = hf_layout.hf_leaf(state.trainable["params"], name).ravel()
        np.testing.assert_allclose(
            weight[:: max(1, weight.size // 64)][:64], expected[f"slice/{name}"], rtol=0, atol=1e-5, err_msg=name
        )
        np.testing.assert_allclose(np.linalg.norm(weight.astype(np.float64)), expected[f"norm/{name}"], rtol=1e-5)


def test_a_mean_of_micro_batch_means_is_another_loss():
    """The common mistake, each micro-batch normalised by itself, is far outside the tolerance on these data."""
    golden = np.load(GOLDEN)
    tokens, labels = (golden[f"completion_4/{key}"][0].reshape(4, 2, -1) for key in ("input_ids", "labels"))
    batches = [tiny_training.unpacked(i, y != -100) for i, y in zip(tokens, labels)]
    bound, params = tiny_training.bound_model("llama_mha")
    _, _, log = tiny_training.train(bound, {"params": params}, optax.sgd(0.0), batches)
    losses, counts = np.array([float(m["loss"]) for m in log]), (labels[..., 1:] != -100).sum((1, 2))
    expected = golden["completion_4/losses"][0]
    assert abs(np.average(losses, weights=counts) - expected) < 1e-5
    assert abs(losses.mean() - expected) > 1e-3


def test_an_update_moves_the_golden_losses():
    """Without updates the later losses differ by far more than the tolerance, so the parity test sees the optimiser."""
    golden = np.load(GOLDEN)
    batches = [
        tiny_training.unpacked(i, y != -100)
        for i, y in zip(golden["completion_1/input_ids"], golden["completion_1/labels"])
    ]
    bound, params = tiny_training.bound_model("llama_mha")
    _, _, log = tiny_training.train(bound, {"params": params}, optax.sgd(0.0), batches)
    gaps = np.abs([float(m["loss"]) for m in log] - golden["completion_1/losses"])
    assert gaps[0] < 1e-5 and (gaps[1:] > 1e-3).all()

"""Four steps of TRL's real `DPOTrainer` (goldens/make_trl_dpo.py) by our train step, from the same weights."""

import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training
from test_lora import stacked

from luthier.objectives.preference import combine, length_desensitised, pairs, reference_free
from luthier.objectives.preference.objective import sequence_objective
from luthier.optim import optimizers, schedules
from luthier.training.state import init_state, split
from luthier.training.step import Average, jit_step, make_step
from luthier.tuners import bind
from luthier.tuners.lora import lora

GOLDEN = hf_layout.GOLDENS / "trl_dpo.npz"
ADAPTER = hf_layout.GOLDENS / "trl_dpo_lora"
MIXED = combine(losses=(pairs.ipo(beta=0.5), reference_free.chosen_sft()), weights=(1.0, 0.5))
LORA = lora(rank=4, alpha=8.0, patterns=("layers/attention/[qv]",))
LOSSES = {
    "dpo": (pairs.dpo(beta=0.5), 1e-3),
    "lora": (pairs.dpo(beta=0.5), 1e-2),
    "sync": (pairs.dpo(beta=0.5), 1e-3),
    "mixed": (length_desensitised(loss=MIXED, alpha=0.3), 1e-3),
}


def packed(input_ids: np.ndarray, is_completion: np.ndarray) -> dict[str, np.ndarray]:
    """TRL's batch, the preferred answers and then the others, as rows of one pair each."""
    pairs_of = lambda x: np.concatenate(np.split(x, 2), axis=1)  # noqa: E731
    tokens, mask = pairs_of(input_ids), pairs_of(is_completion)
    length = input_ids.shape[1]
    side = np.repeat([[1, 2]], length, axis=1) * (tokens != 0)
    following = np.roll(tokens, -1, axis=1)
    within = (np.arange(2 * length) % length < length - 1) & (np.roll(mask, -1, axis=1) == 1)
    return {
        "tokens": tokens,
        "targets": following,
        "loss_weights": within.astype(np.float32),
        "segment_ids": side.astype(np.int32),
        "positions": np.tile(np.arange(length), (len(tokens), 2)).astype(np.int32),
    }


@pytest.mark.parametrize("name, micro_batches", [("dpo", 1), ("lora", 1), ("sync", 1), ("mixed", 4)])
def test_four_steps_equal_trl(name, micro_batches):
    golden = np.load(GOLDEN)
    expected = {key.partition("/")[2]: golden[key] for key in golden if key.startswith(f"{name}/")}
    loss, rate = LOSSES[name]
    bound, params = tiny_training.bound_model("llama_mha")
    variables, train, beside = {"params": params}, ("params",), {"reference": {"params": params}}
    compared = bound
    if name == "lora":
        bound, train, beside = bind(bound.model, [LORA]), ("lora",), {}
        start = stacked(hf_layout.read_safetensors(ADAPTER / "start" / "adapter_model.safetensors"))
        variables["lora"] = jax.tree.map(jnp.asarray, start)
    optimizer = optimizers.adamw(schedules.constant(4, peak=rate), b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    objective = sequence_objective(loss, 2, tiny_training.SHARDER, reference=compared)
    trainable, frozen = split(variables, train)
    options = {"average": Average(0.4, 2), "reference_is_average": True} if name == "sync" else {}
    state = init_state(jax.tree.map(jnp.copy, trainable), optimizer, tiny_training.SHARDER, ema=name == "sync")
    step = jit_step(make_step(bound, objective, optimizer, micro_batches=micro_batches, **options), state)
    log = []
    for ids, is_completion in zip(expected["input_ids"], expected["is_completion"]):
        state, metrics = step(state, frozen | beside, packed(ids, is_completion))
        log.append({key: float(value) for key, value in metrics.items()})
    rewards = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    for ours, theirs in {"loss": "losses", "logps/chosen": "logps/chosen"}.items() | {(key, key) for key in rewards}:
        # Of the first step, where no answer is better, rounding decides.
        first = 1 if ours == "rewards/accuracies" else 0
        got, tolerance = [metrics[ours] for metrics in log][first:], 1e-4 if ours == "logps/chosen" else 1e-5
        np.testing.assert_allclose(got, expected[theirs][first:], rtol=0, atol=tolerance, err_msg=ours)
    if name == "lora":
        end = stacked(hf_layout.read_safetensors(ADAPTER / "end" / "adapter_model.safetensors"))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), state.trainable["lora"], end)
    for weight_name in (key.removeprefix("norm/") for key in expected if key.startswith("norm/")):
        weight = hf_layout.hf_leaf(state.trainable["params"], weight_name).ravel()
        some = weight[:: max(1, weight.size // 64)][:64]
        np.testing.assert_allclose(some, expected[f"slice/{weight_name}"], rtol=0, atol=1e-5, err_msg=weight_name)
        np.testing.assert_allclose(
            np.linalg.norm(weight.astype(np.float64)), expected[f"norm/{weight_name}"], rtol=1e-5
        )

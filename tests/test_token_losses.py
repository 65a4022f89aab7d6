"""Token losses against closed forms: exact expectations, limits, and the noise that sampling must have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from luthier.errors import LuthierError
from luthier.objectives import TokenLoss, token_objective
from luthier.objectives.dft import dft
from luthier.objectives.one_token_rollout import one_token_rollout, sample
from luthier.objectives.sft import sft

TOKENS, VOCABULARY = 400, 7


def logits_and_targets(seed=0, tokens=TOKENS, vocabulary=VOCABULARY):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, vocabulary)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, vocabulary, tokens))


def keys(seed, tokens=TOKENS):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(tokens))


def gradient(loss: TokenLoss, logits, targets, seed=0):
    """Of each token's loss in its own logits, `[n, V]`."""
    run = lambda logits: jnp.sum(loss.token_fn(logits, {"targets": targets}, keys(seed, len(targets)))["loss"])  # noqa: E731
    return np.asarray(jax.jit(jax.grad(run))(logits))


def rollout_moments(logits, targets, temperature, beta):
    """Mean and variance of −R(a) ∂ log π(a)/∂z over one proposal a ~ softmax(z/κ), by summing over all of them."""
    logits = np.asarray(logits, np.float64)
    soft = lambda z: np.exp(z) / np.exp(z).sum(-1, keepdims=True)  # noqa: E731
    proposed, policy = soft(logits / temperature), soft(logits)
    one_hot = np.eye(logits.shape[-1])
    reward = np.where(one_hot[np.asarray(targets)] > 0, 1.0, beta)
    each = -reward[:, :, None] * (one_hot[None] - policy[:, None, :])  # [n, proposal, logit]
    mean = np.sum(proposed[:, :, None] * each, axis=1)
    return mean, np.sum(proposed[:, :, None] * each**2, axis=1) - mean**2


@pytest.mark.parametrize("beta, temperature", [(-0.1, 1.3), (0.0, 1.0), (0.5, 2.0)])
def test_rollout_gradient_is_an_unbiased_draw(beta, temperature):
    """Monte-Carlo against the exact gradient in units of its own standard error."""
    logits, targets = logits_and_targets()
    k = 512
    mean, variance = rollout_moments(logits, targets, temperature, beta)
    exact = gradient(one_token_rollout(mode="exact", temperature=temperature, beta=beta), logits, targets)
    np.testing.assert_allclose(exact, mean, atol=1e-6)
    drawn = gradient(one_token_rollout(k=k, temperature=temperature, beta=beta), logits, targets, seed=3)
    z = ((drawn - mean) / np.sqrt(variance / k))[variance > 1e-12]
    from scipy.stats import norm

    assert 0.9 < np.mean(z**2) < 1.1
    assert np.abs(z).max() < norm.isf(0.01 / 2 / z.size)


def test_rollout_noise_falls_as_one_over_root_k():
    logits, targets = logits_and_targets(1)
    mean, variance = rollout_moments(logits, targets, 1.3, -0.1)
    for k in (4, 64, 1024):
        noise = np.sqrt(np.mean((gradient(one_token_rollout(k=k), logits, targets, seed=k) - mean) ** 2))
        assert noise == pytest.approx(np.sqrt(variance.mean() / k), rel=0.08)


def test_rollout_at_temperature_one_is_scaled_dft():
    """E_π[∇ log π] = 0, so at κ = 1 the exact gradient is 1 − β times DFT's, and at κ = 1.3 it is not."""
    logits, targets = logits_and_targets(2)
    of_dft = gradient(dft(), logits, targets)
    for beta in (-0.1, 0.0, 0.3, 1.0):
        rollout = gradient(one_token_rollout(mode="exact", temperature=1.0, beta=beta), logits, targets)
        np.testing.assert_allclose(rollout, (1 - beta) * of_dft, atol=1e-6)
    other = gradient(one_token_rollout(mode="exact", temperature=1.3, beta=0.0), logits, targets)
    assert np.abs(other - of_dft).max() > 1e-2


def test_dft_is_sft_weighted_by_probability():
    logits, targets = logits_and_targets(3)
    probability = jax.nn.softmax(logits)[np.arange(TOKENS), targets]
    expected = probability[:, None] * gradient(sft(), logits, targets)
    np.testing.assert_allclose(gradient(dft(), logits, targets), expected, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [2, 1003])
def test_proposals_have_the_policys_frequencies(vocabulary):
    """Pearson's χ² of 200,000 draws; what has no probability is never drawn."""
    from scipy.stats import chi2

    logits = np.random.default_rng(0).standard_normal(vocabulary).astype(np.float32)
    logits[1::7] = -np.inf
    rows = 50
    drawn = np.asarray(jax.jit(sample, static_argnums=2)(keys(0, rows), jnp.tile(logits, (rows, 1)), 4000))
    assert drawn.min() >= 0 and drawn.max() < vocabulary
    counts = np.bincount(drawn.ravel(), minlength=vocabulary)
    expected = np.exp(logits) / np.exp(logits).sum() * drawn.size
    assert not counts[expected == 0].any()
    possible = expected > 0
    statistic = np.sum((counts - expected)[possible] ** 2 / expected[possible])
    assert statistic <= chi2.isf(1e-4, possible.sum() - 1) if possible.sum() > 1 else counts.max() == drawn.size
    assert len(np.unique(drawn[:, 0])) > 1 or possible.sum() == 1  # rows have keys of their own


def test_no_array_of_proposals_by_vocabulary():
    """K = 512 proposals of 64 tokens over 2,048 words: nothing in the compiled gradient has K · T · V numbers."""
    import re

    logits, targets = logits_and_targets(0, 64, 2048)
    run = lambda z: jnp.sum(one_token_rollout(k=512).token_fn(z, {"targets": targets}, keys(0, 64))["loss"])  # noqa: E731
    text = jax.jit(jax.grad(run)).lower(logits).compile().as_text()
    sizes = [math.prod(map(int, shape.split(","))) for shape in re.findall(r"\bf32\[([\d,]+)\]", text)]
    assert max(sizes) <= 2 * 64 * 2048 + 64 * 512


def test_the_mean_over_sequences():
    """Two packed examples of 3 and 1 targets and one of 2: each example's mean, then theirs."""
    losses = np.array([[1.0, 2, 4, 8, 16, 0], [3, 5, 7, 0, 0, 0]], np.float32)
    batch = {
        "loss_weights": np.array([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]], np.float32),
        "segment_ids": np.array([[1, 1, 1, 1, 2, 0], [1, 1, 1, 0, 0, 0]], np.int32),
        "tokens": np.zeros((2, 6), np.int32),
        "targets": np.zeros((2, 6), np.int32),
        "token_ids": np.arange(12, dtype=np.int32).reshape(2, 6),
        "given": losses,
    }
    expected = {"tokens": (2 + 4 + 8 + 16 + 3 + 5) / 6, "sequence": ((2 + 4 + 8) / 3 + 16 + (3 + 5) / 2) / 3}
    bound, params = tiny_training.bound_model("llama_mha")
    fields = {**batch, "positions": np.tile(np.arange(6, dtype=np.int32), (2, 1))}
    for norm, mean in expected.items():
        loss = TokenLoss(lambda logits, tok, keys: {"loss": tok["given"]}, ("given",), norm)
        objective = token_objective(loss, tiny_training.SHARDER)
        total, _ = objective.sums(bound, {"params": params}, fields, jax.random.key(0))
        assert float(total / objective.count(batch)) == pytest.approx(mean)


@pytest.mark.parametrize("options", [{"mode": "sampled"}, {"k": 0}, {"temperature": 0.0}])
def test_bad_options(options):
    with pytest.raises(LuthierError, match=next(iter(options))):
        one_token_rollout(**options)


def test_an_unknown_norm():
    with pytest.raises(LuthierError, match="tokens, sequence"):
        token_objective(one_token_rollout(norm="words"), tiny_training.SHARDER)

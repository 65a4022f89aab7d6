"""Token losses against closed forms: exact expectations, limits, and the noise that sampling must have."""

import functools
import math
import re
import shutil

import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
import tiny_training

import luthier
from luthier import config as configs
from luthier.data.masked_thought import masked_thought
from luthier.errors import LuthierError
from luthier.objectives import TokenLoss, token_objective, weighted_sum
from luthier.objectives.asft import asft
from luthier.objectives.dft import dft
from luthier.objectives.distillation import distillation
from luthier.objectives.one_token_rollout import one_token_rollout, sample
from luthier.objectives.sft import sft
from luthier.parallel import Sharder
from luthier.training.step import make_gradients

TOKENS, VOCABULARY = 400, 7


def logits_and_targets(seed=0, tokens=TOKENS, vocabulary=VOCABULARY):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((tokens, vocabulary)).astype(np.float32)
    return jnp.asarray(logits), jnp.asarray(rng.integers(0, vocabulary, tokens))


def keys(seed, tokens=TOKENS):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(tokens))


def gradient(loss: TokenLoss, logits, targets, seed=0, **tok):
    """Of each token's loss in its own logits, `[n, V]`."""
    tok = {"targets": targets, **tok}
    run = lambda logits: jnp.sum(loss.token_fn(logits, tok, keys(seed, len(targets)))["loss"])  # noqa: E731
    return np.asarray(jax.jit(jax.grad(run))(logits))


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 0.1}, {"z_loss": 0.02}, {"label_smoothing": 0.3, "z_loss": 0.5}],
    ids=["label smoothing", "z-loss", "both"],
)
def test_sft_options_equal_their_formula(options):
    """Values, and gradients in hidden states and head by central differences of the formula, in float64."""
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    rng = np.random.default_rng(7)
    hidden, kernel = rng.standard_normal((2, 5, 3)), rng.standard_normal((3, VOCABULARY))
    targets = rng.integers(0, VOCABULARY, (2, 5))
    weights = rng.uniform(0.2, 3.0, (2, 5))
    weights[0, 1] = weights[1, 3] = 0  # and others unequal

    def formula(hidden, kernel):
        logits = hidden @ kernel
        log_z = np.log(np.exp(logits).sum(-1))
        spread = np.full(logits.shape, smoothing / VOCABULARY)
        np.put_along_axis(spread, targets[..., None], 1 - smoothing + smoothing / VOCABULARY, axis=-1)
        return np.sum(spread * (log_z[..., None] - logits), axis=-1) + z_loss * log_z**2

    def slopes(which):
        """Of Σ weights · loss in every number of `which`."""
        steps = 1e-5 * np.eye(which.size).reshape(-1, *which.shape)
        at = lambda step: np.sum(weights * formula(*(x + step if x is which else x for x in (hidden, kernel))))  # noqa: E731
        return np.reshape([(at(step) - at(-step)) / 2e-5 for step in steps], which.shape)

    def ours(hidden, kernel):
        chunk = lambda head, hidden, tok, keys: sft(**options).token_fn(hidden @ head, tok, keys)  # noqa: E731
        tok, ids = {"targets": jnp.asarray(targets)}, jnp.arange(10).reshape(2, 5)
        return weighted_sum(chunk, VOCABULARY, Sharder(), kernel, hidden, weights, tok, ids, jax.random.key(0))

    with jax.enable_x64(True):
        run = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))
        (total, outputs), gradients = run(jnp.asarray(hidden), jnp.asarray(kernel))
        assert total.dtype == np.float64
    values = formula(hidden, kernel)
    np.testing.assert_allclose(outputs["loss"], np.where(weights != 0, values, 0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(total, np.sum(weights * values), rtol=1e-12)
    for got, which in zip(gradients, (hidden, kernel)):
        np.testing.assert_allclose(got, slopes(which), rtol=1e-7, atol=1e-8)


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


@pytest.mark.parametrize("base", ["dft", "sft"])
def test_asft_adds_the_divergence_from_the_start(base):
    """∂ KL(p ‖ softmax z) / ∂z = softmax z − p; λ = 0 is the base."""
    (logits, targets), (start, _) = logits_and_targets(3), logits_and_targets(4)
    of_base = gradient(dft() if base == "dft" else sft(), logits, targets)
    for weight in (0.0, 0.7):
        expected = of_base + weight * (jax.nn.softmax(logits) - jax.nn.softmax(start))
        got = gradient(asft(kl_weight=weight, base=base), logits, targets, reference=start)
        np.testing.assert_allclose(got, expected, atol=1e-6)
    values = asft(kl_weight=0.7).token_fn(logits, {"targets": targets, "reference": start}, None)
    p, q = (np.asarray(jax.nn.softmax(z), np.float64) for z in (start, logits))
    np.testing.assert_allclose(values["kl_start"], np.sum(p * np.log(p / q), axis=-1), atol=1e-5)


def test_distillation_equals_trl():
    golden = np.load(hf_layout.GOLDENS / "trl_losses.npz")
    student, teacher = golden["student"], golden["teacher"]
    targets = jnp.zeros(len(student), jnp.int32)
    names = [key.removesuffix("/loss") for key in golden if key.endswith("/loss")]
    assert len(names) == 4
    for name in names:
        beta, temperature = map(float, name.split("/")[1:])
        loss = distillation(teacher="any", beta=beta, temperature=temperature)
        values = loss.token_fn(student, {"targets": targets, "reference": teacher}, None)
        np.testing.assert_allclose(values["loss"], golden[f"{name}/loss"], atol=1e-6)
        wider = np.pad(teacher, ((0, 0), (0, 3)), constant_values=-1e4)  # rows that only the teacher has
        got = gradient(loss, jnp.asarray(student), targets, reference=wider)
        np.testing.assert_allclose(got, golden[f"{name}/gradient"], atol=1e-6)


def sft_batch():
    """Packed rows of token ids with weights of several sizes."""
    golden = np.load(hf_layout.GOLDENS / "trl_sft.npz")
    batch = tiny_training.unpacked(golden["completion_1/input_ids"][0], golden["completion_1/labels"][0] != -100)
    token_ids = np.arange(batch["tokens"].size, dtype=np.int32).reshape(batch["tokens"].shape)
    return jax.tree.map(jnp.asarray, {**batch, "token_ids": token_ids})


@pytest.mark.parametrize("apart", [True, False], ids=["weights of its own", "the policy's weights"])
def test_the_reference_makes_its_logits_in_the_fused_head(apart):
    """Sum and gradient equal those from whole logits of two models; the reference gets no gradient."""
    bound, params = tiny_training.bound_model("llama_gqa_tied")
    reference, other = bound, jax.tree.map(lambda x: x * 1.1, params)
    batch, loss = sft_batch(), asft(kl_weight=0.5)
    objective = token_objective(loss, tiny_training.SHARDER, reference=reference)

    def fused(params):
        variables = {"params": params, **({"reference": {"params": other}} if apart else {})}
        return objective.sums(bound, variables, batch, jax.random.key(0))[0]

    def whole(params):
        logits = lambda params: bound.unembed({"params": params}, bound.hidden({"params": params}, batch)[0])  # noqa: E731
        theirs = jax.lax.stop_gradient(logits(other if apart else params))
        rows = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        tok = {"targets": batch["targets"].reshape(-1), "reference": rows(theirs)}
        values = loss.token_fn(rows(logits(params)), tok, None)["loss"]
        return jnp.sum(jnp.where(batch["loss_weights"].reshape(-1) != 0, values, 0))

    got, expected = (jax.jit(jax.value_and_grad(f))(params) for f in (fused, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, expected)


STAGE = 'c.stage(name="{name}", data=DATA, steps=2, batch_size=4, sequence_length=64, {more})'


def test_recipes_with_a_reference(tmp_path, monkeypatch):
    """KL to the start is 0 before the first update and not after it, whatever is trained; the second stage starts
    where the first ended; a teacher of the model's own weights is where the student starts."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    high = 'schedule=c.spec("constant", peak=0.01, warmup=0.0)'
    stages = [
        STAGE.format(name="full", more=f'objective=c.spec("asft"), {high}'),
        STAGE.format(name="lora", more=f'objective=c.spec("asft"), tuners=(c.spec("lora", rank=2),), {high}'),
    ]
    file = tiny_run.write_run(tmp_path, ", ".join(stages))
    luthier.train(configs.load(str(file)), tmp_path / "asft")
    divergences = [record["kl_start"] for record in tiny_run.metrics(tmp_path / "asft")]
    assert divergences[0] == pytest.approx(0, abs=1e-6) and divergences[2] == pytest.approx(0, abs=1e-6)
    assert divergences[1] > 1e-4 and divergences[3] > 1e-4

    taught = STAGE.format(name="taught", more=f'objective=c.spec("distillation", teacher="{tmp_path}/model"), {high}')
    (tmp_path / "other").mkdir()
    file = tiny_run.write_run(tmp_path / "other", taught, hidden_size=48)
    recipe = configs.load(str(file))
    luthier.train(recipe, tmp_path / "distillation")
    records = tiny_run.metrics(tmp_path / "distillation")
    assert all(record["divergence"] > 0 for record in records)
    shutil.rmtree(tmp_path / "model")  # a finished stage goes without its teacher
    luthier.train(recipe, tmp_path / "distillation")
    assert tiny_run.metrics(tmp_path / "distillation") == records
    absent = [f"stages[0].objective.teacher={tmp_path}/absent"]
    with pytest.raises(LuthierError, match="no such model"):
        luthier.train(configs.load(str(file), absent), tmp_path / "absent")


def test_masked_thought_hides_answers():
    batch = {**sft_batch(), "tokens": jnp.full_like(sft_batch()["tokens"], 7)}
    is_target_input = np.pad(np.asarray(batch["loss_weights"]) != 0, ((0, 0), (1, 0)))[:, :-1]
    masked = lambda step, **options: masked_thought(10, 500, **options)(batch, jax.random.key(1), jnp.int32(step))  # noqa: E731
    whole = masked(10, rate=1.0, mask_token=3)
    np.testing.assert_array_equal(whole["tokens"] == 3, is_target_input)
    np.testing.assert_array_equal(whole["targets"], batch["targets"])
    np.testing.assert_array_equal(masked(10, rate=0.0)["tokens"], batch["tokens"])
    np.testing.assert_array_equal(masked(0)["tokens"], batch["tokens"])
    changed = np.asarray(masked(10, rate=1.0)["tokens"])[is_target_input]
    assert len(np.unique(changed)) > 0.7 * changed.size and changed.max() < 500
    wide = {"tokens": jnp.zeros((4, 5000), jnp.int32), "loss_weights": jnp.ones((4, 5000))}
    wide["token_ids"] = jnp.arange(20000).reshape(4, 5000)
    for step, share in [(2, 0.4 * 2 / 6.6), (6, 0.4 * 6 / 6.6), (9, 0.4)]:
        hidden = masked_thought(10, 500, mask_token=1)(wide, jax.random.key(step), jnp.int32(step))["tokens"]
        assert float(hidden.mean()) == pytest.approx(share, abs=4 * math.sqrt(share / 20000))


def test_masked_thought_is_the_same_in_micro_batches():
    bound, params = tiny_training.bound_model("llama_mha")
    batch = {key: x for key, x in sft_batch().items() if key != "token_ids"}
    transform = masked_thought(1, 128, rate=0.5, warmup=0.0)
    losses = [
        jax.jit(make_gradients(bound, tiny_training.sft_objective(), micro_batches=parts, transforms=used))(
            {"params": params}, {}, batch, jnp.int32(0)
        )[0]
        for parts, used in [(1, [transform]), (4, [transform])]
    ]
    assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-6)
    changed = transform(sft_batch(), jax.random.key(0), jnp.int32(0))["tokens"] != batch["tokens"]
    assert changed.any()


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


def test_every_proposal_is_a_token():
    """Logits and key of a real draw that fell between a block's total and its sums, formed twice, rounded apart."""
    real = np.load(hf_layout.GOLDENS / "edge_of_vocabulary.npz")
    row_keys = jnp.broadcast_to(jax.random.wrap_key_data(jnp.asarray(real["key"])), (84,))
    drawn = jax.jit(sample, static_argnums=2)(row_keys, jnp.tile(real["logits"], (84, 1)), 256)
    assert np.max(drawn) < real["logits"].size


def largest(compiled) -> int:
    """Numbers, of any dtype, in the largest array of a compiled program."""
    shapes = re.findall(r"\b(?:pred|[a-z]+\d\w*)\[([\d,]+)\]", compiled.as_text())
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def test_no_array_of_proposals_by_vocabulary():
    """K = 512 proposals of 64 tokens over 2,048 words: nothing in the compiled gradient has K · T · V numbers."""
    logits, targets = logits_and_targets(0, 64, 2048)
    run = lambda z: jnp.sum(one_token_rollout(k=512).token_fn(z, {"targets": targets}, keys(0, 64))["loss"])  # noqa: E731
    assert largest(jax.jit(jax.grad(run)).lower(logits).compile()) <= 64 * 512 * 46  # √V
    every = lambda z: z[:, None, :] < jnp.arange(3.0)[:, None]  # noqa: E731
    assert largest(jax.jit(lambda z: jnp.cumsum(every(z), axis=1)).lower(logits).compile()) == 3 * 64 * 2048


def test_no_array_of_proposals_by_vocabulary_in_the_gradient_of_a_model():
    """K = 512 proposals of 64 tokens over 128 words, with a transformer before them."""
    bound, params = tiny_training.bound_model("llama_mha")
    objective = token_objective(one_token_rollout(k=512), tiny_training.SHARDER)
    batch = jax.tree.map(lambda x: jnp.tile(x, (1, 64))[:4, :16], {k: x[:, :1] for k, x in sft_batch().items()})
    gradients = jax.jit(make_gradients(bound, objective))
    assert bound.model.config.vocab_size == 128 and batch["tokens"].size == 64
    assert largest(gradients.lower({"params": params}, {}, batch, 0).compile()) <= 64 * 512 * 12  # √V


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


@pytest.mark.parametrize(
    "loss, option",
    [
        (one_token_rollout, {"mode": "sampled"}),
        (one_token_rollout, {"k": 0}),
        (one_token_rollout, {"temperature": 0.0}),
        (asft, {"base": "nll"}),
        (functools.partial(distillation, teacher="x"), {"beta": 1.5}),
        (functools.partial(masked_thought, 10, 100), {"rate": 2.0}),
        (functools.partial(masked_thought, 10, 100), {"mask_token": 100}),
    ],
)
def test_bad_options(loss, option):
    with pytest.raises(LuthierError, match=next(iter(option))):
        loss(**option)


def test_an_unknown_norm():
    with pytest.raises(LuthierError, match="tokens, sequence"):
        token_objective(one_token_rollout(norm="words"), tiny_training.SHARDER)

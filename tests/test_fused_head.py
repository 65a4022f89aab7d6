"""The fused head against full logits, torch, and the text of the compiled program."""

import dataclasses
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_training

from luthier.models import Transformer
from luthier.objectives import fused_head, token_outputs, weighted_sum
from luthier.objectives.sft import sft
from luthier.parallel import Sharder
from luthier.training.flops import matmul_flops
from luthier.training.state import init_state
from luthier.training.step import make_step
from luthier.tuners import bind

BATCH, TIME, WIDTH, VOCABULARY = 3, 11, 8, 37
EVERY = jnp.ones((BATCH, TIME), bool)


@functools.cache
def arrays():
    rng = np.random.default_rng(1)
    head = {"kernel": 0.5 * rng.standard_normal((WIDTH, VOCABULARY)), "unused": np.ones(3)}
    hidden = rng.standard_normal((BATCH, TIME, WIDTH))
    weights = rng.uniform(-0.5, 1.5, (BATCH, TIME)) * (rng.random((BATCH, TIME)) < 0.7)
    targets = rng.integers(0, VOCABULARY, (BATCH, TIME))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (head, hidden, weights)), jnp.asarray(targets)


def unembed(head, hidden):
    return 5.0 * jnp.tanh(hidden @ head["kernel"] / 5.0)


def fused_with(token_fn):
    """The first arguments of the fused head: a chunk function, its logits a token, no mesh."""
    return lambda head, hidden, tok, keys: token_fn(unembed(head, hidden), tok, keys), VOCABULARY, Sharder()


def plain_loss(head, hidden, targets):
    """−log softmax(logits)[target], all logits at once."""
    chosen = jnp.take_along_axis(jax.nn.log_softmax(unembed(head, hidden)), targets[..., None], axis=-1)
    return -chosen[..., 0]


def ids():
    return jnp.arange(BATCH * TIME).reshape(BATCH, TIME)


def arguments(targets):
    return {"targets": targets}, ids(), jax.random.key(0)


@pytest.fixture(params=[1, 4 * BATCH * VOCABULARY * 4, 1 << 26], ids=["a token a chunk", "ragged chunks", "one chunk"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(fused_head, "CHUNK_BYTES", request.param)


def close(got, expected):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6), got, expected)


def test_weighted_sum_and_its_gradient(chunks):
    (head, hidden, weights), targets = arrays()
    tok, token_ids, rng = arguments(targets)

    def fused(head, hidden):
        total, outputs = weighted_sum(*fused_with(sft().token_fn), head, hidden, weights, tok, token_ids, rng)
        return 3.0 * total, outputs

    (total, outputs), got = jax.jit(jax.value_and_grad(fused, (0, 1), has_aux=True))(head, hidden)
    plain = lambda head, hidden: 3.0 * jnp.sum(weights * plain_loss(head, hidden, targets))  # noqa: E731
    expected = jax.value_and_grad(plain, (0, 1))(head, hidden)
    close((total, got), expected)
    logits = unembed(head, hidden)
    probabilities = jax.nn.softmax(logits)
    weighted = lambda x: jnp.where(weights != 0, x, 0)  # noqa: E731
    close(outputs["loss"], weighted(plain_loss(head, hidden, targets)))
    close(outputs["entropy"], weighted(-jnp.sum(probabilities * jnp.log(probabilities), axis=-1)))
    np.testing.assert_array_equal(outputs["mean_token_accuracy"], weighted(logits.argmax(-1) == targets))


def test_tokens_without_weight_cost_nothing(monkeypatch):
    """Chunks of nothing else are not computed: what is not finite there reaches no gradient."""
    monkeypatch.setattr(fused_head, "CHUNK_TOKENS", 4)
    (head, hidden, _), targets = arrays()
    weights = jnp.zeros((BATCH, TIME)).at[0, 3:7].set(1.0).at[2, 1:5].set(0.5)  # 8 of 33: two chunks of four
    broken = jnp.where((weights != 0)[..., None], hidden, jnp.nan)
    tok, token_ids, rng = arguments(targets)

    def fused(head, hidden):
        return weighted_sum(*fused_with(sft().token_fn), head, hidden, weights, tok, token_ids, rng)[0]

    plain = lambda head, hidden: jnp.sum(weights * plain_loss(head, hidden, targets))  # noqa: E731
    got = jax.jit(jax.value_and_grad(fused, (0, 1)))(head, broken)
    close(got, jax.value_and_grad(plain, (0, 1))(head, hidden))


def test_token_outputs_take_any_cotangent(chunks):
    """A loss of whole sequences: Σ_b log cosh(Σ_t weight · loss), whose weights depend on the values."""
    (head, hidden, weights), targets = arrays()
    reduce = lambda losses: jnp.sum(jnp.log(jnp.cosh(jnp.sum(weights * losses, axis=1))))  # noqa: E731

    def fused(head, hidden):
        mask = weights != 0
        return reduce(token_outputs(*fused_with(sft().token_fn), head, hidden, mask, *arguments(targets))["loss"])

    got = jax.jit(jax.value_and_grad(fused, (0, 1)))(head, hidden)
    plain = lambda head, hidden: reduce(plain_loss(head, hidden, targets))  # noqa: E731
    close(got, jax.value_and_grad(plain, (0, 1))(head, hidden))


def test_token_outputs_of_a_fixed_head_make_logits_once(chunks):
    """The gradient in the hidden states alone: the same, by two products of the head and no third."""
    (head, hidden, weights), targets = arrays()
    reduce = lambda losses: jnp.sum(jnp.log(jnp.cosh(jnp.sum(weights * losses, axis=1))))  # noqa: E731

    def fused(hidden):
        mask = weights != 0
        return reduce(token_outputs(*fused_with(sft().token_fn), head, hidden, mask, *arguments(targets))["loss"])

    run = jax.jit(jax.value_and_grad(fused))
    close(run(hidden), jax.value_and_grad(lambda hidden: reduce(plain_loss(head, hidden, targets)))(hidden))
    tokens = math.ceil(BATCH * TIME / 4) * 4  # chunks may be padded
    assert matmul_flops(run.trace(hidden).jaxpr) <= 2 * 2 * tokens * WIDTH * VOCABULARY


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}])
@pytest.mark.parity
def test_sft_equals_torch_cross_entropy(options, chunks):
    torch = pytest.importorskip("torch")
    (head, hidden, _), targets = arrays()
    logits = torch.tensor(np.asarray(unembed(head, hidden)))
    tok, token_ids, rng = arguments(targets)
    got = token_outputs(*fused_with(sft(**options).token_fn), head, hidden, EVERY, tok, token_ids, rng)["loss"]
    expected = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(np.asarray(targets), dtype=torch.long), reduction="none", **options
    )
    close(got, expected.numpy())


def test_token_keys_do_not_depend_on_chunks(monkeypatch):
    (head, hidden, _), targets = arrays()
    draw = lambda logits, tok, keys: {"loss": jax.vmap(jax.random.uniform)(keys)}  # noqa: E731
    drawn = []
    for size in (1, 1 << 26):
        monkeypatch.setattr(fused_head, "CHUNK_BYTES", size)
        drawn.append(token_outputs(*fused_with(draw), head, hidden, EVERY, *arguments(targets))["loss"])
    np.testing.assert_array_equal(*drawn)
    assert len(np.unique(drawn[0])) == BATCH * TIME


LARGE = {"batch": 4, "time": 256, "vocabulary": 128_256}


@pytest.mark.parametrize("what", ["loss", "step"])
@pytest.mark.parametrize("tied", [True, False])
def test_no_buffer_of_all_logits_at_vocabulary_128k(what, tied):
    """No shape in the compiled program holds batch · time · vocabulary numbers, and all temporaries
    together are smaller than that array, so it does not exist in pieces either."""
    bound, _ = tiny_training.bound_model("llama_mha")
    config = dataclasses.replace(
        bound.model.config, vocab_size=LARGE["vocabulary"], num_layers=1, local_layers=(False,), tie_embeddings=tied
    )
    bound, sharder = bind(Transformer(config)), tiny_training.SHARDER
    objective, optimizer = tiny_training.sft_objective(), optax.sgd(0.1)
    params = nn.unbox(jax.eval_shape(bound.init, jax.random.key(0)))["params"]
    row = (LARGE["batch"], LARGE["time"])
    kinds = {"tokens": "int32", "targets": "int32", "segment_ids": "int32", "positions": "int32"}
    batch = {key: jax.ShapeDtypeStruct(row, kind) for key, kind in {**kinds, "loss_weights": "float32"}.items()}

    def loss(params, batch):
        batch = {**batch, "token_ids": jnp.zeros(row, jnp.int32)}
        return objective.sums(bound, {"params": params}, batch, jax.random.key(0))

    if what == "step":
        state = jax.eval_shape(lambda p: init_state({"params": p}, optimizer, sharder), params)
        lowered = jax.jit(make_step(bound, objective, optimizer), donate_argnums=0).lower(state, {}, batch)
    else:
        lowered = jax.jit(loss).lower(params, batch)
    compiled = lowered.compile()
    shapes = set(re.findall(r"\b(?:f|bf|s|u|pred)\d*\[([\d,]+)\]", compiled.as_text()))
    sizes = {shape: math.prod(map(int, shape.split(","))) for shape in shapes}
    everything = math.prod(LARGE.values())
    assert max(sizes.values()) >= LARGE["vocabulary"] * 48  # the text was read: the head is in it
    assert max(sizes.values()) < everything / 4, max(sizes, key=sizes.get)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * everything / 2

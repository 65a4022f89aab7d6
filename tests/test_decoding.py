"""Generation against the uncached forward, closed forms and transformers' processors."""

import dataclasses
import functools
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tiny_policy
from compilations import count_compilations

from luthier.decoding import Sampling, generate, sampling
from luthier.errors import LuthierError
from luthier.tuners import bind
from luthier.tuners.lora import lora

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "processors.npz"
PROMPTS = ("a", "The quick brown fox", "x" * 40, "12 + 34 =", "zebra\n", "qq", "Hello, world. " * 4)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy.policy()


@functools.partial(jax.jit, static_argnames="bound")
def forward(variables, batch, *, bound):
    return bound.unembed(variables, bound.hidden(variables, batch)[0])


def full_logits(policy, tokens):
    """Logits of every position by one uncached forward pass; later positions cannot matter."""
    row = np.zeros((1, 128), np.int32)  # in numpy: JAX would compile a program for each length
    row[0, : len(tokens)] = tokens
    batch = {"tokens": row, "positions": np.arange(128)[None], "segment_ids": np.ones_like(row)}
    return np.asarray(forward(policy.variables, batch, bound=policy.bound))[0, : len(tokens)]


def greedy_by_full_forward(policy, prompt, length):
    tokens, made = policy.encode(prompt), []
    while len(made) < length:
        made.append(int(full_logits(policy, tokens + made)[-1].argmax()))
        if made[-1] in policy.eos_ids:
            break
    return tuple(made)


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "all"])
def test_processors_equal_transformers(name):
    golden = np.load(GOLDENS)
    logits = jnp.asarray(golden["logits"])
    ours = {
        "top_k": lambda: sampling.top_k(logits, 7),
        "top_p": lambda: sampling.top_p(logits, 0.8),
        "min_p": lambda: sampling.min_p(logits, 0.1),
        "all": lambda: sampling.processed(logits, Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02)),
    }[name]()
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(golden[name]))
    np.testing.assert_allclose(jax.nn.softmax(ours), golden[f"{name}_probabilities"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_k": -1},
        {"min_p": 2.0},
        {"stop": ("",)},
    ],
)
def test_sampling_refuses(changes):
    with pytest.raises(LuthierError, match=next(iter(changes))):
        Sampling(**changes)


def test_greedy_equals_full_forward(policy):
    made = generate(policy, PROMPTS, Sampling(max_new_tokens=24), batch_size=4)
    for prompt, generation in zip(PROMPTS, made):
        assert generation.token_ids == greedy_by_full_forward(policy, prompt, 24)
    assert len({token for generation in made for token in generation.token_ids}) > 20


def tied_local_layers_with_an_adapter():
    gemma = {"model_type": "gemma2", "head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True}
    plain = tiny_policy.policy(**gemma)
    bound = bind(plain.bound.model, [lora(rank=2, alpha=8)])
    noise = np.random.default_rng(0)
    adapter = jax.eval_shape(lambda: nn.unbox(bound.init(jax.random.key(0))["lora"]))
    adapter = jax.tree.map(lambda x: noise.normal(size=x.shape).astype(np.float32), adapter)
    return dataclasses.replace(plain, bound=bound, variables={**plain.variables, "lora": adapter})


@pytest.mark.parametrize("make", [tiny_policy.policy, tied_local_layers_with_an_adapter])
def test_logprobs_are_the_models_own(make):
    policy = make()
    made = generate(policy, PROMPTS[:3], Sampling(max_new_tokens=12, temperature=1.7, top_k=9), batch_size=4)
    assert policy.layers_apart  # so decoded apart; the expectation reads stacked weights
    for prompt, generation in zip(PROMPTS, made):
        context = policy.encode(prompt)
        logprobs = jax.nn.log_softmax(full_logits(policy, [*context, *generation.token_ids]))
        expected = [logprobs[len(context) - 1 + i, token] for i, token in enumerate(generation.token_ids)]
        np.testing.assert_allclose(generation.logprobs, expected, atol=2e-5)


def test_batch_size_and_padding_do_not_change_samples(policy):
    settings = Sampling(max_new_tokens=20, temperature=1.0, top_p=0.9, seed=7)
    alone, together = (generate(policy, PROMPTS, settings, batch_size=size) for size in (1, 4))
    assert [g.token_ids for g in together] == [g.token_ids for g in alone]
    for one, other in zip(together, alone):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
    again = generate(policy, PROMPTS[:4], settings, batch_size=4)
    assert [g.token_ids for g in again] == [g.token_ids for g in alone[:4]]


def test_seed_and_index_change_samples(policy):
    draw = lambda seed: [g.token_ids for g in generate(policy, ["same"] * 3, Sampling(temperature=1.0, seed=seed))]  # noqa: E731
    first, again, other = draw(0), draw(0), draw(1)
    assert first == again != other
    assert len(set(first)) == 3


def test_samples_follow_the_softmax(policy):
    count, settings = 4096, Sampling(max_new_tokens=1, temperature=1.3, top_k=12)
    probabilities = np.asarray(
        jax.nn.softmax(sampling.processed(full_logits(policy, policy.encode("a"))[-1], settings)), float
    )
    made = [g.token_ids[0] for g in generate(policy, ["a"] * count, settings, batch_size=1024)]
    observed = np.bincount(made, minlength=len(probabilities))
    kept = probabilities > 0
    assert observed[~kept].sum() == 0
    assert scipy.stats.chisquare(observed[kept], count * probabilities[kept] / probabilities.sum()).pvalue > 0.01


def test_eos_ends_a_text(policy):
    """Whatever token comes third is declared the end."""
    third = generate(policy, ["a"], Sampling(max_new_tokens=8))[0].token_ids
    assert third[2] not in third[:2]
    ending = dataclasses.replace(policy, tokenizer=tiny_policy.tokenizer())
    ending.tokenizer.eos_ids = (third[2],)
    made = generate(ending, ["a", "b"], Sampling(max_new_tokens=8))
    assert made[0].token_ids == third[:3]
    assert made[0].finish_reason == "eos"
    assert made[1].finish_reason == "length" and len(made[1].token_ids) == 8


@pytest.mark.parametrize("at", [0, 3, 15, 16, 17, 37])
def test_stop_strings_cut_exactly(policy, at):
    """The stop string is what the model writes at `at`; chunks of decode steps must not show."""
    free = generate(policy, ["The quick", "zz"], Sampling(max_new_tokens=40, temperature=1.0))
    text = [policy.decode([t]) for t in free[0].token_ids]
    stop = "".join(text[at : at + 2])
    first = policy.decode(free[0].token_ids).index(stop)
    stopped, other = generate(
        policy, ["The quick", "zz"], Sampling(max_new_tokens=40, temperature=1.0, stop=(stop, "\0never"))
    )
    assert stopped.finish_reason == "stop"
    assert stopped.text == free[0].text[:first]
    count = len(stopped.token_ids)
    assert stopped.token_ids == free[0].token_ids[:count]
    assert stop in policy.decode(stopped.token_ids) and stop not in policy.decode(stopped.token_ids[:-1])
    if stop not in free[1].text:
        assert other == free[1]


def test_steady_state_compiles_nothing(policy):
    rng = np.random.default_rng(0)

    def prompts(count):
        return ["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(1, 60))) for _ in range(count)]

    settings = Sampling(max_new_tokens=20, temperature=0.8, stop=("qq",))
    generate(policy, [*prompts(9), "a", "b" * 50], settings, batch_size=4)
    generate(policy, [*["a"] * 4, *["c" * 20] * 4], settings, batch_size=4)
    with jax.log_compiles(), count_compilations() as compiled:
        generate(
            policy,
            prompts(23),
            dataclasses.replace(settings, seed=3, max_new_tokens=17, stop=("ab", "c")),
            batch_size=4,
        )
    assert not compiled


def test_chat_and_token_prompts(policy):
    messages = [{"role": "user", "content": "hi"}]
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = policy.encode(text)
    made = generate(policy, [messages, text, ids], Sampling(max_new_tokens=6))
    assert made[0] == made[1] == made[2]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["a", ""], "prompt 1: the prompt has no tokens"),
        (["a" * 510], "exceed the context of 512"),
        ([[5, 9999]], "outside the vocabulary"),
    ],
)
def test_bad_prompts(policy, prompts, message):
    with pytest.raises(LuthierError, match=message):
        generate(policy, prompts, Sampling(max_new_tokens=8))


def test_progress_and_no_prompts(policy):
    seen = []
    assert generate(policy, [], Sampling()) == []
    generate(policy, list("abcde"), Sampling(max_new_tokens=2), batch_size=2, progress=lambda *x: seen.append(x))
    assert seen == [(2, 5), (4, 5), (5, 5)]

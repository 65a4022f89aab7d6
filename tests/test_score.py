"""Scoring against transformers' log_softmax, and against itself under other batches."""

import dataclasses

import hf_layout
import jax
import numpy as np
import pytest
import tiny_policy

from luthier.decoding import Sampling, batching, generate, score
from luthier.decoding.score import score_tokens
from luthier.errors import LuthierError
from luthier.models import Transformer
from luthier.tuners import bind

PAIRS = [
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": "a", "completion": "b"},
    {"prompt": "x" * 60, "completion": "y" * 45},
    {"prompt": "", "completion": "Once upon a time"},
    {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "hello"}]},
]


@pytest.fixture(scope="module")
def policy():
    return tiny_policy.policy()


@pytest.mark.parametrize("name", ["llama_gqa_tied", "gemma2"])
def test_scores_equal_transformers(policy, name):
    """Both sequences at once, cut at several places, against log_softmax of transformers' logits."""
    directory = hf_layout.GOLDENS / "families" / name
    config, params = hf_layout.load(directory)
    theirs = dataclasses.replace(policy, bound=bind(Transformer(config, remat="none")), variables={"params": params})
    golden = np.load(directory / "logits.npz")
    cuts = [(0, 1), (0, 20), (1, 5), (1, 16)]
    pairs = [(golden[f"tokens_{i}"][:cut], golden[f"tokens_{i}"][cut:]) for i, cut in cuts]
    for (i, cut), found in zip(cuts, score_tokens(theirs, pairs, batch_size=4)):
        logits, tokens = golden[f"logits_{i}"].astype(np.float64), golden[f"tokens_{i}"]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = logprobs[np.arange(cut - 1, len(tokens) - 1), tokens[cut:]]
        np.testing.assert_allclose(found.logprobs, expected, atol=1e-4)
        assert found.logprob == pytest.approx(expected.sum(), abs=1e-3)


def test_batches_and_padding_do_not_change_scores(policy):
    alone = score(policy, PAIRS, batch_size=1)
    for one, other in zip(score(policy, PAIRS, batch_size=16), alone):
        assert one.token_ids == other.token_ids
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-5)
        assert one.logprob == pytest.approx(sum(other.logprobs), abs=1e-3)


def test_scores_equal_the_samplers_logprobs(policy):
    made = generate(policy, ["The sky is", "a"], Sampling(max_new_tokens=20, temperature=1.0))
    pairs = [(policy.encode(prompt), g.token_ids) for prompt, g in zip(["The sky is", "a"], made)]
    for scored, generation in zip(score_tokens(policy, pairs), made):
        assert scored.token_ids == generation.token_ids
        np.testing.assert_allclose(scored.logprobs, generation.logprobs, atol=2e-5)


def test_tokens_scored_are_those_of_the_completion(policy):
    text, start, chat = (score(policy, [PAIRS[i]])[0] for i in (0, 3, 4))
    assert policy.tokenizer.decode(text.token_ids) == " blue."
    assert policy.tokenizer.decode(start.token_ids) == "Once upon a time"
    assert policy.tokenizer.decode(chat.token_ids) == "hello<|im_end|>"


def test_a_system_beside_messages_is_read_as_in_training(policy):
    told, asked, answer = (
        [{"role": role, "content": text}] for role, text in (("system", "S"), ("user", "hi"), ("assistant", "yo"))
    )
    whole = {"prompt": told + asked, "completion": answer}
    beside = {"prompt": asked, "completion": answer, "system": "S"}
    (expected, found, own, none) = score(
        policy, [whole, beside, {**whole, "system": "other"}, {**beside, "system": ""}]
    )
    assert found == own == expected and none.logprobs != expected.logprobs


def test_no_array_of_batch_time_vocabulary(monkeypatch):
    """With a chunk limit of 2 rows × 8 places, the compiled program holds no larger logits."""
    module = __import__("luthier.decoding.score", fromlist=["_logprobs"])
    policy = tiny_policy.policy(vocab_size=5000)
    pairs = [([1, 2, 3], list(range(64)))] * 2
    whole = [s.logprobs for s in score_tokens(policy, pairs)]
    jax.clear_caches()
    monkeypatch.setattr(batching, "LOGITS", 2 * 8 * 5000)
    np.testing.assert_allclose([s.logprobs for s in score_tokens(policy, pairs)], whole, atol=2e-5)
    batch = {key: np.ones((2, 96), np.int32) for key in ("tokens", "positions", "segment_ids")}
    places = np.zeros((2, 64), np.int32)
    text = module._logprobs.lower(policy.variables, batch, places, places, bound=policy.bound).compile().as_text()
    jax.clear_caches()
    assert "f32[2,8,5000]" in text or "f32[16,5000]" in text
    assert "2,64,5000]" not in text and "128,5000]" not in text


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ({"prompt": "a"}, "pair 0: no field 'completion'"),
        ({"prompt": "a", "completion": ""}, "pair 0: the completion is empty"),
        ({"prompt": "a", "completion": "b", "system": "S"}, "'system' stands beside a prompt of plain text"),
        ({"prompt": "a" * 300, "completion": "b" * 300}, "exceed the context of 512"),
    ],
)
def test_bad_pairs(policy, pair, message):
    with pytest.raises(LuthierError, match=message):
        score(policy, [pair])

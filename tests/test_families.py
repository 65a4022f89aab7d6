"""Every family against transformers' own logits and gradients on tiny random models (goldens/make_families.py)."""

import dataclasses
import functools
import json

import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from luthier.errors import LuthierError
from luthier.models import ModelConfig, Transformer, init_cache
from luthier.tuners import bind

TOLERANCE = 1e-4  # absolute, on logits of order 1 to 10, in float32


@dataclasses.dataclass(frozen=True)
class Family:
    bound: object
    variables: dict
    expected: dict

    def logits(self, tokens, positions, segments):
        batch = {"tokens": tokens, "positions": positions, "segment_ids": segments}
        hidden, _ = self.bound.hidden(self.variables, {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()})
        return np.asarray(self.bound.unembed(self.variables, hidden))


@functools.cache
def family(name: str) -> Family:
    config, params = hf_layout.load(hf_layout.GOLDENS / "families" / name)
    expected = dict(np.load(hf_layout.GOLDENS / "families" / name / "logits.npz"))
    return Family(bind(Transformer(config, remat="none")), {"params": params}, expected)


def alone(f: Family, i: int):
    tokens = f.expected[f"tokens_{i}"][None]
    positions = np.arange(tokens.shape[1])[None]
    return tokens, positions, np.ones_like(tokens)


def packed(f: Family):
    """Both sequences in one row, then padding."""
    first, second = f.expected["tokens_0"], f.expected["tokens_1"]
    end = np.zeros(3, np.int32)
    tokens = np.concatenate([first, second, end])
    positions = np.concatenate([np.arange(len(first)), np.arange(len(second)), end])
    segments = np.concatenate([np.full(len(first), 1), np.full(len(second), 2), end])
    return tokens[None], positions[None], segments[None]


def padded(f: Family, side: str):
    mask = f.expected[f"{side}_mask"]
    return f.expected[f"{side}_tokens"], np.maximum(mask.cumsum(1) - 1, 0), mask.astype(np.int32)


@pytest.mark.parametrize("name", hf_layout.FAMILIES)
@pytest.mark.parametrize("form", ["alone", "packed", "right", "left"])
def test_logits_equal_transformers(name, form):
    f = family(name)
    if form == "alone":
        got = [f.logits(*alone(f, i))[0] for i in (0, 1)]
    elif form == "packed":
        row, length = f.logits(*packed(f))[0], len(f.expected["tokens_0"])
        got = [row[:length], row[length:-3]]
    else:
        rows, mask = f.logits(*padded(f, form)), f.expected[f"{form}_mask"]
        got = [rows[i][mask[i]] for i in (0, 1)]
    second = f.expected["logits_1" if form in ("alone", "packed") else f"{form}_logits_1"]
    np.testing.assert_allclose(got[0], f.expected["logits_0"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(got[1], second, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", hf_layout.FAMILIES)
def test_cached_decoding_equals_the_full_forward(name):
    """A left-padded batch: prefill, then one token at a time, in a cache longer than needed."""
    f = family(name)
    tokens, positions, segments = (jnp.asarray(x, jnp.int32) for x in padded(f, "left"))
    length, prefill = tokens.shape[1], 11
    cache = init_cache(f.bound.model.config, len(tokens), length + 2)
    step = jax.jit(lambda batch, cache: f.bound.hidden(f.variables, batch, cache=cache))
    pieces = []
    for start, stop in [(0, prefill), *((t, t + 1) for t in range(prefill, length))]:
        part = {"tokens": tokens, "positions": positions, "segment_ids": segments}
        hidden, cache = step({k: v[:, start:stop] for k, v in part.items()}, cache)
        pieces.append(np.asarray(f.bound.unembed(f.variables, hidden)))
    got, mask = np.concatenate(pieces, axis=1), f.expected["left_mask"]
    np.testing.assert_allclose(got[0][mask[0]], f.expected["logits_0"], atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(got[1][mask[1]], f.expected["left_logits_1"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "name, remat",
    [*((name, "dots") for name in hf_layout.FAMILIES), ("gemma3_text", "none"), ("gemma3_text", "full")],
)
def test_gradients_equal_autograd(name, remat):
    """d/dW of the weighted negative log-likelihood of both sequences, in one packed row."""
    f = family(name)
    bound = bind(Transformer(f.bound.model.config, remat=remat))
    tokens, positions, segments = packed(f)
    targets = np.roll(tokens, -1, axis=1)
    weights = np.zeros(tokens.shape, np.float32)
    for number in (1, 2):
        where = np.flatnonzero(segments[0] == number)[:-1]
        weights[0, where] = f.expected[f"weights_{number - 1}"][:-1]
    batch = {"tokens": tokens, "positions": positions.astype(np.int32), "segment_ids": segments.astype(np.int32)}

    def loss(params):
        variables = {"params": params}
        logits = bound.unembed(variables, bound.hidden(variables, batch)[0])
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return -(weights * chosen).sum()

    nll, grads = jax.jit(jax.value_and_grad(loss))(f.variables["params"])
    assert abs(float(nll) - f.expected["nll"]) < 1e-5 * abs(f.expected["nll"])
    names = [key.removeprefix("grad_norm/") for key in f.expected if key.startswith("grad_norm/")]
    assert len(names) >= 20
    for weight in names:
        grad = hf_layout.hf_leaf(grads, weight, gemma=name.startswith("gemma")).ravel()
        norm = f.expected[f"grad_norm/{weight}"]
        picked = f.expected[f"grad_slice/{weight}"]
        gap = np.linalg.norm(grad[:: max(1, grad.size // 64)][:64] - picked)
        # k biases of models without q/k norm have a zero gradient up to rounding: softmax ignores a shift.
        assert gap <= 2e-5 * max(norm, 1.0), weight
        assert abs(np.linalg.norm(grad.astype(np.float64)) - norm) <= 2e-5 * max(norm, 1.0), weight


@pytest.mark.parametrize("name", ["llama_llama3_rope", "llama_linear_rope", "gemma2", "gemma3_text", "qwen2_window"])
def test_older_spelling_of_the_config_is_the_same_model(name):
    """Configs on the hub before transformers 5: rope_theta, rope_scaling, rope_local_base_freq, no layer types."""
    hf = json.loads((hf_layout.GOLDENS / "families" / name / "config.json").read_text())
    rope = hf.pop("rope_parameters")
    full = dict(rope.get("full_attention", rope))
    old = {**hf, "rope_theta": full.pop("rope_theta")}
    if full["rope_type"] != "default":
        old["rope_scaling"] = full
    if name == "gemma3_text":
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 2
    if name != "llama_linear_rope":
        old.pop("layer_types", None)
    if "rope_scaling" in old and name == "llama_linear_rope":
        old["rope_scaling"] = {"type": "linear", "factor": full["factor"]}
    expected = family(name).bound.model.config
    assert ModelConfig.from_hf(old) == expected
    assert ModelConfig.from_hf(expected.to_hf()) == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"model_type": "mixtral"}, ["mixtral", "not supported", "config.json"]),
        ({"model_type": "lama"}, ["lama", "not supported", "llama"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["yarn", "not supported", "llama3"]),
        ({"hidden_act": "relu"}, ["relu", "not supported"]),
        ({"hidden_size": None}, ["hidden_size", "missing"]),
    ],
)
def test_unsupported_models_are_refused_in_one_line(change, words):
    hf = json.loads((hf_layout.GOLDENS / "families" / "llama_mha" / "config.json").read_text()) | change
    hf = {key: value for key, value in hf.items() if value is not None}
    with pytest.raises(LuthierError) as caught:
        ModelConfig.from_hf(hf)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)

"""Tuners against PEFT's own outputs and gradients (goldens/make_peft_tuners.py) and against their formulas."""

import dataclasses
import functools
import json
import re
import shutil

import flax.linen as nn
import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
import tiny_policy
import tiny_training
from flax.traverse_util import flatten_dict, unflatten_dict

from luthier import weights
from luthier.config import resolve, spec
from luthier.decoding import Sampling, generate
from luthier.decoding.policy import from_source
from luthier.errors import LuthierError
from luthier.models import Transformer, attention
from luthier.objectives import Objective
from luthier.parallel import Sharder
from luthier.training.state import init_variables
from luthier.training.step import make_gradients
from luthier.tuners import bind, merge, plain
from luthier.tuners.adapter import adapter
from luthier.tuners.ia3 import ia3
from luthier.tuners.lofit import lofit, strongest
from luthier.tuners.lora import lora
from luthier.tuners.prefix import prefix, prefix_of
from luthier.tuners.prompt_tuning import prompt_tuning

GOLDENS = hf_layout.GOLDENS / "peft_tuners"
LLAMA, QWEN, GEMMA = "llama_gqa_tied", "qwen2", "gemma3_text"
TUNERS = {
    "ia3": (LLAMA, ia3()),
    "ia3_bias": (QWEN, ia3()),
    "dora": (LLAMA, lora(rank=4, alpha=8.0, dora=True)),
    "dora_bias": (QWEN, lora(rank=2, alpha=3.0, dora=True, patterns=("layers/attention/k",))),
    "pissa": (LLAMA, lora(rank=4, alpha=8.0, init="pissa")),
    "prefix": (LLAMA, prefix(length=5)),
    "prefix_mlp": (LLAMA, prefix(length=3, hidden=12)),
    "prefix_window": (GEMMA, prefix(length=5)),
}
HEADS = ((0, 1), (2, 3))
# Tuners that PEFT lacks, all at once; without noise they start at the frozen model.
OURS = (
    adapter(size=6),
    adapter(size=6, placement="parallel", activation="gelu", collection="beside"),
    lofit(heads=HEADS, std=0.0),
)


@functools.cache
def model(family: str, remat: str = "dots"):
    config, params = hf_layout.load(hf_layout.GOLDENS / "families" / family)
    return Transformer(config, remat=remat), jax.tree.map(jnp.asarray, params)


@functools.partial(jax.jit, static_argnames="bound")
def forward(variables, batch, *, bound):
    return bound.unembed(variables, bound.hidden(variables, batch)[0])


@functools.partial(jax.jit, static_argnames="bound")
def with_gradients(trained, frozen, batch, *, bound):
    """Logits, loss, and gradients of the trained collections."""

    def loss_of(trained):
        logits = forward({**frozen, **trained}, batch, bound=bound)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]
        return -jnp.sum(batch["loss_weights"] * chosen) / jnp.sum(batch["loss_weights"]), logits

    (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return logits, loss, gradients


def run(bound, variables, batch):
    names = [tuner.collection for tuner in bound.tuners]
    frozen = {name: tree for name, tree in variables.items() if name not in names}
    return with_gradients({name: variables[name] for name in names}, frozen, batch, bound=bound)


@functools.cache
def started(bound, family):
    variables = init_variables(bound, tiny_training.SHARDER, 0, {"params": model(family)[1]})
    return jax.device_get(variables)  # as numbers of files are, for the same compiled program


def shaken(variables, bound, scale=0.1, seed=1):
    """The tuners' trained numbers moved away from their start."""
    rng = np.random.default_rng(seed)
    move = lambda x: x + scale * rng.standard_normal(x.shape).astype(x.dtype)  # noqa: E731
    return {**variables, **{t.collection: jax.tree.map(move, variables[t.collection]) for t in bound.tuners}}


def example(expected):
    is_label = np.concatenate([np.zeros((len(expected["weights"]), 1)), expected["weights"]], axis=1)
    return tiny_training.unpacked(expected["tokens"], is_label)


def close(got, want, tolerance=1e-5):
    """Relative L2 of every leaf."""
    got, want = flatten_dict(got, sep="/"), flatten_dict(want, sep="/")
    assert got.keys() == want.keys()
    for path, x in want.items():
        assert np.shape(got[path]) == np.shape(x), path
        assert np.linalg.norm(x) > 1e-4, path
        assert np.linalg.norm(got[path] - x) <= tolerance * np.linalg.norm(x), path


# PEFT's layouts written out by hand; nothing of luthier.weights is used.


def turned(family: str, keys: np.ndarray, by: int) -> np.ndarray:
    """Keys `[L, n, K, D]` of tokens `by` positions later: (x_i, x_{i + D/2}) turn by `by` × frequency."""
    hf = json.loads((hf_layout.GOLDENS / "families" / family / "config.json").read_text())
    ropes = (
        [hf["rope_parameters"].get(kind, hf["rope_parameters"]) for kind in hf["layer_types"]]
        if ("layer_types" in hf)
        else [hf["rope_parameters"]] * hf["num_hidden_layers"]
    )
    half = keys.shape[-1] // 2
    out = []
    for rope, layer in zip(ropes, keys, strict=True):
        frequencies = rope["rope_theta"] ** (-np.arange(half) / half) / rope.get("factor", 1.0)
        pairs = (layer[..., :half] + 1j * layer[..., half:]) * np.exp(1j * by * frequencies)
        out.append(np.concatenate([pairs.real, pairs.imag], axis=-1))
    return np.stack(out).astype(keys.dtype)


def from_peft(name: str, arrays: dict[str, np.ndarray]) -> dict:
    """PEFT's tensors, or gradients of them, as the collection of the tuner."""
    family, tuner = TUNERS[name]
    if name.startswith("prefix"):
        config = model(family)[0].config
        length = {"prefix": 5, "prefix_mlp": 3, "prefix_window": 5}[name]

        def pairs(rows):
            """`[n, L · 2 · K · D]` as `[L, 2, n, K, D]`, keys turned back."""
            rows = rows.reshape(len(rows), config.num_layers, 2, config.num_kv_heads, config.head_dim)
            kv = rows.transpose(1, 2, 0, 3, 4)
            return np.stack([turned(family, kv[:, 0], -length), kv[:, 1]], axis=1)

        found = {key.partition("prompt_encoder.")[2]: array for key, array in arrays.items()}
        if name != "prefix_mlp":
            (rows,) = found.values()
            return {"layers": {"attention": {"attend": {"kv": pairs(rows)}}}}
        return {
            "rows": found["embedding.weight"],
            "w1": found["transform.0.weight"].T,
            "b1": found["transform.0.bias"],
            "w2": pairs(found["transform.2.weight"].T).transpose(2, 0, 1, 3, 4),
            "b2": pairs(found["transform.2.bias"][None])[:, :, 0],
        }
    layers = {}
    for key, array in arrays.items():
        pattern = r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)_proj\.(lora_A|lora_B|lora_magnitude_vector|ia3_l)"
        layer, block, module, kind = re.search(pattern, key).groups()
        block = {"self_attn": "attention", "mlp": "mlp"}[block]
        if kind == "ia3_l":
            path, array = (block, "inner" if module == "down" else module, "scale"), array.ravel()
        else:
            path = (block, module, {"lora_A": "a", "lora_B": "b", "lora_magnitude_vector": "m"}[kind])
        layers.setdefault(("layers", *path), {})[int(layer)] = array.T
    return unflatten_dict({path: np.stack([x[i] for i in sorted(x)]) for path, x in layers.items()})


def part(expected, prefix):
    return {key.removeprefix(prefix): array for key, array in expected.items() if key.startswith(prefix)}


@functools.cache
def case(name: str):
    """(bound, variables with PEFT's numbers, what PEFT says, batch)."""
    family, tuner = TUNERS[name]
    transformer, params = model(family)
    bound = bind(transformer, [tuner])
    expected = dict(np.load(GOLDENS / name / "expected.npz"))
    numbers = part(expected, "value/") or hf_layout.read_safetensors(GOLDENS / name / "adapter_model.safetensors")
    variables = {**started(bound, family), tuner.collection: from_peft(name, numbers)}
    if start := part(expected, "start/"):  # to the sign, and where singular values lie close a singular vector is any
        variables["lora_start"] = from_peft(name, start)
    return bound, variables, expected, example(expected)


@pytest.mark.parametrize("name", TUNERS)
def test_outputs_and_counts_equal_peft(name):
    bound, variables, expected, batch = case(name)
    logits, loss, gradients = run(bound, variables, batch)
    assert abs(float(loss) - expected["loss"]) < 1e-5
    (collection,) = gradients
    close(gradients[collection], from_peft(name, part(expected, "grad/")))
    close({"logits": logits}, {"logits": expected["logits"]}, 3e-6)
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=3e-5)
    collection = bound.tuners[0].collection
    fresh = started(bound, TUNERS[name][0])[collection]
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, variables[collection])
    assert sum(x.size for x in jax.tree.leaves(fresh)) == expected["count"]
    if bound.tuners[0].merge:
        merged = forward({"params": merge(bound, variables)}, batch, bound=bind(bound.model))
        close({"logits": merged}, {"logits": expected["merged_logits"]}, 3e-6)
        np.testing.assert_allclose(merged, expected["merged_logits"], rtol=1e-5, atol=3e-5)


def test_pissa_starts_at_pefts_triplets():
    """Up to the sign of each; what is saved is a plain LoRA of twice the rank."""
    bound, variables, expected, batch = case("pissa")
    fresh = started(bound, LLAMA)
    theirs = flatten_dict(from_peft("pissa", part(expected, "start/")))
    for path, ours in flatten_dict(fresh["lora"]).items():
        np.testing.assert_allclose(np.abs(ours), np.abs(theirs[path]), atol=2e-4)
        np.testing.assert_array_equal(ours, flatten_dict(fresh["lora_start"])[path])
    options, numbers = plain(bound.tuners[0], {"rank": 4, "alpha": 8.0, "init": "pissa"}, variables)
    saved = bind(bound.model, [lora(**options)])
    logits = forward({"params": variables["params"], "lora": numbers}, batch, bound=saved)
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("name", ["ia3", "dora", "pissa", "ours"])
def test_training_starts_at_the_frozen_model(name):
    """… and every number moves it."""
    transformer, params = model(LLAMA)
    batch = case("ia3")[3]
    bound = bind(transformer, OURS) if name == "ours" else case(name)[0]
    fresh = started(bound, LLAMA)
    base = forward({"params": params}, batch, bound=bind(transformer))
    np.testing.assert_allclose(run(bound, fresh, batch)[0], base, rtol=1e-5, atol=3e-5)
    moved, _, gradients = run(bound, shaken(fresh, bound), batch)
    assert np.abs(moved - base).max() > 1e-2
    assert all(np.linalg.norm(g) > 1e-4 for g in jax.tree.leaves(gradients))
    if name == "ours":
        for g in jax.tree.leaves(gradients["lofit"]):
            assert tuple(map(tuple, np.argwhere(np.abs(g).sum(axis=-1)))) == HEADS


def test_what_is_saved_of_chosen_heads():
    """All heads, and zeros for the others."""
    tuner = OURS[-1]
    variables = shaken(started(bind(model(LLAMA)[0], OURS), LLAMA), bind(model(LLAMA)[0], [tuner]))
    options, numbers = plain(tuner, {"std": 0.0, "heads": HEADS}, variables)
    assert options == {"std": 0.0, "heads": ()}
    for path, x in flatten_dict(numbers).items():
        np.testing.assert_array_equal(x[0, 1], flatten_dict(variables["lofit"])[path][0, 1])
        assert tuple(map(tuple, np.argwhere(np.abs(x).sum(axis=-1)))) == HEADS


# Adapter directories.


@pytest.mark.parametrize("name", TUNERS)
def test_pefts_directories_are_read_and_come_back(name, tmp_path):
    family, tuner = TUNERS[name]
    bound, variables, _, _ = case(name)
    config, directory = bound.model.config, GOLDENS / name
    theirs = hf_layout.read_safetensors(directory / "adapter_model.safetensors")
    saved = weights.read_adapter(directory, config)
    if name == "prefix_mlp":
        expected = plain(tuner, {}, variables)[1]
    else:
        expected = from_peft(name, theirs)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), saved.variables, expected)
    again = bind(bound.model, [resolve(spec(saved.name, **saved.options), "tuner")()])
    shapes = nn.unbox(jax.eval_shape(again.init, jax.random.key(0)))[tuner.collection]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, saved.variables)
    weights.write_adapter(tmp_path, saved, base=f"tests/goldens/families/{family}", config=config)
    ours = hf_layout.read_safetensors(tmp_path / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        np.testing.assert_allclose(ours[key], array, rtol=1e-5, atol=1e-6, err_msg=key)
    written, golden = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, directory))
    for settings in (written, golden):
        for key in ("target_modules", "feedforward_modules"):
            settings[key] = sorted(settings.get(key, ()))
    ignored = {"feedforward_modules": [], "encoder_hidden_size": 0, "prefix_projection": 0, "lora_dropout": 0}
    assert {**golden, **ignored} == {**golden, **written, **ignored}


_PARALLEL = {"size": 6, "placement": "parallel", "scale": 4.0, "patterns": ("layers/mlp",)}
OWN = {"adapter": (adapter(**_PARALLEL), _PARALLEL), "lofit": (lofit(form="scale"), {"form": "scale"})}


@pytest.fixture
def own_directory(tmp_path):
    """(a directory of a tuner that PEFT lacks, beside its model; bound; variables)."""

    def make(name):
        tuner, options = OWN[name]
        bound = bind(model(LLAMA)[0], [tuner])
        variables = shaken(started(bound, LLAMA), bound)
        tiny_hf.family_directory(tmp_path / "base", LLAMA)
        saved = weights.Adapter(name, *plain(tuner, options, variables))
        weights.write_adapter(tmp_path / "tuned", saved, base="../base")
        return tmp_path / "tuned", bound, variables

    return make


@pytest.mark.parametrize("name", OWN)
def test_a_tuner_that_peft_lacks_is_saved(name, own_directory):
    directory, bound, variables = own_directory(name)
    policy = from_source(str(directory))
    (numbers,) = (tree for key, tree in policy.variables.items() if key != "params")
    tiny_hf.equal(numbers, variables[name])
    (tuner,) = policy.bound.tuners
    assert (tuner.name, tuner.patterns) == (name, bound.tuners[0].patterns)


def edited(options=(), **change):
    def apply(directory):
        file = directory / "adapter_config.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "options": {**content["options"], **dict(options)}, **change}))

    return apply


@pytest.mark.parametrize(
    "change, words",
    [
        (edited(tuner="os:system"), "unknown tuner 'os:system'"),
        (edited(tuner="adaptor"), "unknown tuner 'adaptor'.*adapter"),
        (
            edited(options={"size": 5}),
            r"an adapter does not fit: layers/mlp/b_down is \(3, 6\), for this model \(3, 5\)",
        ),
        (edited(options={"sizes": 6}), "unknown option 'sizes'.*size"),
        (edited(base_model_name_or_path="../other"), "has 3 layers, the base model 2"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    ],
)
def test_directories_that_do_not_fit(change, words, own_directory):
    directory, _, _ = own_directory("adapter")
    tiny_hf.family_directory(directory.parent / "other", QWEN)
    change(directory)
    with pytest.raises(LuthierError, match=words) as caught:
        from_source(str(directory))
    assert "\n" not in str(caught.value)


PEFT_MISTAKES = {
    "prefix of another model": ("prefix", QWEN, {}, r"has shape \[5, 192\], a prefix of 5 for this model \[5, 96\]"),
    "vectors of another model": ("ia3", QWEN, {}, "a layer 2, the base model has 2"),
    "encoder and decoder": ("prefix", LLAMA, {"num_transformer_submodules": 2}, "num_transformer_submodules 2"),
    "whole modules": ("ia3", LLAMA, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "no magnitudes": ("pissa", LLAMA, {"use_dora": True}, "has no lora_magnitude_vector"),
    "magnitudes": ("dora", LLAMA, {"use_dora": False}, "has a lora_magnitude_vector"),
    "without the model": ("prefix", None, {}, "its config is needed"),
}


@pytest.mark.parametrize("mistake", PEFT_MISTAKES)
def test_peft_directories_that_do_not_fit(mistake, tmp_path):
    name, family, change, words = PEFT_MISTAKES[mistake]
    shutil.copytree(GOLDENS / name, tmp_path / "tuned", ignore=shutil.ignore_patterns("*.npz"))
    file = tmp_path / "tuned" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(LuthierError, match=words) as caught:
        weights.read_adapter(tmp_path / "tuned", model(family)[0].config if family else None)
    assert "\n" not in str(caught.value)


@pytest.mark.parity
@pytest.mark.parametrize("name", TUNERS)
def test_peft_loads_what_we_write(name, tmp_path):
    """… made of our numbers, PiSSA's and the MLP's in their plain form."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    (family, tuner), (bound, variables, expected, _) = TUNERS[name], case(name)
    base = hf_layout.GOLDENS / "families" / family
    options = dict(weights.read_adapter(GOLDENS / name, bound.model.config).options)
    if name == "pissa":
        options |= {"rank": 4, "alpha": 8.0}
    saved = weights.Adapter(tuner.name, *plain(tuner, options, variables))
    weights.write_adapter(tmp_path, saved, base=str(base), config=bound.model.config)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        logits = theirs(torch.tensor(expected["tokens"], dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(logits, expected["logits"], rtol=1e-5, atol=3e-5)


# The unified view (arXiv 2110.04366, table 1): each form as Δh of what a branch, a map or a head gives, written
# down in numpy with a Llama around it, one unpacked segment at a time.


def bottleneck(scale, f=lambda x: np.maximum(x, 0)):
    return lambda z, n: scale * (f(z @ n["w_down"] + n["b_down"]) @ n["w_up"] + n["b_up"])


def gated(q, k, v, seen, kv):
    """(1 − λ) attention + λ softmax(q P_kᵀ) P_v, with λ the prefix's share of the weights."""
    both = [np.where(see, np.einsum("thd,shd->hts", q, keys), -np.inf) for keys, see in ((kv[0], True), (k, seen))]
    sums = [np.exp(x).sum(-1, keepdims=True) for x in both]
    share = sums[0] / (sums[0] + sums[1])
    own, prefixed = (np.einsum("hts,shd->thd", softmax(x), values) for x, values in zip(both, (kv[1], v)))
    share = share[..., 0].T[..., None]
    return (1 - share) * prefixed + share * own


FORMS = {
    "mam": (  # a prefix on attention, a scaled parallel adapter on the MLP
        [prefix(length=4), adapter(size=6, placement="parallel", scale=4.0, patterns=("layers/mlp",))],
        {"attend": gated, "beside": bottleneck(4.0)},
    ),
    "sequential adapters, low rank beside maps, heads": (
        [adapter(size=6), lora(rank=3, alpha=6.0, patterns=("layers/attention/[qv]",)), lofit(heads=HEADS)],
        {
            "behind": bottleneck(1.0),
            "map": lambda x, n: 2.0 * x @ n["a"] @ n["b"],
            "heads": lambda o, n, layer: np.stack([
                o[:, h] * (1 + n["a"][h]) + n["v"][h] if (layer, h) in HEADS else o[:, h] for h in range(4)
            ], axis=1),
        },
    ),
}  # fmt: skip


def softmax(x):
    weights = np.exp(x - x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def norm(x, scale, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def llama(config, params, numbers, forms, tokens):
    """Logits of one segment; `numbers` are the tuners' by path, `[L, …]` each."""
    p = {path: np.asarray(x, np.float64) for path, x in flatten_dict(params, sep="/").items()}
    n = {path: np.asarray(x, np.float64) for path, x in numbers.items()}
    x, length, half = p["embed/embedding"][tokens], len(tokens), config.head_dim // 2
    angles = np.arange(length)[:, None] * config.rope.theta ** (-np.arange(half) / half)
    causal = np.arange(length)[:, None] >= np.arange(length)
    turn = lambda y: np.concatenate([  # noqa: E731
        y[..., :half] * np.cos(angles)[:, None] - y[..., half:] * np.sin(angles)[:, None],
        y[..., half:] * np.cos(angles)[:, None] + y[..., :half] * np.sin(angles)[:, None],
    ], axis=-1)  # fmt: skip
    for layer in range(config.num_layers):
        # ruff: noqa: B023
        w = {path.removeprefix("layers/"): y[layer] for path, y in p.items() if path.startswith("layers/")}

        def at(site):
            found = {k.rpartition("/")[2]: y[layer] for k, y in n.items() if k.rpartition("/")[0] == f"layers/{site}"}
            return found or None

        def mapped(y, site):
            out = y @ w[f"{site}/kernel"]
            return out + forms["map"](y, at(site)) if at(site) else out

        def branch(z, h, site):
            """What the branch gives to the stream, from what it reads."""
            h = h + forms["beside"](z, at(site)) if at(site) and "beside" in forms else h
            return h + forms["behind"](h, at(site)) if at(site) and "behind" in forms else h

        z = norm(x, w["attention_norm/scale"], config.norm_eps)
        q, k, v = (mapped(z, f"attention/{name}").reshape(length, -1, config.head_dim) for name in "qkv")
        q, k = turn(q) * config.head_dim**-0.5, turn(k)
        group = config.num_heads // config.num_kv_heads
        k, v = k.repeat(group, axis=1), v.repeat(group, axis=1)
        if "attend" in forms:
            heads = forms["attend"](q, k, v, causal, at("attention/attend")["kv"].repeat(group, axis=2))
        else:
            weights = softmax(np.where(causal, np.einsum("thd,shd->hts", q, k), -np.inf))
            heads = np.einsum("hts,shd->thd", weights, v)
        if "heads" in forms:
            heads = forms["heads"](heads, at("attention/heads"), layer)
        x = x + branch(z, heads.reshape(length, -1) @ w["attention/o/kernel"], "attention")
        z = norm(x, w["mlp_norm/scale"], config.norm_eps)
        gate = z @ w["mlp/gate/kernel"]
        inner = gate / (1 + np.exp(-gate)) * (z @ w["mlp/up/kernel"])
        x = x + branch(z, inner @ w["mlp/down/kernel"], "mlp")
    return norm(x, p["final_norm/scale"], config.norm_eps) @ p["embed/embedding"].T


@pytest.mark.parametrize("name", FORMS)
def test_points_of_the_unified_view(name):
    """… on a packed row of two segments and padding."""
    tuners, forms = FORMS[name]
    transformer, params = model(LLAMA)
    bound = bind(transformer, tuners)
    variables = shaken(started(bound, LLAMA), bound, 0.3)
    lengths = (9, 5)
    tokens = [np.random.default_rng(i).integers(3, 128, n) for i, n in enumerate(lengths)]
    row = {
        "tokens": np.concatenate([*tokens, [0, 0]]),
        "segment_ids": np.repeat([1, 2, 0], [*lengths, 2]),
        "positions": np.concatenate([*map(np.arange, lengths), [0, 0]]),
    }
    batch = {key: jnp.asarray(x, jnp.int32)[None] for key, x in row.items()}
    logits = np.asarray(forward(variables, batch, bound=bound)[0])
    numbers = {}
    for tuner in tuners:
        numbers |= flatten_dict(variables[tuner.collection], sep="/")
    for part, segment in ((logits[:9], tokens[0]), (logits[9:14], tokens[1])):
        direct = llama(transformer.config, params, numbers, forms, segment)
        np.testing.assert_allclose(part, direct, rtol=1e-5, atol=1e-4)
        assert np.abs(direct - llama(transformer.config, params, {}, {}, segment)).max() > 0.1


def test_a_prefix_of_real_tokens_is_those_tokens_in_context():
    """… where layers have windows and rotate differently."""
    transformer, params = model(GEMMA)
    bound = bind(transformer, [prefix(length=6)])
    tokens = jnp.asarray(np.random.default_rng(0).integers(3, 128, (1, 17)))

    def logits(bound, variables, tokens):
        batch = {"tokens": tokens, "segment_ids": jnp.ones_like(tokens), "positions": jnp.arange(tokens.shape[1])[None]}
        return forward(variables, batch, bound=bound)

    base = bind(transformer)
    whole = logits(base, {"params": params}, tokens)[:, 6:]
    numbers = jax.jit(functools.partial(prefix_of, base))({"params": params}, tokens[0, :6])
    behind = logits(bound, {"params": params, "prefix": numbers}, tokens[:, 6:])
    np.testing.assert_allclose(behind, whole, rtol=1e-5, atol=3e-5)
    assert np.abs(whole - logits(base, {"params": params}, tokens[:, 6:])).max() > 0.1


# All sites at once, so that one program serves them, on a model with sliding windows.
EVERYWHERE = (
    ia3(),
    lora(rank=2, alpha=4.0, dora=True, patterns=("layers/attention/q", "layers/mlp/up")),
    adapter(size=3),
    lofit(heads=((0, 1), (1, 0), (1, 2))),
    prefix(length=5),
)


def test_generation_equals_the_same_without_a_cache():
    gemma = {"model_type": "gemma2", "head_dim": 8, "sliding_window": 8, "tie_word_embeddings": True}
    policy = tiny_policy.policy(**gemma)
    bound = bind(policy.bound.model, EVERYWHERE)
    variables = init_variables(bound, tiny_training.SHARDER, 0, policy.variables)
    policy = dataclasses.replace(policy, bound=bound, variables=shaken(variables, bound))
    assert policy.layers_apart  # so decoded apart; the expectation reads stacked weights
    of_an_mlp = dataclasses.replace(policy, bound=bind(bound.model, [prefix(hidden=4)]))
    assert of_an_mlp.layers_apart is None
    prompts = ["a", "The quick brown fox", "12 + 34 ="]
    made = generate(policy, prompts, Sampling(max_new_tokens=12, temperature=1.5), batch_size=4)
    for prompt, generation in zip(prompts, made):
        tokens = [*policy.encode(prompt), *generation.token_ids]
        row = np.zeros((1, 48), np.int32)
        row[0, : len(tokens)] = tokens
        batch = {"tokens": row, "positions": np.arange(48)[None], "segment_ids": np.ones_like(row)}
        logprobs = jax.nn.log_softmax(forward(policy.variables, batch, bound=bound)[0])
        first = len(tokens) - len(generation.token_ids)
        expected = [logprobs[first - 1 + i, token] for i, token in enumerate(generation.token_ids)]
        np.testing.assert_allclose(generation.logprobs, expected, atol=5e-5)


@pytest.mark.parametrize("window", [None, 7])
def test_a_prefix_stands_before_every_segment(window):
    """Also where a kernel would have masked by itself, for XLA then."""
    segments, positions = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 2, 0]]), np.array([[0, 1, 2, 0, 1, 2, 3, 4, 5, 0]])
    fields = {"segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    seen = np.zeros((10, 14), bool)
    for t in range(9):
        where = np.r_[np.arange(-4, 0), np.where(segments[0] == segments[0, t], positions[0], 99)]
        seen[t] = (where <= positions[0, t]) & (positions[0, t] - where < (window or 99))
    for dense in (True, False):
        mask = attention.make_mask(fields, fields, window, plain=True, dense=dense).behind(4)
        np.testing.assert_array_equal(mask.dense(jnp.bool_(True))[0, 0, :9], seen[:9])
    backend = functools.partial(attention.choose, "splash", Sharder(), jnp.float32, 10, 8, None)
    assert (backend(plain=mask.plain), backend(plain=True)) == ("xla", "splash")


def test_the_strongest_heads_are_found():
    a = np.zeros((3, 4, 8), np.float32)
    a[2, 1, 3], a[0, 3, :2], a[1, 0] = 5.0, 3.0, 0.1
    variables = {"lofit": {"layers": {"attention": {"heads": {"a": a}}}}}
    assert strongest(variables, 2) == ((2, 1), (0, 3))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("heads", [(), ((0, 1), (2, 3))], ids=["all heads", "two heads"])
def test_lofits_penalty(parts, heads):
    """λ Σ|A| and its gradient λ sign(A), once whatever the micro-batches, beside a loss that is Σ A² a row."""
    a = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)
    tree = lambda x: {"layers": {"attention": {"heads": x}}}  # noqa: E731
    read = np.ones((3, 4, 1), np.float32)
    if heads:
        read = np.zeros_like(read)
        read[tuple(np.array(heads).T)] = 1
    sums = lambda bound, variables, batch, rng: (  # noqa: E731
        len(batch["tokens"]) * jnp.sum(jax.tree.leaves(variables["lofit"])[0] ** 2),
        {},
    )
    bound = bind(model(LLAMA)[0], [lofit(form="scale", heads=heads, l1=0.5)])
    gradients = make_gradients(bound, Objective(lambda batch: len(batch["tokens"]), sums), micro_batches=parts)
    batch, frozen = {"tokens": jnp.zeros((4, 1), jnp.int32)}, {"lofit_heads": tree({"mask": read[..., 0]})}
    loss, found, _ = gradients({"lofit": tree({"a": a})}, frozen, batch, jnp.int32(0), 1024.0)
    assert float(loss) == pytest.approx((a**2).sum() + 0.5 * abs(a * read).sum(), rel=1e-5)
    np.testing.assert_allclose(jax.tree.leaves(found)[0], 2 * a + 0.5 * np.sign(a) * read, rtol=1e-5)
    assert bound.penalties({"lofit": tree({"a": a}), **frozen}, {"params": {}}) == [], "a tuner that is not trained"


@pytest.mark.parametrize(
    "make, words",
    [
        (
            lambda: ia3(patterns=("layers/mlp/iner",)),
            ["'layers/mlp/iner' matches no site", "tuner ia3", "Did you mean 'layers/mlp/inner'"],
        ),
        (lambda: adapter(patterns=("layers/atention",)), ["Did you mean 'layers/attention'"]),
        (lambda: adapter(patterns=("head",)), ["'head' matches no site", "Known: layers/attention, layers/mlp"]),
        (lambda: ia3(patterns=("layers/attention/attend",)), ["'layers/attention/attend' matches no site"]),
        (lambda: adapter(patterns=("layers/mlp/down",)), ["'layers/mlp/down' matches no site", "tuner adapter"]),
        (lambda: adapter(placement="paralel"), ["placement 'paralel'", "parallel"]),
        (lambda: adapter(activation="tanh"), ["activation 'tanh'"]),
        (lambda: lora(init="pisa"), ["init 'pisa'", "pissa"]),
        (lambda: lora(init="pissa", rank=64), ["no 64 singular values"]),
        (lambda: lofit(form="ofset"), ["form 'ofset'", "offset"]),
        (lambda: lofit(heads=((0, 4),)), ["no head 4 in layer 0", "4 heads"]),
        (lambda: lofit(collection="params"), ["collection 'params' is taken"]),
    ],
)
def test_mistakes_are_told(make, words):
    with pytest.raises(LuthierError) as caught:
        started(bind(model(LLAMA)[0], [make()]), LLAMA)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("tuner", [ia3(patterns=("layers/residual",)), prefix(), adapter(), lofit()])
def test_what_has_no_exact_merge_says_so(tuner):
    bound = bind(model(LLAMA)[0], [tuner])
    variables = {"params": {}, tuner.collection: {"layers": {"residual": {"scale": np.ones((3, 48))}}}}
    with pytest.raises(LuthierError, match=r"no exact merge|no linear map takes in the vector of layers/residual"):
        merge(bound, variables)


_K = ("layers/attention/k",)
_DORA = lora(rank=2, alpha=4.0, dora=True, collection="dora", patterns=("layers/attention/k", "layers/mlp/down"))
TOGETHER = {
    "a map's vector, then its update": (ia3(), lora(rank=2, alpha=4.0)),
    "a map's update, then its vector": (lora(rank=2, alpha=4.0), ia3()),
    "two updates": (lora(rank=2, alpha=4.0), lora(rank=3, alpha=6.0, collection="other", patterns=_K)),
    "dora first": (_DORA, lora(rank=2, alpha=4.0), ia3()),
    "dora behind other tuners": (ia3(), lora(rank=2, alpha=4.0), _DORA),
    "two doras": (lora(rank=2, alpha=4.0, dora=True), _DORA),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_tuners_of_the_same_maps_merge_together(name):
    """… on a model with biases, too."""
    transformer, params = model(QWEN)
    bound = bind(transformer, TOGETHER[name])
    variables = shaken(started(bound, QWEN), bound)
    batch = case("ia3_bias")[3]
    apart = forward(variables, batch, bound=bound)
    merged = forward({"params": merge(bound, variables)}, batch, bound=bind(transformer))
    assert np.abs(apart - forward({"params": params}, batch, bound=bind(transformer))).max() > 1e-2
    np.testing.assert_allclose(merged, apart, rtol=1e-5, atol=3e-5)


def test_frozen_weights_have_no_gradients():
    """FLOPs of compiled gradients against the products counted by hand.

    Of one layer, the loops of the compiled program having one turn then. Each map of n tokens is 2 · n · in · out
    forwards, as much for its input's gradient and as much for its own, which only full training computes.
    """
    embed, inner, vocabulary, rows, length, rank = 128, 512, 1024, 4, 16, 4
    shape = {"hidden_size": embed, "intermediate_size": inner, "vocab_size": vocabulary, "num_hidden_layers": 1}
    transformer = Transformer(tiny_policy.config(**shape, num_key_value_heads=4), remat="none")
    batch = {name: jax.ShapeDtypeStruct((rows, length), jnp.int32) for name in ("tokens", "segment_ids", "positions")}
    batch |= {"targets": batch["tokens"], "prompt_slots": batch["tokens"]}
    batch["loss_weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)

    def flops(tuners, trained):
        bound = bind(transformer, tuners)
        variables = nn.unbox(jax.eval_shape(bound.init, jax.random.key(0)))
        frozen = {name: tree for name, tree in variables.items() if name != trained}
        run = jax.jit(make_gradients(bound, tiny_training.sft_objective()))
        return run.lower({trained: variables[trained]}, frozen, batch, 0).compile().cost_analysis()["flops"]

    tokens, maps = rows * length, [(embed, embed)] * 4 + [(embed, inner)] * 2 + [(inner, embed)]
    products = 2 * tokens * (sum(i * o for i, o in maps) + embed * vocabulary)
    attention = 3 * 2 * (2 * tokens * length * embed)  # two products forwards, four backwards, whatever is trained
    low_rank = 3 * 2 * tokens * rank * sum(i + o for i, o in maps)
    # Under LoRA nothing is trained before the first queries, keys and values: their input has no gradient.
    first = 2 * tokens * 3 * (embed * embed + embed * rank)
    expected = {
        "params": 3 * products + attention,
        "prompt": 2 * products + attention,
        "lora": 2 * products + attention + low_rank - first,
    }
    found = {
        "params": flops([], "params"),
        "prompt": flops([prompt_tuning(length=2)], "prompt"),
        "lora": flops([lora(rank=rank)], "lora"),
    }
    for name, count in expected.items():
        assert count <= found[name] <= 1.05 * count, name  # the rest is not products
    assert all(0.6 < found[name] / found["params"] < 0.7 for name in ("prompt", "lora"))

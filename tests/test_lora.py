"""LoRA against PEFT's own outputs and gradients for the same A and B (goldens/make_peft_lora.py)."""

import dataclasses
import functools
import re

import flax.linen as nn
import flax.traverse_util
import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_training

from luthier import weights
from luthier.errors import LuthierError
from luthier.models import Transformer
from luthier.optim import optimizers, schedules
from luthier.training.step import make_gradients
from luthier.tuners import bind, merge
from luthier.tuners.lora import lora

ADAPTERS = {
    "lora": lora(rank=4, alpha=8.0),
    "rslora": lora(rank=4, alpha=8.0, rslora=True, patterns=("layers/attention/[qv]", "layers/mlp/down")),
}


def stacked(arrays: dict[str, np.ndarray]) -> dict:
    """PEFT's `…layers.N.MODULE.lora_A.weight` [r, in] as our `layers/…/a` [L, in, r]."""
    layers = {}
    for name, array in arrays.items():
        found = re.search(r"layers\.(\d+)\.(self_attn|mlp)\.(\w+)_proj\.lora_(A|B)", name)
        block = {"self_attn": "attention", "mlp": "mlp"}[found[2]]
        layers.setdefault(("layers", block, found[3], found[4].lower()), {})[int(found[1])] = array.T
    return flax.traverse_util.unflatten_dict({p: np.stack([x[i] for i in sorted(x)]) for p, x in layers.items()})


@dataclasses.dataclass(frozen=True)
class Case:
    bound: object
    variables: dict
    expected: dict
    batch: dict

    def logits(self, variables, bound=None):
        bound = bound or self.bound
        return np.asarray(bound.unembed(variables, bound.hidden(variables, self.batch)[0]))


@functools.cache
def case(name: str, remat: str = "dots") -> Case:
    directory = hf_layout.GOLDENS / "peft_lora" / name
    config, params = hf_layout.load(hf_layout.GOLDENS / "families" / "llama_gqa_tied")
    expected = dict(np.load(directory / "expected.npz"))
    is_label = np.concatenate([np.zeros((len(expected["weights"]), 1)), expected["weights"]], axis=1)
    adapter = stacked(hf_layout.read_safetensors(directory / "adapter_model.safetensors"))
    bound = bind(Transformer(config, remat=remat), [ADAPTERS[name]])
    return Case(
        bound, {"params": params, "lora": adapter}, expected, tiny_training.unpacked(expected["tokens"], is_label)
    )


def close(got, want):
    """Logits up to 12: each, and all in relative L2."""
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-5)
    assert np.linalg.norm(got - want) <= 3e-6 * np.linalg.norm(want)


@pytest.mark.parametrize("name", ADAPTERS)
def test_outputs_equal_peft(name):
    c = case(name)
    close(c.logits(c.variables), c.expected["logits"])


@pytest.mark.parametrize("name, remat", [("lora", "dots"), ("lora", "none"), ("lora", "full"), ("rslora", "dots")])
def test_gradients_equal_peft(name, remat):
    """Through the scanned, rematerialised layers and the fused head: relative L2 of every A and B ≤ 1e-5."""
    c = case(name, remat)
    gradients = jax.jit(make_gradients(c.bound, tiny_training.sft_objective()))
    frozen = {"params": c.variables["params"]}
    loss, got, _ = gradients({"lora": c.variables["lora"]}, frozen, c.batch, 0)
    assert abs(float(loss) - c.expected["loss"]) < 1e-5
    expected = stacked({key: value for key, value in c.expected.items() if key.startswith("grad/")})
    got, expected = flax.traverse_util.flatten_dict(got["lora"]), flax.traverse_util.flatten_dict(expected)
    assert got.keys() == expected.keys()
    for path, want in expected.items():
        assert np.linalg.norm(want) > 1e-3
        assert np.linalg.norm(got[path] - want) <= 1e-5 * np.linalg.norm(want), path


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_equals_unmerged_and_peft(name):
    c = case(name)
    plain = bind(c.bound.model)
    merged = c.logits({"params": merge(c.bound, c.variables)}, plain)
    close(merged, c.logits(c.variables))
    close(merged, c.expected["merged_logits"])


@pytest.mark.parametrize("name", ADAPTERS)
def test_no_effect_at_init(name):
    """Fresh B is zero and A uniform in ±1/sqrt(in), as PEFT draws it: the logits are the base's to the bit."""
    c = case(name)
    fresh = nn.unbox(c.bound.init(jax.random.key(3)))["lora"]
    shapes = functools.partial(jax.tree.map, lambda x: (x.shape, jnp.dtype(x.dtype)))
    assert shapes(fresh) == shapes(c.variables["lora"])
    variables = {"params": c.variables["params"], "lora": fresh}
    np.testing.assert_array_equal(c.logits(variables), c.logits({"params": c.variables["params"]}, bind(c.bound.model)))
    for path, x in flax.traverse_util.flatten_dict(fresh).items():
        if path[-1] == "b":
            assert not x.any()
        else:
            bound = x.shape[1] ** -0.5
            assert np.abs(x).max() <= bound and np.std(x) == pytest.approx(bound / 3**0.5, rel=0.12)
            assert not np.array_equal(x[0], x[1])


def test_training_moves_the_adapter_and_not_one_bit_of_the_frozen_weights():
    c = case("lora")
    variables = jax.tree.map(jnp.asarray, c.variables)
    optimizer = optimizers.adamw(schedules.constant(3, peak=1e-2))
    state, frozen, log = tiny_training.train(c.bound, variables, optimizer, [c.batch] * 3, train=("lora",))
    assert float(log[-1]["loss"]) < float(log[0]["loss"])
    jax.tree.map(np.testing.assert_array_equal, frozen["params"], c.variables["params"])
    assert set(state.trainable) == {"lora"}
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), state.trainable["lora"], c.variables["lora"])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_directory_is_read_as_it_is_and_comes_back(name, tmp_path):
    c = case(name)
    adapter = weights.read_adapter(hf_layout.GOLDENS / "peft_lora" / name, c.bound.model.config)
    jax.tree.map(np.testing.assert_array_equal, adapter.variables, c.variables["lora"])
    read = bind(c.bound.model, [lora(**adapter.options)])
    np.testing.assert_array_equal(
        c.logits({"params": c.variables["params"], "lora": adapter.variables}, read), c.logits(c.variables)
    )
    weights.write_adapter(tmp_path / "again", adapter, base="families/llama_gqa_tied")
    again = weights.read_adapter(tmp_path / "again", c.bound.model.config)
    assert again.options == adapter.options
    jax.tree.map(np.testing.assert_array_equal, again.variables, adapter.variables)


@pytest.mark.parity
@pytest.mark.parametrize("name", ADAPTERS)
def test_our_adapter_directory_loads_in_peft(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    c, base = case(name), hf_layout.GOLDENS / "families" / "llama_gqa_tied"
    options = {"rank": 4, "alpha": 8.0, "rslora": name == "rslora"}
    weights.write_adapter(tmp_path / "ours", weights.Adapter("lora", options, c.variables["lora"]), base=str(base))
    tokens, logits = torch.tensor(c.expected["tokens"], dtype=torch.long), []
    plain = {"dtype": torch.float32, "attn_implementation": "eager"}
    for directory in (hf_layout.GOLDENS / "peft_lora" / name, tmp_path / "ours"):
        model = transformers.AutoModelForCausalLM.from_pretrained(base, **plain)
        model = peft.PeftModel.from_pretrained(model, directory).eval()
        with torch.no_grad():
            logits.append(model(tokens).logits.numpy())
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    "tuners, words",
    [
        ([lora(patterns=("layers/attention/query",))], ["layers/attention/query", "matches no site", "lora"]),
        ([lora(patterns=("layers/attention/q", "norm"))], ["'norm'", "matches no site"]),
        ([lora(), lora()], ["collection 'lora' is taken"]),
        ([lora(collection="params")], ["collection 'params' is taken"]),
    ],
)
def test_mistakes_are_told(tuners, words):
    with pytest.raises(LuthierError) as caught:
        bind(case("lora").bound.model, tuners).init(jax.random.key(0))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)

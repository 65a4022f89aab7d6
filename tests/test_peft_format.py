"""PEFT adapter directories: what PEFT wrote gives PEFT's logits here, what we write PEFT reads."""

import json
import pathlib
import shutil

import flax.linen as nn
import hf_layout
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_hf import equal, family_directory, word_tokenizer

from luthier import weights
from luthier.errors import LuthierError
from luthier.models import Transformer
from luthier.tuners import bind
from luthier.tuners.lora import lora

GOLDENS = hf_layout.GOLDENS / "peft_lora"
BASE = hf_layout.GOLDENS / "families" / "llama_gqa_tied"
ADAPTERS = ("lora", "rslora")


def adapter_directory(folder: pathlib.Path, name: str = "lora") -> pathlib.Path:
    """A copy of a golden adapter beside a copy of its base model."""
    family_directory(folder / "base", "llama_gqa_tied")
    shutil.copytree(GOLDENS / name, folder / "adapter", ignore=shutil.ignore_patterns("*.npz"))
    _edit(base_model_name_or_path=str(folder / "base"))(folder / "adapter")
    return folder / "adapter"


def _edit(**change):
    def apply(directory: pathlib.Path):
        content = json.loads((directory / "adapter_config.json").read_text())
        content = {key: value for key, value in {**content, **change}.items() if value is not ...}
        (directory / "adapter_config.json").write_text(json.dumps(content))

    return apply


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_logits(name, tmp_path):
    loaded = weights.load(adapter_directory(tmp_path, name), dtype="float32")
    (adapter,) = loaded.adapters
    bound = bind(Transformer(loaded.config, attention="xla"), [lora(**adapter.options)])
    expected = np.load(GOLDENS / name / "expected.npz")
    tokens = expected["tokens"]
    batch = {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape),
        "segment_ids": np.ones_like(tokens),
    }
    variables = {"params": loaded.params, "lora": jax.tree.map(jnp.asarray, adapter.variables)}
    abstract = nn.unbox(jax.eval_shape(bound.init, jax.random.key(0)))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, abstract)
    hidden, _ = bound.hidden(variables, batch)
    np.testing.assert_allclose(bound.unembed(variables, hidden), expected["logits"], atol=1e-4)


@pytest.mark.parametrize("name", ADAPTERS)
def test_round_trip_is_bit_exact(name, tmp_path):
    config, _ = hf_layout.load(BASE)
    first = weights.read_adapter(GOLDENS / name, config)
    weights.write_adapter(tmp_path / "out", first, base="somewhere/base", tokenizer=word_tokenizer())
    again = weights.read_adapter(tmp_path / "out", config)
    assert again.options == first.options
    equal(first.variables, again.variables)
    ours = hf_layout.read_safetensors(tmp_path / "out" / "adapter_model.safetensors")
    theirs = hf_layout.read_safetensors(GOLDENS / name / "adapter_model.safetensors")
    equal({name: theirs[name] for name in sorted(theirs)}, {name: ours[name] for name in sorted(ours)})
    settings, golden = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "out", GOLDENS / name))
    assert sorted(settings["target_modules"]) == sorted(golden["target_modules"])
    assert {k: settings[k] for k in ("r", "lora_alpha", "use_rslora", "peft_type", "task_type")} == {
        k: golden[k] for k in ("r", "lora_alpha", "use_rslora", "peft_type", "task_type")
    }


def test_options_are_those_of_lora():
    options = weights.read_adapter(GOLDENS / "rslora").options
    sites = ("layers/attention/q", "layers/attention/v", "layers/mlp/down")
    assert options == {"rank": 4, "alpha": 8.0, "rslora": True, "dora": False, "patterns": sites}


def test_device_arrays_and_half_precision_are_written(tmp_path):
    first = weights.read_adapter(GOLDENS / "rslora")
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), first.variables)
    weights.write_adapter(tmp_path, weights.Adapter("lora", {**first.options, "alpha": 2.5}, half), base="x")
    again = weights.read_adapter(tmp_path)
    assert again.options["alpha"] == 2.5
    equal(jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), first.variables), again.variables)


def test_a_workdir_with_an_adapter(tmp_path):
    """The adapter's own tokenizer goes before the base's; a base may be named relative to the adapter."""
    adapter = adapter_directory(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    words = word_tokenizer(("<s>", "</s>", "<unk>", "new"))
    first = weights.read_adapter(adapter)
    weights.write_adapter(tmp_path / "run" / "final", first, base="../../base", tokenizer=words)
    loaded = weights.load(tmp_path / "run")
    assert loaded.tokenizer.fingerprint == words.fingerprint
    equal(hf_layout.load(BASE, ml_dtypes.bfloat16)[1], loaded.params)
    equal(first.variables, loaded.adapters[0].variables)
    assert loaded.fingerprint != weights.describe(tmp_path / "base").fingerprint


def _retensor(change):
    def apply(directory: pathlib.Path):
        tensors = change(hf_layout.read_safetensors(directory / "adapter_model.safetensors"))
        rows = [(name, array.dtype, array.shape) for name, array in tensors.items()]
        path = weights.source.epath.Path(directory / "adapter_model.safetensors")
        weights.safetensors.write(path, rows, tensors.__getitem__)

    return apply


def _with(name: str):
    return _retensor(lambda t: {**t, name: np.ones((4, 48), np.float32)})


def _without(part: str):
    return _retensor(lambda t: {name: array for name, array in t.items() if part not in name})


MISTAKES = {
    "another method": (_edit(peft_type="OFT"), "peft_type 'OFT' is not supported"),
    "another task": (_edit(task_type="SEQ_CLS"), "task_type 'SEQ_CLS'"),
    "DoRA": (_edit(use_dora=True), "has no lora_magnitude_vector, but use_dora is True"),
    "half of DoRA": (
        _with("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector"), "up_proj .* 1 layers? of 3"
    ),
    "ranks by module": (_edit(rank_pattern={"q_proj": 8}), "rank_pattern"),
    "scales by module": (_edit(alpha_pattern={"q_proj": 8}), "alpha_pattern"),
    "biases": (_edit(bias="all"), "bias 'all'"),
    "LoRA biases": (_edit(lora_bias=True), "lora_bias"),
    "transposed": (_edit(fan_in_fan_out=True), "fan_in_fan_out"),
    "whole modules": (_edit(modules_to_save=["lm_head"]), "modules_to_save"),
    "an unknown option": (_edit(something_new=3), "something_new 3 is not supported"),
    "initialised from the base": (_edit(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    "no rank": (_edit(r=...), "key 'r' is missing"),
    "no base": (_edit(base_model_name_or_path=None), "base_model_name_or_path is empty"),
    "base is not there": (_edit(base_model_name_or_path="/gone"), r"adapter_config.json \(/gone\).*no such model"),
    "not JSON": (lambda d: (d / "adapter_config.json").write_text("{"), "not JSON"),
    "no weights": (lambda d: (d / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "other rank": (_edit(r=3), r"lora_A.weight' has shape \[4, \d+\], but r is 3"),
    "other base": (lambda d: None, None),
    "a layer is missing": (_without("layers.1."), "in 2 layers of 3 .not in layer 1"),
    "half of a pair": (_without("q_proj.lora_B"), "q_proj has only one of"),
    "a layer too many": (_with("base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"), "a layer 3, the base"),
    "embedding": (_with("base_model.model.model.embed_tokens.lora_embedding_A"), "adapts a module we have no LoRA for"),
    "odd module": (_with("base_model.model.model.layers.0.mlp.router.lora_A.weight"), "no LoRA for"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case, tmp_path):
    change, message = MISTAKES[case]
    directory = adapter_directory(tmp_path)
    change(directory)
    if message is None:
        shutil.rmtree(tmp_path / "base")
        family_directory(tmp_path / "base", "qwen2_window")
        message = "k_proj maps 48 to 32, in the base model 48 to 24"
    with pytest.raises(LuthierError, match=message) as caught:
        weights.load(directory)
    assert "\n" not in str(caught.value) and "adapter" in str(caught.value)


def test_sites_without_a_peft_name(tmp_path):
    with pytest.raises(LuthierError, match="'layers/inner' has no PEFT name"):
        odd = {"layers": {"inner": {"a": np.ones((1, 1, 1))}}}
        weights.write_adapter(tmp_path / "x", weights.Adapter("lora", {"rank": 1, "alpha": 1}, odd), base="x")
    assert not (tmp_path / "x").exists()


# Against PEFT itself.


@pytest.mark.parity
@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_what_we_write(name, tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    weights.write_adapter(tmp_path / "out", weights.read_adapter(GOLDENS / name), base=str(BASE))
    tokens, logits = torch.from_numpy(np.load(GOLDENS / name / "expected.npz")["tokens"]).long(), []
    for directory in (GOLDENS / name, tmp_path / "out"):
        base = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
        model = peft.PeftModel.from_pretrained(base, directory).eval()
        with torch.no_grad():
            logits.append(model(tokens).logits.numpy())
    np.testing.assert_array_equal(*logits)


@pytest.mark.parity
def test_we_load_what_peft_writes_for_the_head(tmp_path):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    directory = family_directory(tmp_path / "base", "llama_mha")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["lm_head", "o_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    (adapter,) = weights.load(tmp_path / "adapter").adapters
    theirs = {n.replace(".default", ""): p.detach().numpy() for n, p in model.named_parameters() if "lora_" in n}
    np.testing.assert_array_equal(adapter.variables["head"]["a"].T, theirs["base_model.model.lm_head.lora_A.weight"])
    np.testing.assert_array_equal(
        adapter.variables["layers"]["attention"]["o"]["a"][1].T,
        theirs["base_model.model.model.layers.1.self_attn.o_proj.lora_A.weight"],
    )
    assert adapter.options["patterns"] == ("head", "layers/attention/o")

"""GGUF against transformers' own import, the gguf package's reader, and the weights before conversion."""

import pathlib

import gguf as gguf_package
import hf_layout
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tiny_hf import equal

from luthier import weights
from luthier.errors import LuthierError
from luthier.models import Transformer
from luthier.tuners import bind
from luthier.weights import gguf

GOLDENS = hf_layout.GOLDENS / "gguf"
ORIGINAL = {"llama": "llama_mha", "llama_gqa_tied": "llama_gqa_tied", "qwen2": "qwen2", "qwen3": "qwen3"}


def logits_of(loaded: weights.Pretrained, tokens: np.ndarray) -> jax.Array:
    bound = bind(Transformer(loaded.config, attention="xla"))
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "positions": positions, "segment_ids": np.ones_like(tokens)}
    variables = {"params": loaded.params}
    return jax.jit(lambda v, b: bound.unembed(v, bound.hidden(v, b)[0]))(variables, batch)


@pytest.mark.parametrize("name", ORIGINAL)
def test_tensors_are_those_before_conversion(name):
    """float16 holds the small bfloat16 weights to its own precision, float32 exactly."""
    config, params = hf_layout.load(hf_layout.GOLDENS / "families" / ORIGINAL[name])
    loaded = weights.load(GOLDENS / f"{name}.gguf")
    if name == "llama_gqa_tied":
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-10, atol=2**-24), params, loaded.params)
    else:
        equal(params, loaded.params)
    fields = ("model_type", "num_layers", "num_heads", "num_kv_heads", "head_dim", "rope", "norm_eps", "max_length")
    for field in (*fields, "tie_embeddings", "vocab_size", "attention_bias", "qk_norm", "activation"):
        assert getattr(loaded.config, field) == getattr(config, field), field
    assert loaded.note == "" and loaded.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.mark.parametrize("name", [name for name in ORIGINAL if name != "qwen3"])
def test_logits_are_those_of_transformers(name):
    golden = np.load(GOLDENS / f"{name}.npz")
    logits = logits_of(weights.load(GOLDENS / f"{name}.gguf"), golden["tokens"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)


@pytest.mark.parametrize("name", ORIGINAL)
def test_header_is_that_of_the_package(name):
    ours, theirs = (
        gguf.read_header(epath.Path(GOLDENS / f"{name}.gguf")),
        gguf_package.GGUFReader(GOLDENS / f"{name}.gguf"),
    )
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.fields == fields
    assert {n: (e.kind, e.shape, e.offset) for n, e in ours.entries.items()} == {
        t.name: (t.tensor_type, tuple(map(int, t.shape))[::-1], int(t.data_offset)) for t in theirs.tensors
    }


def _write(path: pathlib.Path, kind: gguf_package.GGMLQuantizationType | None = None, change=None) -> pathlib.Path:
    """A llama of width 64, small enough to write in a test; `change` acts on its fields and arrays."""
    fields = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["</s>", "a", "b", "ab", "1", "2", "Ġ", "<u>"],
        "tokenizer.ggml.token_type": [3, 1, 1, 1, 1, 1, 1, 4],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 0,
    }
    shapes = {"token_embd": (8, 64), "output_norm": (64,), "blk.0.attn_norm": (64,), "blk.0.ffn_norm": (64,)}
    shapes |= {"blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64), "blk.0.attn_v": (32, 64)}
    shapes |= {"blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (96, 64), "blk.0.ffn_up": (96, 64)}
    shapes |= {"blk.0.ffn_down": (64, 96)}
    rng = np.random.default_rng(0)
    arrays = {f"{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if change:
        change(fields, arrays)
    writer = gguf_package.GGUFWriter(path, fields.pop("general.architecture"))
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            {str: writer.add_string, int: writer.add_uint32, bool: writer.add_bool, float: writer.add_float32}[
                type(value)
            ](key, value)
    for name, array in arrays.items():
        if kind is None or array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, gguf_package.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


KINDS = {
    "Q4_0": ("4-bit-rounded weights (Q4_0 GGUF)", 0.45),
    "Q4_1": ("4-bit-rounded weights (Q4_1 GGUF)", 0.3),
    "Q5_1": ("5-bit-rounded weights (Q5_1 GGUF)", 0.15),
    "Q8_0": ("8-bit-rounded weights (Q8_0 GGUF)", 0.02),
    "F16": ("", 0.002),
    "BF16": ("", 0.02),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_weights_are_near_and_say_so(kind, tmp_path):
    note, tolerance = KINDS[kind]
    exact = weights.load(_write(tmp_path / "exact.gguf"))
    rounded = weights.load(_write(tmp_path / "q.gguf", gguf_package.GGMLQuantizationType[kind]))
    assert rounded.note == note
    for a, b in zip(jax.tree.leaves(exact.params), jax.tree.leaves(rounded.params)):
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=0.01)
    assert rounded.fingerprint != exact.fingerprint


def test_dtype_and_linear_rope(tmp_path):
    def scaled(fields, arrays):
        fields |= {
            "llama.rope.scaling.type": "linear",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.freq_base": 5000.0,
        }

    loaded = weights.load(_write(tmp_path / "x.gguf", change=scaled), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    assert (loaded.config.rope.kind, loaded.config.rope.factor, loaded.config.rope.theta) == ("linear", 4.0, 5000.0)


def test_tokenizer_from_metadata(tmp_path):
    def adds(fields, arrays):
        fields |= {"tokenizer.ggml.add_eos_token": True, "tokenizer.chat_template": "hello"}

    tokenizer = weights.describe(_write(tmp_path / "x.gguf", change=adds)).tokenizer
    assert tokenizer.encode("ab12 b</s>a<u>") == [3, 4, 5, 6, 2, 0, 1, 7]
    assert tokenizer.encode("ab", special=True) == [3, 0]
    assert tokenizer.decode([3, 4, 0, 7], skip_special=True) == "ab1<u>"
    assert (tokenizer.eos_ids, tokenizer.bos_id, tokenizer.chat_template) == ((0,), None, "hello")


def test_a_directory_with_one_gguf_file(tmp_path):
    _write(tmp_path / "x.gguf")
    assert weights.describe(tmp_path).config.hidden_size == 64


def test_a_gguf_model_exports_to_a_directory(tmp_path):
    loaded = weights.load(_write(tmp_path / "x.gguf"))
    weights.export(
        tmp_path / "hf", loaded.config, loaded.params, loaded.tokenizer, generation_config=loaded.generation_config
    )
    again = weights.load(tmp_path / "hf")
    equal(loaded.params, again.params)
    assert again.config == loaded.config and again.tokenizer.eos_ids == loaded.tokenizer.eos_ids


def _set(**change):
    return lambda fields, arrays: fields.update({key.replace("__", "."): value for key, value in change.items()})


def _tensor(name: str, shape=(4,)):
    return lambda fields, arrays: arrays.update({name: np.ones(shape, np.float32)})


MISTAKES = {
    "architecture": (_set(general__architecture="gemma2"), "GGUF architecture 'gemma2' is not supported"),
    "near architecture": (_set(general__architecture="lama"), "Did you mean 'llama'"),
    "key": (lambda fields, arrays: fields.pop("llama.block_count"), "'llama.block_count' is missing"),
    "SentencePiece": (_set(tokenizer__ggml__model="llama"), "tokenizer model 'llama' is not supported"),
    "pre-tokenizer": (_set(tokenizer__ggml__pre="smolm"), "'smolm' is not supported.*'smollm'"),
    "rope table": (_tensor("rope_freqs.weight"), "rope scaling is not supported in GGUF"),
    "yarn": (_set(llama__rope__scaling__type="yarn"), "rope scaling is not supported in GGUF"),
    "experts": (_tensor("blk.0.ffn_gate_exps.weight"), "'blk.0.ffn_gate_exps.weight' is not supported"),
    "extra layer": (_tensor("blk.1.attn_norm.weight"), "has no place"),
    "missing tensor": (lambda f, a: a.pop("blk.0.ffn_up.weight"), "mlp.up_proj.weight' is missing"),
    "shape": (_set(llama__feed_forward_length=97), r"has shape \[96, 64\]"),
    "more tokens than rows": (
        lambda f, a: a.update({"token_embd.weight": np.ones((7, 64), np.float32)}),
        "the tokenizer has 8 tokens, the embedding 7 rows",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case, tmp_path):
    change, message = MISTAKES[case]
    with pytest.raises(LuthierError, match=message) as caught:
        weights.load(_write(tmp_path / "x.gguf", change=change))
    assert "x.gguf" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", (0, 3, 10, 100, 700, 1500, -1))
def test_truncated_files_are_named(keep, tmp_path):
    path = _write(tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LuthierError, match="x.gguf: the (file|header) is (truncated|not GGUF)"):
        weights.load(path)


# The embedded model.


@pytest.fixture(scope="module")
def smollm2():
    try:
        return weights.load("smollm2-135m")
    except LuthierError as error:
        pytest.skip(str(error))


def test_smollm2_tensors_equal_transformers(smollm2, tmp_path):
    golden = np.load(GOLDENS / "smollm2.npz")
    assert smollm2.note == "4-bit-rounded weights (Q4_1 GGUF)"
    for key in [key for key in golden if key.startswith("slice/")]:
        flat = hf_layout.hf_leaf(smollm2.params, key.removeprefix("slice/")).ravel()
        np.testing.assert_array_equal(flat[:: max(1, flat.size // 512)], golden[key])
        norm = np.linalg.norm(flat.astype(np.float64))
        np.testing.assert_allclose(norm, golden[key.replace("slice/", "norm/")], rtol=1e-12)


def test_smollm2_logits_equal_transformers(smollm2):
    """Every 64th logit after each of eight prompts, and the greedy choice."""
    golden = np.load(GOLDENS / "smollm2.npz")
    prompts = [golden[f"prompt_{i}"] for i in range(len(golden["prompts"]))]
    assert [smollm2.tokenizer.encode(str(text)) for text in golden["prompts"]] == [list(ids) for ids in prompts]
    width = max(map(len, prompts))
    tokens = np.stack([np.pad(ids, (0, width - len(ids))) for ids in prompts]).astype(np.int32)
    logits = np.asarray(logits_of(smollm2, tokens))
    for i, ids in enumerate(prompts):
        np.testing.assert_allclose(logits[i, len(ids) - 1, ::64], golden[f"logits_{i}"], atol=2e-4)
        assert logits[i, len(ids) - 1].argmax() == golden[f"greedy_{i}"][0] or golden[f"gaps_{i}"][0] < 1e-4

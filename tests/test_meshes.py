"""The same run on any mesh, and from one to another: 8 simulated devices give the losses of one, and the state stays in
its buffers."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file

from luthier.errors import LuthierError
from luthier.parallel import make_inference_mesh, make_mesh

STAGE = """
    c.stage(
        data=DATA, steps=10, batch_size=16, sequence_length=48, micro_batches=2,
        schedule=c.spec("cosine", peak=3e-3),
    )
"""

# One process trains on every mesh, to import once; the step is compiled by hand to be asked for its buffers.
CHILD = """
import contextlib, io, json, pathlib, shutil, sys, jax
from luthier import config as configs
from luthier.cli import main as cli
import luthier.training.run as run

def bytes_on_first_device(tree):
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)

jit_step = run.jit_step

def asked(step, state, platform):
    compiled = None
    def call(state, frozen, batch):
        nonlocal compiled
        if compiled is None:
            compiled = jit_step(step, state, platform).lower(state, frozen, batch).compile()
            aliased = compiled.memory_analysis().alias_size_in_bytes
            print("BYTES", json.dumps([aliased, bytes_on_first_device(state)]), flush=True)
        return compiled(state, frozen, batch)
    return call

run.jit_step = asked
config, folder, mistakes, *meshes = sys.argv[1:]
for name in meshes:
    mesh, _, before = name.partition("<")
    workdir = pathlib.Path(folder, name)
    if before:  # goes on from its checkpoint of step 5
        shutil.copytree(pathlib.Path(folder, before), workdir)
        shutil.rmtree(workdir / "final")
        shutil.rmtree(workdir / "checkpoints" / "sft" / "10")
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh.split("x")))
    overrides = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    run.train(configs.load(config, overrides), workdir)
for words in json.loads(mistakes):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = cli.main(["train", f"--config={config}", f"--workdir={folder}/mistake", *words])
    print("MISTAKE", json.dumps([code, said.getvalue(), pathlib.Path(folder, "mistake").exists()]), flush=True)
"""

# {overrides: what the one line must say}, on 8 devices.
MISTAKES = {
    "mesh.tensor=3": ["mesh", "tensor=3", "8 devices"],
    "mesh.fsdp=4 mesh.data=4": ["mesh", "data=4 x fsdp=4", "8 devices"],
    "mesh.tensor=-1": ["mesh", "only one size may be -1", "fsdp, tensor"],
    "stages[0].batch_size=12": ["stage.batch_size", "12 rows", "8 data-parallel devices", "multiple of 16"],
    "mesh.tensor=8 model.source=FOLDER/odd": ["mesh.tensor", "tensor=8", "6 query heads"],
}


def train_on(meshes, config, folder, devices, cache, mistakes=()):
    """({mesh: losses}, {mesh: (aliased bytes, bytes of the state)}, [outcomes of mistakes]) with so many devices."""
    words = [[f"--config.{word}" for word in mistake.replace("FOLDER", str(folder)).split()] for mistake in mistakes]
    run = subprocess.run(
        [sys.executable, "-c", CHILD, config, folder, json.dumps(words), *meshes],
        env=tiny_run.environment(devices, cache),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    said = lambda sign: [json.loads(line[len(sign) :]) for line in run.stdout.splitlines() if line.startswith(sign)]  # noqa: E731
    losses = {mesh: tiny_run.losses(folder / mesh) for mesh in meshes}
    return losses, dict(zip(meshes, said("BYTES"), strict=True)), said("MISTAKE")


def test_every_mesh_gives_the_losses_of_one_device(tmp_path):
    # data x fsdp x tensor; on 1x1x8 each key/value head is on two devices.
    # 2x2x2<8x1x1 goes on from the checkpoint that 8x1x1 wrote half-way.
    meshes, later = ["8x1x1", "1x8x1", "2x2x2", "1x1x8", "2x2x2<8x1x1"], "1x1x1<8x1x1"
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    config = tiny_run.write_run(
        tmp_path, STAGE, model=", dropout=0.1", every=5, hidden_size=64, intermediate_size=128, **heads
    )
    shutil.copytree(tmp_path / "model", tmp_path / "odd")
    odd = json.loads((tmp_path / "odd" / "config.json").read_text()) | {"num_attention_heads": 6}
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**odd, "num_key_value_heads": 2, "head_dim": 8}))
    cache = tmp_path / "cache"
    found, more, told = train_on(meshes, config, tmp_path, 8, cache, MISTAKES)
    one, sizes, _ = train_on(["1x1x1", later], config, tmp_path, 1, cache)
    expected = one["1x1x1"]
    assert len(expected) == 10 and np.ptp(expected) > 0.1, "nothing was learned, so nothing is compared"
    for mesh, losses in (found | one).items():
        assert np.abs(losses - expected).max() <= 1e-5, (mesh, np.abs(losses - expected))
    for mesh, (aliased, state) in (sizes | more).items():
        assert aliased == state, f"{mesh}: {state - aliased} bytes of the state are copied"
    # What is sharded is smaller on each device: the test would pass on replicas otherwise.
    for mesh in meshes[1:]:
        assert more[mesh][1] < 0.9 * sizes["1x1x1"][1], mesh
    for name in ("2x2x2<8x1x1", later):
        assert_same_end(tmp_path / name, tmp_path / "8x1x1")
    for (code, line, started), parts in zip(told, MISTAKES.values(), strict=True):
        assert code == 2 and line.startswith("luthier: error: ") and line.count("\n") == 1 and not started, line
        assert all(part in line for part in parts), line


def assert_same_end(found: pathlib.Path, wanted: pathlib.Path):
    """Weights, moments and what was trained on, but for rounding; it went on, and not from the start."""
    manifest = json.loads((found / "manifest.json").read_text())
    assert any("mesh.data: 8" in change for change in manifest["resumed"][-1]["changes"])
    ours, theirs = tiny_run.checkpointed(found), tiny_run.checkpointed(wanted)
    assert ours.keys() == theirs.keys() and any("/opt_state/" in name for name in ours)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (found, wanted))
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=1e-5, err_msg=name)
    for key in ("num_tokens", "epoch", "learning_rate"):
        assert [r[key] for r in tiny_run.metrics(found)] == [r[key] for r in tiny_run.metrics(wanted)], key


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU as a mesh looks at."""

    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"


def chips(slices):
    return [Chip(part, (x, 0, 0)) for part in range(slices) for x in range(8 // slices)]


@pytest.mark.parametrize(
    "slices, given, expected",
    [
        # data, fsdp, tensor: all on fsdp within a slice, unless something is said.
        (1, {}, (1, 8, 1)),
        (2, {}, (2, 4, 1)),
        (2, {"tensor": 2}, (2, 2, 2)),
        (1, {"data": 2}, (2, 4, 1)),
        (1, {"fsdp": 1}, (8, 1, 1)),
        (2, {"fsdp": 2}, (4, 2, 1)),
        (1, {"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        (1, {"data": 1, "fsdp": 2, "tensor": -1}, (1, 2, 4)),
        (1, {"data": 3}, "does not divide 8 devices"),
        (1, {"data": 2, "fsdp": 2}, "does not divide 8 devices"),
        (2, {"tensor": 8}, "does not divide 8 devices"),
        (2, {"data": 1}, "does not divide over 2 slices"),
        (1, {"tensor": -1}, "only one size may be -1"),
        (1, {"fsdp": 0}, "must be positive"),
    ],
)
def test_sizes_by_device_count(slices, given, expected):
    if isinstance(expected, str):
        with pytest.raises(LuthierError, match=expected):
            make_mesh(**given, devices=chips(slices))
    else:
        assert tuple(make_mesh(**given, devices=chips(slices)).shape.values()) == (*expected, 1)


@pytest.mark.parametrize(
    "slices, heads, kv_heads, expected",
    [(1, 8, 8, (1, 8)), (1, 8, 2, (1, 8)), (2, 8, 8, (2, 4)), (1, 9, 3, (8, 1)), (1, 6, 2, (4, 2)), (1, 4, 4, (2, 4))],
)
def test_a_model_is_asked_over_as_many_devices_as_its_heads_go(slices, heads, kv_heads, expected):
    mesh = make_inference_mesh(num_heads=heads, num_kv_heads=kv_heads, devices=chips(slices))
    assert (mesh.shape["data"], mesh.shape["tensor"]) == expected and mesh.size == 8

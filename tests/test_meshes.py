"""The same run on any mesh: 8 simulated devices give the losses of one, and the state stays in its buffers."""

import json
import subprocess
import sys

import numpy as np
import pytest
import tiny_run

STAGE = """
    c.stage(
        data=DATA, steps=20, batch_size=16, sequence_length=48, micro_batches=2,
        schedule=c.spec("cosine", peak=3e-3),
    )
"""
LORA = STAGE.replace("steps=20,", 'steps=20, tuners=(c.spec("lora"),),')

# One process trains on every mesh, to import once; the step is compiled by hand to be asked for its buffers.
CHILD = """
import json, sys, jax
from luthier import config as configs
import luthier.training.run as run

def bytes_on_first_device(tree):
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)

def asked(step, platform):
    compiled = None
    def call(state, frozen, batch):
        nonlocal compiled
        if compiled is None:
            compiled = jax.jit(step, donate_argnums=0).lower(state, frozen, batch).compile()
            aliased = compiled.memory_analysis().alias_size_in_bytes
            print("BYTES", json.dumps([aliased, bytes_on_first_device(state)]), flush=True)
        return compiled(state, frozen, batch)
    return call

run.jit_step = asked
for mesh in sys.argv[3:]:
    sizes = dict(zip(("data", "fsdp", "tensor"), mesh.split("x")))
    overrides = [f"mesh.{axis}={size}" for axis, size in sizes.items()]
    run.train(configs.load(sys.argv[1], overrides), f"{sys.argv[2]}/{mesh}")
"""


def train_on(meshes, config, folder, devices, cache):
    """({mesh: losses}, {mesh: (aliased bytes, bytes of the state)}) of runs with so many simulated devices."""
    run = subprocess.run(
        [sys.executable, "-c", CHILD, config, folder, *meshes],
        env=tiny_run.environment(devices, cache),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    sizes = [json.loads(line.removeprefix("BYTES ")) for line in run.stdout.splitlines() if line.startswith("BYTES ")]
    return {mesh: tiny_run.losses(folder / mesh) for mesh in meshes}, dict(zip(meshes, sizes, strict=True))


@pytest.mark.parametrize(
    "stage, heads, kv_heads, devices, meshes",
    [
        # data x fsdp x tensor; on 1x1x8 each key/value head is on two devices.
        (STAGE, 8, 4, 8, ["8x1x1", "1x8x1", "2x2x2", "1x2x4", "1x1x8"]),
        (LORA, 8, 4, 8, ["2x2x2"]),
        (STAGE, 9, 3, 3, ["1x1x3"]),  # SmolLM2's heads.
    ],
    ids=["full", "lora", "nine-heads"],
)
def test_every_mesh_gives_the_losses_of_one_device(tmp_path, stage, heads, kv_heads, devices, meshes):
    config = tiny_run.write_run(
        tmp_path,
        stage,
        model=", dropout=0.1",
        hidden_size=8 * heads,
        intermediate_size=16 * heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
    )
    one, sizes = train_on(["1x1x1"], config, tmp_path, 1, tmp_path / "cache")
    expected = one["1x1x1"]
    assert len(expected) == 20 and np.ptp(expected) > 0.1, "nothing was learned, so nothing is compared"
    found, more = train_on(meshes, config, tmp_path, devices, tmp_path / "cache")
    for mesh, losses in found.items():
        assert np.abs(losses - expected).max() <= 1e-5, (mesh, np.abs(losses - expected))
    for mesh, (aliased, state) in (sizes | more).items():
        assert aliased == state, f"{mesh}: {state - aliased} bytes of the state are copied"
    # What is sharded is smaller on each device: the test would pass on replicas otherwise.
    for mesh in meshes:
        if mesh != "8x1x1" and stage is STAGE:
            assert more[mesh][1] < 0.9 * sizes["1x1x1"][1], mesh

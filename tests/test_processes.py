"""Two real processes train as one."""

import json
import signal
import sys
import time

import numpy as np
import pytest
import tiny_run

STAGE = """
    c.stage(
        data=DATA, steps=20, batch_size=8, sequence_length=48, micro_batches=2, ema=0.9,
        schedule=c.spec("cosine", peak=3e-3),
    )
"""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    config = tiny_run.write_run(folder, STAGE, model=", dropout=0.1", every=4, hidden_size=64)
    tiny_run.train(config, folder / "one", cache=folder / "cache")
    return folder, config, tiny_run.losses(folder / "one")


@pytest.mark.parametrize("devices, mesh", [((1, 1), (2, 1, 1)), ((2, 2), (1, 2, 2))], ids=["data", "fsdp-tensor"])
def test_losses_are_those_of_one_process(one_process, devices, mesh):
    folder, config, expected = one_process
    workdir = folder / "-".join(map(str, mesh))
    overrides = [f"mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh)]
    tiny_run.finish(
        tiny_run.start_processes(tiny_run.command(config, workdir, *overrides), devices=devices, cache=folder / "cache")
    )
    records = tiny_run.metrics(workdir)
    assert [record["step"] for record in records] == list(range(1, 21))
    assert np.abs(tiny_run.losses(workdir) - expected).max() <= 1e-5
    for key in ("num_tokens", "epoch", "learning_rate"):
        assert [r[key] for r in records] == [r[key] for r in tiny_run.metrics(folder / "one")], key
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["devices"]["processes"] == 2 and manifest["devices"]["count"] == sum(devices)
    names = {p.relative_to(workdir) for p in (workdir / "final").rglob("*")}
    assert names == {p.relative_to(folder / "one") for p in (folder / "one/final").rglob("*")}


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_signal_to_one_stops_both_and_one_process_goes_on(one_process, signalled):
    folder, config, expected = one_process
    workdir = folder / f"stopped-{signalled}"
    command = tiny_run.command(config, workdir, "mesh.fsdp=2", "mesh.data=1")
    runs = tiny_run.start_processes(command, devices=(1, 1), cache=folder / "cache")
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    runs[signalled].send_signal(signal.SIGTERM)
    tiny_run.finish(runs, code=75)
    done = len(tiny_run.metrics(workdir))
    assert 1 <= done < 20
    tiny_run.train(config, workdir, "mesh.fsdp=1", cache=folder / "cache")
    assert [record["step"] for record in tiny_run.metrics(workdir)] == list(range(1, 21))
    assert np.abs(tiny_run.losses(workdir) - expected).max() <= 1e-5


RESTORE = """
import pathlib, shutil, sys, jax, jax.numpy as jnp, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec as P
from luthier.errors import LuthierError
from luthier.parallel import processes
from luthier.training.checkpoints import Checkpoints
processes.start()
mesh = jax.make_mesh((2,), ("fsdp",))
sharding = NamedSharding(mesh, P("fsdp"))
whole = lambda step: np.random.default_rng(step).normal(size=(64, 40)).astype("float32")
state = lambda step: {"w": jax.make_array_from_callback((64, 40), sharding, lambda i: whole(step)[i])}
like = {"w": jax.ShapeDtypeStruct((64, 40), jnp.float32, sharding=sharding)}
root = pathlib.Path(sys.argv[1])
def checks(wanted, message=None):
    with Checkpoints(root, keep_last=3) as checkpoints:
        try:
            found, step = checkpoints.restore(like)
        except LuthierError as error:
            assert message and message in str(error), error
            return
        assert step == wanted, step
        for shard in found["w"].addressable_shards:
            assert (np.asarray(shard.data) == whole(step)[shard.index]).all()
def damage(step, pattern):
    multihost_utils.sync_global_devices(f"before {step}")
    if jax.process_index() == 0:
        # The file of the other process: only that one's read fails.
        largest = max((root / str(step) / "default").glob(pattern), key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100])
    multihost_utils.sync_global_devices(f"after {step}")
with Checkpoints(root, keep_last=3) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(step, state(step))
checks(3)
damage(3, "ocdbt.process_1/d/*")
checks(2)
damage(2, "ocdbt.process_0/d/*")
checks(1)
damage(1, "ocdbt.process_1/d/*")
checks(None, "and no other is left")
print("AGREED", flush=True)
"""


def test_damage_that_one_process_meets_sends_both_to_the_checkpoint_before(tmp_path):
    runs = tiny_run.start_processes([sys.executable, "-c", RESTORE, tmp_path / "c"], devices=(1, 1))
    try:
        outputs = [run.communicate(timeout=100) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], [error[-2000:] for _, error in outputs]
    assert all("AGREED" in out for out, _ in outputs)

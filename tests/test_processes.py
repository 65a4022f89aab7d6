"""Several real processes train, are killed, restore and answer as one."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import asking
import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_policy
import tiny_run

from luthier import weights
from luthier.tuners import bind
from luthier.tuners.lora import lora

STEPS = 12
STAGE = f"""
    c.stage(data=DATA, steps={STEPS}, batch_size=8, sequence_length=48, ema=0.9, schedule=c.spec("cosine", peak=3e-3))
"""
LAUNCH = pathlib.Path(__file__).parent.parent / "launch" / "local.sh"


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    config = tiny_run.write_run(folder, STAGE, every=4, hidden_size=64)
    tiny_run.train(config, folder / "one", cache=folder / "cache")
    return folder, config, tiny_run.losses(folder / "one")


# To compile once, the same processes run both: the second is the one to be killed. Of the first each process writes
# down which rows it read.
TWICE = """
import json, sys
import jax
import luthier.training.run as run
from luthier.cli import main as cli
from luthier.data.rows import Batches

compile_step, compiled = run.jit_step, []

def jit_step(step, state, platform):
    compiled.append(compiled[0] if compiled else compile_step(step, state, platform))
    return compiled[0]

run.jit_step = jit_step
rows, read = Batches.rows, []

def read_rows(self, step, start=0, stop=None):
    read.append((step, start, stop))
    return rows(self, step, start, stop)

Batches.rows = read_rows
config, *workdirs = sys.argv[1:]
for workdir in workdirs:
    code = cli.main(["train", f"--config={config}", f"--workdir={workdir}"])
    with open(f"{workdir}-read-{jax.process_index()}.json", "w") as file:
        json.dump(read, file)
sys.exit(code)
"""


def test_kill_nine_of_one_of_four_ends_all_and_the_next_start_ends_in_the_same_bits(one_process):
    folder, config, expected = one_process
    four, killed = folder / "four", folder / "killed"
    command = [sys.executable, "-c", TWICE, config, four, killed]
    runs = tiny_run.start_processes(command, devices=(2,) * 4, cache=folder / "cache")
    deadline = time.monotonic() + 400
    # One checkpoint is whole, and the next half written.
    while not ((killed / "checkpoints/sft/4").exists() and tiny_run.saves(killed)) and time.monotonic() < deadline:
        time.sleep(0.0005)
    runs[2].kill()
    try:
        said = [run.communicate(timeout=90)[1] for run in runs]  # JAX alone would wait for its heartbeats and barriers
    finally:
        for run in runs:
            run.kill()
    # The coordinator ends last, and may end the others by that.
    assert runs[2].returncode == -signal.SIGKILL and {run.returncode for run in runs} <= {-signal.SIGKILL, 75, -6}
    assert (four / "final").exists() and not (killed / "final").exists()
    assert any("another process of this run ended" in text for text in said)
    assert not any("Traceback" in text for text in said)

    launcher = ["bash", LAUNCH, "4", "2", "--", *tiny_run.command(config, killed)]
    environment = tiny_run.environment(2, folder / "cache")
    done = subprocess.run(launcher, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "going on after step" in done.stderr
    tiny_run.assert_same_run(killed, four)

    for process in range(4):
        read = json.loads((folder / f"four-read-{process}.json").read_text())
        assert {step for step, *_ in read} >= set(range(STEPS))
        assert {tuple(span) for _, *span in read} == {(2 * process, 2 * process + 2)}

    records = tiny_run.metrics(four)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert np.abs(tiny_run.losses(four) - expected).max() <= 1e-5
    for key in ("num_tokens", "epoch", "learning_rate"):
        assert [r[key] for r in records] == [r[key] for r in tiny_run.metrics(folder / "one")], key
    # Nothing was said about the mesh: all devices are on `fsdp`.
    devices = json.loads((four / "manifest.json").read_text())["devices"]
    assert devices["processes"] == 4 and devices["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1, "sequence": 1}
    names = {p.relative_to(four) for p in (four / "final").rglob("*")}
    assert names == {p.relative_to(folder / "one") for p in (folder / "one/final").rglob("*")}


def test_a_signal_to_one_stops_both_and_one_process_goes_on(one_process):
    folder, config, expected = one_process
    workdir = folder / "stopped"
    runs = tiny_run.start_processes(tiny_run.command(config, workdir), devices=(1, 1), cache=folder / "cache")
    deadline = time.monotonic() + 200
    while not (workdir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    runs[1].send_signal(signal.SIGTERM)
    tiny_run.finish(runs, code=75)
    done = len(tiny_run.metrics(workdir))
    assert 1 <= done < STEPS
    tiny_run.train(config, workdir, cache=folder / "cache")
    assert [record["step"] for record in tiny_run.metrics(workdir)] == list(range(1, STEPS + 1))
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


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A model with an adapter, whose heads go over 2 of 4 devices, so that rows go over 2 processes."""
    folder = tmp_path_factory.mktemp("adapter")
    policy = tiny_policy.policy(num_attention_heads=2, num_key_value_heads=1)
    bound, rng = bind(policy.bound.model, [lora(rank=2)]), np.random.default_rng(0)
    shapes = nn.meta.unbox(jax.eval_shape(bound.init, jax.random.key(0)))["lora"]
    low = jax.tree.map(lambda x: rng.normal(scale=0.1, size=x.shape).astype("float32"), shapes)
    weights.export(folder / "base", policy.bound.model.config, policy.variables["params"], policy.tokenizer)
    options = {"rank": 2, "alpha": 4.0, "rslora": False}
    weights.write_adapter(folder / "adapter", weights.Adapter("lora", options, low), base=str(folder / "base"))
    return folder / "adapter"


def test_two_processes_answer_as_one_with_a_ragged_last_batch(one_process, adapter, tmp_path):
    folder, _, _ = one_process
    data = tmp_path / "thirteen.jsonl"  # three batches of 4 and one of 1
    data.write_text("".join((folder / "data.jsonl").open().readlines()[:13]))
    asking.ask(adapter, data, tmp_path / "one")
    words = [sys.executable, asking.__file__, adapter, data, tmp_path / "two"]
    tiny_run.finish(tiny_run.start_processes(words, devices=(2, 2), cache=folder / "cache"))
    one, two = (asking.answers(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one["scores.jsonl"]) == len(one["texts.jsonl"]) == 13
    for name, expected in one.items():
        same(two[name], expected, name)


def same(found, expected, where):
    """Equal but for rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            same(found[key], value, f"{where}: {key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            same(found[number], value, f"{where}[{number}]")
    elif isinstance(expected, (float, np.ndarray)):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5, err_msg=where)
    else:
        assert found == expected, where

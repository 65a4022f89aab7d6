"""A tiny model, data and recipe in files, and `luthier train` on them in processes of its own."""

import json
import os
import pathlib
import socket
import subprocess
import sysconfig

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
import tiny_policy

from luthier import weights
from luthier.models import Transformer
from luthier.tuners import bind

CONFIG = """
from luthier import config as c

def get_config(arg=None):
    return c.recipe(
        model=c.model("{folder}/model"{model}),
        stages=({stages},),
        checkpoint=c.checkpoint(every={every}),
        logging=c.logging(every=1, tensorboard=False),
    )
"""


def write_run(
    folder: pathlib.Path, stages: str, *, model: str = "", every: int = 0, examples: int = 64, **changes
) -> pathlib.Path:
    """Writes FOLDER/{model,data.jsonl,config.py} and returns the config file.

    Args:
      stages: Python text of the stages; `data` is the committed file's section.
      model: more arguments of `config.model`, starting with a comma.
      **changes: to the Hugging Face config of the model.
    """
    config = tiny_policy.config(**changes)
    params = nn.meta.unbox(jax.jit(bind(Transformer(config)).init)(jax.random.key(0)))["params"]
    weights.export(folder / "model", config, params, tiny_policy.tokenizer())
    rng = np.random.default_rng(0)
    with open(folder / "data.jsonl", "w") as file:
        for _ in range(examples):
            numbers = rng.integers(0, 100, rng.integers(1, 8)).tolist()
            prompt, answer = " + ".join(map(str, numbers)) + " =", f" {sum(numbers)}"
            file.write(json.dumps({"prompt": prompt, "completion": answer}) + "\n")
    text = CONFIG.format(folder=folder, model=model, every=every, stages=stages)
    (folder / "config.py").write_text(text.replace("DATA", f'c.data("{folder}/data.jsonl")'))
    return folder / "config.py"


def command(config: pathlib.Path, workdir, *overrides: str) -> list[str]:
    words = [f"--config.{override}" for override in overrides]
    luthier = os.path.join(sysconfig.get_path("scripts"), "luthier")
    return [luthier, "train", f"--config={config}", f"--workdir={workdir}", *words]


def environment(devices: int = 1, cache: pathlib.Path | None = None, **more: str) -> dict[str, str]:
    """The environment of a process with so many simulated devices."""
    chosen = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # Most of the time of a tiny run is LLVM's.
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    if cache:
        chosen |= {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
    return chosen


def train(config, workdir, *overrides: str, devices: int = 1, cache=None) -> subprocess.CompletedProcess:
    """`luthier train` to its end."""
    run = subprocess.run(
        command(config, workdir, *overrides),
        env=environment(devices, cache),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return run


def start_processes(command: list, *, devices: tuple[int, ...], cache=None) -> list[subprocess.Popen]:
    """A command in several processes of one run, with so many simulated devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    runs = []
    for number, count in enumerate(devices):
        place = {
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": str(len(devices)),
            "JAX_PROCESS_ID": str(number),
        }
        runs.append(
            subprocess.Popen(
                command,
                env=environment(count, cache, **place),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return runs


def finish(runs: list[subprocess.Popen], code: int = 0) -> list[str]:
    """Waits for all processes of a run and returns what each said on stderr."""
    try:
        said = [run.communicate(timeout=300)[1] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [code] * len(runs), "\n".join(text[-3000:] for text in said)
    return said


def metrics(workdir) -> list[dict]:
    """The lines of metrics.jsonl without the keys that depend on the machine."""
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k.split("/")[0] not in ("time", "memory")} for line in lines]


def checkpointed(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint of every stage, whatever mesh wrote it."""
    found = {}
    for stage in sorted((workdir / "checkpoints").iterdir()):
        step = max(int(p.name) for p in stage.iterdir())
        reader, place = ocp.PyTreeCheckpointHandler(), stage / str(step) / "default"
        wanted = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(place).tree)
        state = reader.restore(place, args=ocp.args.PyTreeRestore(restore_args=wanted))["state"]
        found |= {f"{stage.name}/{step}/{name}": np.asarray(value) for name, value in state.items()}
    return found


def assert_same_run(found: pathlib.Path, wanted: pathlib.Path):
    """Parameters, optimiser state, average, result and metrics, bit by bit."""
    assert metrics(found) == metrics(wanted)
    ours, theirs = checkpointed(found), checkpointed(wanted)
    assert ours.keys() == theirs.keys()
    assert any("/opt_state/" in name for name in ours) and any("/ema/" in name for name in ours)
    for name, value in theirs.items():
        assert ours[name].tobytes() == value.tobytes(), name
    files = {p.relative_to(wanted) for p in (wanted / "final").rglob("*.safetensors")}
    assert files
    for file in files:
        assert (found / file).read_bytes() == (wanted / file).read_bytes(), file


def saves(workdir: pathlib.Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any("tmp" in p.name for p in workdir.glob("checkpoints/*/*"))


def losses(workdir) -> np.ndarray:
    return np.array([record["loss"] for record in metrics(workdir)])

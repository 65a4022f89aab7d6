"""Run by test_processes.py: all that asks a model, by one process or by each of several.

Usage: asking.py MODEL DATA OUT
"""

import json
import pathlib
import sys
import time

import numpy as np
from safetensors.numpy import load_file

from luthier.cli import main as cli
from luthier.weights import files


def ask(model, data, out):
    luthier("score", f"--model={model}", f"--input={data}", f"--output={out}/scores.jsonl", "--batch_size=4")
    sampling = ("--max_new_tokens=6", "--temperature=1", "--batch_size=4")
    luthier("generate", f"--model={model}", f"--input={data}", f"--output={out}/texts.jsonl", *sampling)
    task = ("--task=verifier", f"--task.data={data}", "--task.label=verifier", "--task.batch_size=4")
    luthier("evaluate", f"--model={model}", *task, f"--output={out}")
    luthier("export", f"--model={model}", f"--output={out}/whole", "--merge", "--max_shard_gb=1e-4")


def luthier(*words):
    assert cli.main(list(words)) == 0, words


def answers(out: pathlib.Path) -> dict:
    """{file: what it says}."""
    found = {}
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = str(path.relative_to(out))
        if path.suffix == ".safetensors":
            found[name] = {key: value.astype(np.float64) for key, value in load_file(path).items()}
        elif path.suffix == ".jsonl":
            found[name] = [json.loads(line) for line in path.open()]
        else:
            found[name] = json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()
    return found


def settle_late(*words, settle=files._settle):
    time.sleep(1)
    settle(*words)


if __name__ == "__main__":
    import jax

    files._settle = settle_late
    ask(*sys.argv[1:])
    # Process 0 wrote it, and late: no process goes on before it is there.
    assert (pathlib.Path(sys.argv[3]) / "whole" / "config.json").exists()
    assert jax.process_count() == 2 and jax.device_count() == 4

"""The loop that docs/architecture.md shows, as it stands there: short, correct, the same on any mesh."""

import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import tiny_policy
import tiny_run

from luthier import weights

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "architecture.md"
STEPS = 12


def shown_code() -> str:
    section = PAGE.read_text().split("## A loop of your own\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return block


def write_model_and_data(folder: pathlib.Path) -> tuple[str, str]:
    tiny_run.write_run(folder, "", examples=16)
    policy = tiny_policy.policy()  # its frozen head can tell tokens apart, which a fresh one barely can
    weights.export(folder / "model", policy.bound.model.config, policy.variables["params"], policy.tokenizer)
    return str(folder / "model"), str(folder / "data.jsonl")


def test_the_shown_loop_learns_on_one_device_and_on_four(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    model, records = write_model_and_data(tmp_path)
    scope = {}
    exec(compile(shown_code(), str(PAGE), "exec"), scope)
    losses, variables = scope["finetune"](model, records, STEPS)
    assert np.mean(losses[-3:]) < 0.5 * losses[0], losses
    before = weights.load(model).params
    jax.tree.map(np.testing.assert_array_equal, variables["params"], before)

    script = f"{shown_code()}\nprint(*finetune({model!r}, {records!r}, {STEPS})[0])\nassert jax.device_count() == 4"
    environment = tiny_run.environment(4, LUTHIER_CACHE=str(tmp_path / "cache"))
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    np.testing.assert_allclose([float(word) for word in run.stdout.split()], losses, atol=1e-5)


def test_the_shown_loop_is_at_most_thirty_lines():
    lines = [line for line in shown_code().splitlines() if line.strip()]
    assert len(lines) <= 30, len(lines)

"""The examples of CONTRIBUTING.md, as they stand: a loss and a tuner of one's own, their tests, and a run of both."""

import pathlib
import re
import sys

import pytest
import tiny_run

import luthier
from luthier import config as configs

PAGE = pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md"
FILES = {text.split("\n")[0][2:]: text for text in re.findall(r"```python\n(# .*?)```", PAGE.read_text(), re.DOTALL)}


@pytest.fixture
def written(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("test_")])
def test_their_tests_pass(written, name):
    scope = {}
    exec(compile(FILES[name], name, "exec"), scope)
    scope[name.removesuffix(".py")]()


def test_a_recipe_names_both(written, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(written / "cache"))
    (written / "run").mkdir()
    tiny_run.write_run(written / "run", "")
    changes = [f"model.source={written}/run/model", f"stages[0].data.source={written}/run/data.jsonl"]
    recipe = configs.load(str(written / "try_it.py"), [*changes, "stages[0].steps=4", "stages[0].objective.gamma=1"])
    run = luthier.train(recipe, written / "workdir")
    assert all(0 < record["focal_weight"] < 1 for record in run.metrics)
    scales = run.policy.variables["output_scale"]["layers"]["mlp"]["down"]["scale"]
    assert scales.shape == (2,) and abs(scales).max() > 0

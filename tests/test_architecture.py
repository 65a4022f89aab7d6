"""The floors of the house, the index of methods and the package's metadata, held against the code."""

import configparser
import importlib
import inspect
import pathlib
import pkgutil
import re
import runpy
import subprocess
import sys

import flax.linen as nn
import hf_layout
import jax
import jax.numpy as jnp
import pytest

import luthier
from luthier import config, methods
from luthier.models import FAMILIES, Transformer, attention, remat

ROOT = pathlib.Path(__file__).parents[1]
SOURCE = ROOT / "research" / "luthier"


def test_arrows_run_one_way():
    lint = pathlib.Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout[run.stdout.find("Contracts") :]


def imported(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport sys\nprint('\\n', *{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split())


def test_importing_every_module_brings_in_no_other_framework_and_starts_no_device():
    names = [module.name for module in pkgutil.walk_packages(luthier.__path__, "luthier.")]
    assert len(names) > 50
    code = "\n".join(f"import {name}" for name in names)
    code += "\nfrom jax._src import xla_bridge\nassert not xla_bridge._backends, xla_bridge._backends"
    found = imported(code)
    assert "jax" in found
    assert not found & {"tensorflow", "torch", "transformers", "trl", "peft", "seqio", "tensorflow_datasets", "wandb"}


@pytest.mark.parametrize(
    "module",
    [
        "luthier",
        "luthier.config",
        "luthier.methods",
        "luthier.errors",
        "luthier.evals.retention, luthier.reporting.report",
        "luthier.cli.main",
    ],
)
def test_what_help_needs_imports_no_jax(module):
    assert not imported(f"import {module}") & {"jax", "flax", "optax"}


def test_nothing_imports_configs():
    offenders = [
        path.name
        for path in SOURCE.rglob("*.py")
        if re.search(r"^\s*(from|import) luthier\.configs", path.read_text(), re.M)
    ]
    assert not offenders


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda method: f"{method.place}-{method.name}")
def test_methods_point_at_what_exists(method):
    module, function = method.target.split(":")
    found = getattr(importlib.import_module(module), function)
    assert found.__doc__, f"{method.target} has no docstring"
    options = {p.name for p in inspect.signature(found).parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert set(config.options_of(method.target)) == options
    for kind in ("oracle", "config"):
        path = getattr(method, kind)
        assert path == "-" or (ROOT / path).is_file(), f"{kind} {path} does not exist"


def test_method_names_are_unique_within_their_place():
    names = [(method.place, method.name) for method in methods.METHODS]
    assert len(names) == len(set(names))


def test_every_package_is_shipped():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    there = {
        ".".join(path.parent.relative_to(SOURCE.parent).parts)
        for path in SOURCE.rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert listed == there | {"luthier.configs"}
    data = {name: patterns.replace(",", " ").split() for name, patterns in setup["options.package_data"].items()}
    folders = {"luthier.configs": ROOT / "configs"}
    for package in listed:
        folder = folders.get(package, SOURCE.parent / package.replace(".", "/"))
        shipped = {file for pattern in data.get(package, []) for file in folder.glob(pattern)}
        beside = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        beside = {p for p in beside if package != "luthier" or p.parent == folder}
        assert beside <= shipped, f"{package}: not in package_data: {sorted(map(str, beside - shipped))}"


def sites(name: str) -> dict[str, type]:
    """Path → class of every module that a call of a golden model goes through."""
    model = Transformer(hf_layout.load(hf_layout.GOLDENS / "families" / name)[0])
    seen = {}

    def note(call, args, kwargs, context):
        if context.method_name == "__call__" and context.module.path:
            seen["/".join(context.module.path)] = type(context.module)
        return call(*args, **kwargs)

    one = jnp.ones((1, 1), jnp.int32)
    batch = {"tokens": one, "positions": one, "segment_ids": one}
    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(jax.random.key(0), batch, method="touch"))
    return seen


def table(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading of a page of docs/."""
    text = (ROOT / "docs" / page).read_text().split(f"## {heading}\n")[1]
    lines = re.search(r"^\|.*(?:\n\|.*)*", text, re.M).group().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cells: list[str]) -> set[str]:
    """Everything in backticks."""
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def test_models_page_lists_the_sites_of_the_model():
    true = sites("gemma3_text") | sites("qwen3") | sites("llama_mha")
    for container in ("layers", "layers/attention", "layers/mlp"):
        del true[container]
    listed = {name: row[1].strip("`") for row in table("models.md", "Named sites") for name in names(row[:1])}
    assert listed == {path: kind.__name__ for path, kind in true.items()}


def test_models_page_lists_families_policies_and_backends():
    parts = {"Families": FAMILIES, "Rematerialisation": remat.POLICIES, "Attention": attention.BACKENDS}
    assert {part: names([row[0] for row in table("models.md", part)]) for part in parts} == {
        part: set(true) for part, true in parts.items()
    }
    goldens = names([row[3] for row in table("models.md", "Families")])
    assert goldens == set(hf_layout.FAMILIES)


def test_the_methods_page_is_made_of_the_records():
    scope = runpy.run_path(str(ROOT / "docs" / "make_methods.py"))
    assert (ROOT / "docs" / "methods.md").read_text() == scope["page"](), "run python docs/make_methods.py"

"""The package: what its metadata promise is there, and importing it starts nothing."""

import importlib
import importlib.metadata
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import luthier
from luthier import methods

ROOT = pathlib.Path(__file__).parents[1]
MODULES = sorted(m.name for m in pkgutil.walk_packages(luthier.__path__, "luthier.") if "__main__" not in m.name)


def test_importing_everything_starts_nothing():
    """No device, no TensorFlow, no oracle; SeqIO's module alone may want its extra."""
    program = f"""
import importlib, sys
for name in {MODULES!r}:
    try: importlib.import_module(name)
    except ImportError as error: assert error.name in ("altair", "vl_convert", "seqio", "IPython"), (name, error)
import jax
assert not jax._src.xla_bridge._backends, "a device was started"
print([m for m in ("tensorflow", "torch", "transformers", "trl", "peft", "wandb", "seqio") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", luthier.__all__)
def test_public_names(name):
    assert getattr(luthier, name)


def test_versions_agree():
    citation = (ROOT / "CITATION.cff").read_text()
    assert importlib.metadata.version("luthier") == luthier.__version__
    assert re.search(r"^version: (.+)$", citation, re.M)[1] == luthier.__version__
    assert f"## {luthier.__version__.partition('.dev')[0]}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_package_is_listed():
    listed = re.search(r"^packages =\n((?:    .+\n)+)", (ROOT / "setup.cfg").read_text(), re.M)[1].split()
    folders = {p.parent for p in (ROOT / "research" / "luthier").rglob("__init__.py")}
    found = {".".join(folder.relative_to(ROOT / "research").parts) for folder in folders} | {"luthier.configs"}
    assert set(listed) == found


def test_no_requirement_without_a_bound_or_an_index():
    for requirement in importlib.metadata.requires("luthier"):
        assert (
            "://" not in requirement and re.search(r"[<>=]", requirement.partition(";")[0]) or "extra ==" in requirement
        )


@pytest.mark.parametrize("method", methods.METHODS, ids=lambda m: f"{m.place}-{m.name}")
def test_methods_point_at_what_exists(method):
    module, _, function = method.target.partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    for path in (method.oracle, method.config):
        assert path == "-" or (ROOT / path).exists(), path


@pytest.mark.parametrize("path", sorted(p.name for p in (ROOT / "configs").glob("*.py") if p.name != "__init__.py"))
def test_configs_build_from_any_folder(path, tmp_path, monkeypatch):
    from luthier import config

    monkeypatch.chdir(tmp_path)
    recipe = config.load(str(ROOT / "configs" / path))
    assert config.from_json(config.to_json(recipe)) == recipe


@pytest.mark.parametrize(
    "path", ["README.md", "CHANGELOG.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_of_the_documentation_lead_somewhere(path):
    file = ROOT / path
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", file.read_text()):
        assert "://" in target or (file.parent / target).exists(), target

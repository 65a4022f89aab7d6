"""Which tests are the core (quick, without TensorFlow or torch, at least one for each floor of the house), and the
order of files."""

import os

import pytest

# Tiny models compile for seconds and run for milliseconds: XLA leaves out LLVM's optimisations, here and in the
# processes that tests start.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

CORE = {
    "test_cli.py",
    "test_fused_head.py",
    "test_package.py",
    "test_packing.py",
    "test_records.py",
    "test_statistics.py",
}


# Minutes each: they start first, so that no process ends long after the others.
SLOW = (
    "test_smollm2.py",
    "test_resume.py",
    "test_meshes.py",
    "test_colabs.py",
    "test_processes.py",
    "test_gcs.py",
    "test_compile_check.py",
    "test_sharded_products.py",
    "test_bad_input.py",
    "test_signals.py",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in CORE:
            item.add_marker(pytest.mark.core)
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))


@pytest.fixture(scope="session", autouse=True)
def caches_of_the_tests(tmp_path_factory):
    """Tokens and compiled programs of the tests go where pytest clears up."""
    os.environ["LUTHIER_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")

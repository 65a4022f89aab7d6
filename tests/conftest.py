"""Which tests are the core: quick, without TensorFlow or torch, at least one for each floor of the house."""

import pytest

CORE = {
    "test_cli.py",
    "test_decoding.py",
    "test_fused_head.py",
    "test_own_loop.py",
    "test_package.py",
    "test_packing.py",
    "test_records.py",
    "test_report.py",
    "test_statistics.py",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.name in CORE:
            item.add_marker(pytest.mark.core)

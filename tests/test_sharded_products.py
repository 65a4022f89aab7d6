"""Products, lookups and attention on 8 simulated devices equal those of one, and say no more than they must."""

import pathlib
import subprocess
import sys

import pytest
import tiny_run

HERE = pathlib.Path(__file__).parent


@pytest.mark.parametrize("check", ["products", "scatters", "messages", "splash"])
def test_on_eight_devices(check, tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE / "eight_devices.py"), check],
        env=tiny_run.environment(8, tmp_path),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]

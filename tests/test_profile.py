"""`--profile` traces the steps it is told, and changes nothing else. In processes of their own: JAX's profiler does
not survive beside the libtpu that other tests load."""

import subprocess

import numpy as np
import tiny_run


def test_a_trace_of_two_steps(tmp_path):
    config = tiny_run.write_run(tmp_path, "c.stage(data=DATA, steps=4, batch_size=4, sequence_length=48)")
    cache = tmp_path / "cache"
    tiny_run.train(config, tmp_path / "plain", cache=cache)
    command = [*tiny_run.command(config, tmp_path / "traced"), "--profile=2:3"]
    subprocess.run(command, env=tiny_run.environment(1, cache), check=True, timeout=300)
    assert len(list((tmp_path / "traced" / "profile").rglob("*.xplane.pb"))) == 1
    np.testing.assert_array_equal(tiny_run.losses(tmp_path / "traced"), tiny_run.losses(tmp_path / "plain"))
    command[-1:] = ["--profile=3", f"--workdir={tmp_path / 'wrong'}"]
    done = subprocess.run(command, env=tiny_run.environment(1, cache), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--profile: not a span of steps: '3'" in done.stderr
    assert not (tmp_path / "wrong").exists()

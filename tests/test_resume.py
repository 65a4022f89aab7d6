"""A run that is killed at any moment ends in the same bits as one that is not."""

import pathlib
import signal
import subprocess
import time

import numpy as np
import pytest
import tiny_run

STAGES = """
            c.stage(data=DATA, steps=16, batch_size=4, sequence_length=64, micro_batches=2, ema=0.9, name="full"),
            c.stage(data=DATA, steps=14, batch_size=4, sequence_length=64, tuners=(c.spec("lora"),), name="lora")
"""
STEPS = 30


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    config = tiny_run.write_run(folder, STAGES, model=", dropout=0.1", every=3, hidden_size=128)
    tiny_run.train(config, folder / "whole", cache=folder / "cache")
    return folder, config


def assert_same_run(found: pathlib.Path, wanted: pathlib.Path):
    assert [record["step"] for record in tiny_run.metrics(found)] == list(range(1, STEPS + 1))
    tiny_run.assert_same_run(found, wanted)


def stop_when(run: subprocess.Popen, number: int, ready) -> int:
    """Sends the signal once `ready()`; returns the exit code."""
    while run.poll() is None:
        if ready():
            run.send_signal(number)
            break
        time.sleep(0.0005)
    run.communicate(timeout=120)
    return run.returncode


def lines(workdir: pathlib.Path) -> int:
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def test_kill_nine_at_five_random_moments(uninterrupted):
    folder, config = uninterrupted
    workdir = folder / "killed"
    rng = np.random.default_rng(2)
    moments = sorted(rng.choice(np.arange(1, STEPS - 3), 4, replace=False).tolist())
    seen = 0
    # One of the five falls into a checkpoint being written, the others after a random line and delay.
    for moment in [*moments[:2], None, *moments[2:]]:
        run = subprocess.Popen(
            tiny_run.command(config, workdir),
            env=tiny_run.environment(cache=folder / "cache"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if moment is None:
            ready = lambda: tiny_run.saves(workdir)  # noqa: E731
        else:
            moment = max(moment, seen + 1)
            ready = lambda moment=moment: lines(workdir) >= moment  # noqa: E731
        code = stop_when(run, signal.SIGKILL, ready)
        assert code == -signal.SIGKILL, f"the run ended with {code} before it could be killed"
        seen = lines(workdir)
    assert seen < STEPS
    tiny_run.train(config, workdir, cache=folder / "cache")
    assert_same_run(workdir, folder / "whole")


def test_sigterm_saves_and_exits_75(uninterrupted):
    folder, config = uninterrupted
    workdir = folder / "stopped"
    run = subprocess.Popen(
        tiny_run.command(config, workdir),
        env=tiny_run.environment(cache=folder / "cache"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    code = stop_when(run, signal.SIGTERM, lambda: lines(workdir) >= 7)
    assert code == 75
    # Everything up to the stop is kept, though no multiple of the checkpoint interval.
    done = lines(workdir)
    saved = max(int(p.name) for p in (workdir / "checkpoints/full").iterdir())
    assert 7 <= done <= STEPS - 14 and saved == done
    tiny_run.train(config, workdir, cache=folder / "cache")
    assert_same_run(workdir, folder / "whole")


def test_a_finished_run_started_again_changes_nothing(uninterrupted):
    folder, config = uninterrupted
    before = (folder / "whole/metrics.jsonl").read_bytes()
    tiny_run.train(config, folder / "whole", cache=folder / "cache")
    assert (folder / "whole/metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused_with_the_difference(uninterrupted):
    folder, config = uninterrupted
    run = subprocess.run(
        tiny_run.command(config, folder / "whole", "stages[0].batch_size=2"),
        env=tiny_run.environment(cache=folder / "cache"),
        capture_output=True,
        text=True,
    )
    assert run.returncode not in (0, 75)
    assert "config.stages[0].batch_size: 4 → 2" in run.stderr and "Traceback" not in run.stderr

"""Sweeps: the points, what runs, what is left out the second time, and the table."""

import contextlib
import json
import os
import signal
import threading
import time

import pytest
import tiny_run

from luthier.cli.main import main
from luthier.training import sweep

STAGE = 'c.stage(data=DATA, steps=2, batch_size=4, sequence_length=48, schedule=c.spec("cosine", peak=1e-3))'


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def config(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

    def write(points: str):
        path = tiny_run.write_run(tmp_path, STAGE)
        path.write_text(path.read_text() + f"\n\ndef get_sweep(arg=None):\n    return {points}\n")
        return path

    return write


RATES = '[{"stages[0].schedule.peak": rate, "seed": 1} for rate in (1e-3, 1e-2)]'
LONG = """[
    {"stages[0].schedule.peak": 1e-3, "seed": 1},
    {"stages[0].schedule.peak": 1e-2, "seed": 1, "stages[0].steps": 300},
]"""


@contextlib.contextmanager
def signalling(number, ready):
    """Sends this process a signal as soon as `ready()`."""
    deadline = time.monotonic() + 100

    def send():
        while not ready() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def test_a_stopped_sweep_saves_goes_on_and_tabulates_all(config, tmp_path, capfd):
    path, workdir = config(LONG), tmp_path / "sweep"
    words = ["sweep", f"--config={path}", f"--workdir={workdir}", "--config.stages[0].clip_norm=0.5"]
    assert main([*words, "--dry_run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("luthier train ") and "peak=0.01" in lines[1]

    # SIGTERM in the second point: that saves and ends, and the same command goes on with it alone.
    with signalling(signal.SIGTERM, lambda: list(workdir.glob("001-*/metrics.jsonl"))):
        assert main(words) == 75
    log = workdir / "sweep.jsonl"
    assert [json.loads(line)["exit"] for line in log.read_text().splitlines()] == [0, 75]
    (stopped,) = [path for path in workdir.glob("001-*") if path.is_dir()]
    done = len(tiny_run.metrics(stopped))
    assert 1 <= done < 300 and (stopped / "checkpoints" / "sft" / str(done)).is_dir()
    capfd.readouterr()
    assert main(words) == 0
    assert "1 of 2 points are done" in capfd.readouterr().out and len(log.read_text().splitlines()) == 3
    assert [record["step"] for record in tiny_run.metrics(stopped)] == list(range(1, 301))
    rows = json.loads((workdir / "sweep.json").read_text())
    losses = [tiny_run.losses(workdir / row["name"])[-1] for row in rows]
    assert [row["loss"] for row in rows] == losses and losses[0] != losses[1]
    manifest = json.loads((workdir / rows[1]["name"] / "manifest.json").read_text())
    assert manifest["config"]["stages"][0]["clip_norm"] == 0.5 and manifest["config"]["seed"] == 1


TRAP = "trap 'exit {code}' TERM; echo ready; while true; do sleep 0.01; done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_point_that_runs_and_no_other_starts(number, tmp_path):
    commands = [("bash", "-c", TRAP.format(code=code)) for code in (75, 0, 0)]
    points = [sweep.Point(f"00{i}", {"seed": i}, command) for i, command in enumerate(commands)]
    run = [tmp_path / "000.log", tmp_path / "001.log"]
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with signalling(number, lambda: all(path.exists() and path.read_text() for path in run)):
        assert sweep.run(points, tmp_path, jobs=2, tell=str) == {"000": 75, "001": 0}
    assert not (tmp_path / "002.log").exists()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_second_interrupt_ends_at_once(tmp_path):
    point = sweep.Point("000", {}, ("bash", "-c", "trap '' TERM; echo ready; while true; do sleep 0.01; done"))
    started = lambda: (tmp_path / "000.log").exists() and (tmp_path / "000.log").read_text()  # noqa: E731
    asked = lambda: signal.getsignal(signal.SIGINT) is signal.default_int_handler  # noqa: E731
    with signalling(signal.SIGINT, started), signalling(signal.SIGINT, lambda: started() and asked()):
        with pytest.raises(KeyboardInterrupt):
            sweep.run([point], tmp_path, tell=str)


def test_a_launcher_gets_the_commands(config, tmp_path):
    assert main(["sweep", f"--config={config(RATES)}", f"--workdir={tmp_path / 's'}", "--prefix=echo handed"]) == 0
    logs = sorted((tmp_path / "s").glob("*.log"))
    assert len(logs) == 2 and logs[0].read_text().startswith("handed luthier train")


@pytest.mark.parametrize(
    "points, said",
    [
        ('[{"stages[0].schedule.peek": 1}]', "peak"),
        ('[{"seed": 1}, {"seed": 1}]', "are the same"),
        ("[]", "no points"),
    ],
)
def test_wrong_points_are_found_before_anything_runs(points, said, config, tmp_path, capsys):
    path = config(points)
    assert main(["sweep", f"--config={path}", f"--workdir={tmp_path / 's'}"]) == 2
    error = capsys.readouterr().err
    assert said in error and str(path) in error and error.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_failing_point_stops_no_other(config, tmp_path, capfd):
    path = config(
        '[{"stages[0].data.limit": 1, "stages[0].data.truncation": "never"}, {"stages[0].data.source": "none"}]'
    )
    assert main(["sweep", f"--config={path}", f"--workdir={tmp_path / 's'}"]) == 1
    exits = [json.loads(line)["exit"] for line in (tmp_path / "s" / "sweep.jsonl").read_text().splitlines()]
    assert exits == [2, 2]

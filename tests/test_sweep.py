"""Sweeps: the points, what runs, what is left out the second time, and the table."""

import json

import pytest
import tiny_run

from luthier.cli.main import main

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


def test_a_sweep_runs_what_is_missing_and_tabulates_all(config, tmp_path, capfd):
    path, workdir = config(RATES), tmp_path / "sweep"
    words = ["sweep", f"--config={path}", f"--workdir={workdir}", "--config.stages[0].clip_norm=0.5"]
    assert main([*words, "--dry_run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith("luthier train ") and "peak=0.01" in lines[1]
    assert main(words) == 0
    rows = json.loads((workdir / "sweep.json").read_text())
    losses = [tiny_run.losses(workdir / row["name"])[-1] for row in rows]
    assert [row["loss"] for row in rows] == losses and losses[0] != losses[1]
    manifest = json.loads((workdir / rows[1]["name"] / "manifest.json").read_text())
    assert manifest["config"]["stages"][0]["clip_norm"] == 0.5 and manifest["config"]["seed"] == 1

    # The log says that the second point failed: only it runs again.
    log = workdir / "sweep.jsonl"
    first, second = log.read_text().splitlines()
    log.write_text(first + "\n" + second.replace('"exit": 0', '"exit": 1') + "\n")
    capfd.readouterr()
    assert main(words) == 0
    said = capfd.readouterr().out
    assert "1 of 2 points are done" in said and len(log.read_text().splitlines()) == 3
    assert json.loads((workdir / "sweep.json").read_text()) == rows


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

"""Metrics: each step once and whole, whatever kill or resume; rates from closed forms."""

import glob
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from luthier.errors import LuthierError
from luthier.training import metrics
from luthier.training.metrics import MetricsWriter, Throughput, peak_flops, read_metrics, train_flops_per_token


def write(workdir, steps, resume_step=0, **options):
    with MetricsWriter(workdir, tensorboard=False, resume_step=resume_step, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": np.float32(1 / step), "num_tokens": np.int32(10 * step), "stage": "sft"})


def test_values_survive_json_bit_by_bit(tmp_path):
    values = np.random.default_rng(0).normal(size=100).astype(np.float32) * np.float32(10.0) ** np.arange(-30, 20, 0.5)
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step, value in enumerate(values.astype(np.float32), 1):
            writer.write(step, {"loss": value})
    found = np.array([record["loss"] for record in read_metrics(tmp_path)], np.float32)
    assert found.tobytes() == values.astype(np.float32).tobytes()


def test_what_is_not_a_number_is_null_and_the_line_is_json(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": np.float32("nan"), "grad_norm": float("inf"), "time/mfu": None, "stage": "a"})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert record == {"step": 1, "loss": None, "grad_norm": None, "time/mfu": None, "stage": "a"}


@pytest.mark.parametrize(
    "written, half, resume, kept",
    [
        ([1, 2, 3, 4, 5], "", 3, [1, 2, 3]),
        ([1, 2, 3, 4, 5], '{"step": 6, "lo', 4, [1, 2, 3, 4]),
        ([1, 2, 3], '{"step": 3', 3, [1, 2, 3]),
        ([5, 10, 15], '{"step": 20, "loss": 1.5}', 20, [5, 10, 15]),  # Whole but for its line end.
        ([5, 10, 15], "\0\0\0\0", 12, [5, 10]),  # What some file systems leave after a power cut.
        ([1, 2, 3], "", 0, []),
        ([], "", 7, []),
    ],
)
def test_resume_cuts_what_comes_after(tmp_path, written, half, resume, kept):
    if written:
        write(tmp_path, written)
        with open(tmp_path / "metrics.jsonl", "a") as file:
            file.write(half)
    write(tmp_path, [resume + 1, resume + 2], resume)
    assert [record["step"] for record in read_metrics(tmp_path)] == [*kept, resume + 1, resume + 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resumed_file_is_that_of_an_uninterrupted_run(tmp_path):
    write(tmp_path / "a", range(1, 11))
    write(tmp_path / "b", range(1, 9))
    write(tmp_path / "b", range(6, 11), resume_step=5)
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_opening_a_finished_run_changes_nothing(tmp_path):
    write(tmp_path, [1, 2, 3])
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        writer.flush()
        writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_step_is_written_once(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False, resume_step=3) as writer:
        writer.write(4, {"loss": 1.0})
        for step in (3, 4):
            with pytest.raises(ValueError, match="each step is written once"):
                writer.write(step, {"loss": 1.0})


def test_a_line_is_on_disk_when_write_returns(tmp_path):
    script = (
        "import os, sys; from luthier.training.metrics import MetricsWriter\n"
        "w = MetricsWriter(sys.argv[1], tensorboard=False)\n"
        "for s in range(1, 6): w.write(s, {'loss': s})\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path])
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
    write(tmp_path, [1, 2])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error(tmp_path):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"loss": 1.0})
        real, writer._file = writer._file, open("/dev/full", "w")
        with pytest.raises(LuthierError, match=r"metrics\.jsonl: could not be written: No space left on device\. Free"):
            writer.write(2, {"loss": 1.0})
        writer._file = real
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


def tensorboard_scalars(directory):
    """(step, value) of the tag `loss` as TensorBoard reads them: a START log discards later steps."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for file in sorted(glob.glob(f"{directory}/events*")):
        data = open(file, "rb").read()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            if event.session_log.status == SessionLog.START:
                found = {step: value for step, value in found.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "loss":
                    assert event.step not in found
                    found[event.step] = value.simple_value
    return found


def test_tensorboard_has_each_step_once_over_a_resume(tmp_path):
    for steps, resume in ((range(1, 9), 0), (range(6, 11), 5)):
        with MetricsWriter(tmp_path, resume_step=resume) as writer:
            for step in steps:
                writer.write(step, {"loss": step / 4})
    assert tensorboard_scalars(tmp_path / "tensorboard") == {step: step / 4 for step in range(1, 11)}


def test_no_tensorflow():
    script = (
        "import sys, tempfile; from luthier.training.metrics import MetricsWriter\n"
        "MetricsWriter(tempfile.mkdtemp()).close()\n"
        "assert not {'tensorflow', 'wandb', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_wandb_absent_is_a_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LuthierError, match=r"logging\.wandb: wandb is not installed\. Run pip install"):
        MetricsWriter(tmp_path, wandb="project")


def test_wandb_continues_the_same_run(tmp_path):
    pytest.importorskip("wandb")
    script = (
        "import sys; from luthier.training.metrics import MetricsWriter\n"
        "first, last, resume = map(int, sys.argv[2:])\n"
        "with MetricsWriter(sys.argv[1], tensorboard=False, wandb='p', resume_step=resume, config={'seed': 1}) as w:\n"
        "    for s in range(first, last): w.write(s, {'loss': 1 / s, 'stage': 'sft'})\n"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for numbers in (("1", "6", "0"), ("4", "8", "3")):
        subprocess.run([sys.executable, "-c", script, tmp_path, *numbers], env=environment, check=True)
    identity = (tmp_path / "wandb-id.txt").read_text().strip()
    runs = [p.name for p in (tmp_path / "wandb").iterdir() if p.name.startswith("offline-run-")]
    assert runs and all(name.endswith(identity) for name in runs)


@pytest.mark.parametrize(
    "kind, peak",
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("Tesla T4", 65e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
        ("Radeon", None),
    ],
)
def test_peak_flops(kind, peak):
    assert peak_flops(kind) == peak


def test_utilisation_reproduces_palm():
    """PaLM 540B, section 4.1: 238.3k tokens/s on 6144 TPU v4 are 46.2% MFU, 45.7% without attention."""
    layers, heads, size, length, chips = 118, 48, 256, 2048, 6144
    shape = {"num_layers": layers, "attention_width": heads * size, "sequence_length": length}
    flops = train_flops_per_token(matmul_params=540_350_000_000, trained_matmul_params=540_350_000_000, **shape)
    assert 238_300 * flops / (chips * 275e12) == pytest.approx(0.462, abs=0.001)
    shape["sequence_length"] = 0
    flops = train_flops_per_token(matmul_params=540_350_000_000, trained_matmul_params=540_350_000_000, **shape)
    assert 238_300 * flops / (chips * 275e12) == pytest.approx(0.457, abs=0.001)


def test_throughput_counts_time_between_calls_and_averages(monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 12.0, 14.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    throughput = Throughput(1e9, peak=1e12, window=2)
    first = throughput.measure(steps=2, tokens=1000)
    assert first == {"time/step_seconds": 2.0, "time/tokens_per_second": 250.0, "time/mfu": 0.25}
    throughput.restart()  # Six seconds of evaluation do not count.
    assert throughput.measure(steps=2, tokens=500)["time/step_seconds"] == 1.5
    assert throughput.measure(steps=2, tokens=500)["time/tokens_per_second"] == 250.0  # The first has left the window.


def test_peak_memory_is_the_high_water_mark():
    before = metrics.peak_memory_gib()
    block = np.ones(2**25)  # 256 MiB
    block[:] = 2
    del block
    assert 0.2 < metrics.peak_memory_gib() - before < 0.5 or metrics.peak_memory_gib() > 0.4
    assert Throughput.of_devices(1.0).peak is None

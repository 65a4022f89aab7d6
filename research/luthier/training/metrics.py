"""Metrics of a run: one line a logged step in `metrics.jsonl`, and the same in TensorBoard and wandb.

Names are TRL's, so that runs compare: `loss`, `mean_token_accuracy`, `entropy`, `grad_norm`,
`update_norm`, `learning_rate`, `num_tokens`, `epoch`. Keys under `time/` and `memory/` depend on the
machine; every other key of a killed and resumed run is that of an uninterrupted one, bit by bit.
"""

import collections
import importlib
import importlib.util
import json
import logging
import math
import pathlib
import re
import resource
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from luthier.errors import LuthierError
from luthier.training.files import is_local, unwritable, write_atomic

log = logging.getLogger(__name__)

FLUSH_SECONDS = 30.0  # An object store takes about one write a second of the same object.


class MetricsWriter:
    """Writes each step once, over kills and resumes; processes other than 0 write nothing.

    With the first new line, those after the restored step are cut off, as is one that a kill left
    half written: their steps are trained and written again. Opening a finished run changes nothing.

    Args:
      workdir: where `metrics.jsonl` and `tensorboard/` go; local or `gs://`.
      tensorboard: whether to write TensorBoard event files.
      wandb: Weights & Biases project; empty writes none. Its run id is kept in the workdir, so a
        resumed run continues the same curve.
      resume_step: step restored; 0 for a run from the start.
      config: the resolved config, shown by wandb.

    Raises:
      LuthierError: wandb is asked for and not installed; the workdir cannot be written.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        tensorboard: bool = True,
        wandb: str = "",
        resume_step: int = 0,
        config: Mapping[str, Any] | None = None,
    ):
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self._options = (tensorboard, wandb, resume_step, config)
        self._last_step, self._open = resume_step, False
        self._file, self._board, self._run = None, None, None
        if wandb and importlib.util.find_spec("wandb") is None:
            raise LuthierError(
                "wandb is not installed",
                where="logging.wandb",
                mend="Run pip install 'luthier[wandb]', or leave logging.wandb empty",
            )

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one step: floats, integers, strings or None; what is not finite becomes null.

        Raises:
          ValueError: the step is not after the last one written.
          LuthierError: the disk is full.
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}: each step is written once")
        self._last_step = step
        if jax.process_index() != 0:
            return
        if not self._open:
            self._start()
        record = {"step": int(step)} | {name: _plain(value) for name, value in metrics.items()}
        self._append(json.dumps(record, allow_nan=False) + "\n")
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(_plain(value), (int, float))}
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._run:
            # wandb drops steps that it has seen, which after a resume are the same numbers.
            self._run.log(numbers, step=step)

    def flush(self) -> None:
        """Makes all lines durable; call it before `Checkpoints.save`, so that no resume lacks a line."""
        if not self._open:
            return
        if self._file:
            self._file.flush()
        else:
            write_atomic(self.path, "".join(self._lines))
            self._flushed = time.monotonic()
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes every file."""
        self.flush()
        for writer in (self._file, self._board):
            if writer:
                writer.close()
        if self._run:
            self._run.finish()
        self._open = False

    def _start(self) -> None:
        tensorboard, wandb, resume_step, config = self._options
        self._lines = _lines_until(self.path, resume_step)
        write_atomic(self.path, "".join(self._lines))
        self._flushed, self._open = time.monotonic(), True
        if is_local(self.path):
            self._file = open(self.path, "a", encoding="utf-8")
        if tensorboard:
            self._board = _tensorboard(self.path.parent / "tensorboard", resume_step)
        if wandb:
            self._run = _wandb(self.path.parent, wandb, config)

    def _append(self, line: str) -> None:
        if self._file is None:
            self._lines.append(line)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self.flush()
            return
        try:
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise unwritable(self.path, error) from error


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, without a half-written last one; [] where there is none."""
    return [record for _, record in _records(epath.Path(workdir) / "metrics.jsonl")]


def _lines_until(path: epath.Path, step: int) -> list[str]:
    return [line for line, record in _records(path) if 0 < record["step"] <= step]


def _records(path: epath.Path) -> list[tuple[str, dict]]:
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", "replace").splitlines(keepends=True)
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if line.endswith("\n") and isinstance(record["step"], int):
                records.append((line, record))
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                log.warning("%s:%d: not a record, left out", path, number)
    return records


def _plain(value: Any) -> float | int | str | None:
    if value is None or isinstance(value, (str, bool)):
        return value
    value = np.asarray(value).item()
    return value if math.isfinite(value) else None


def _tensorboard(directory: epath.Path, resume_step: int):
    # tensorboardX imports torch where it finds it: seconds and hundreds of MiB for nothing.
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hide:
            del sys.modules["torch"]
    # Its file names tell seconds only: a run resumed within one would overwrite. TensorBoard reads
    # files by name and forgets what earlier ones have from the purge step on.
    return SummaryWriter(str(directory), purge_step=resume_step + 1, filename_suffix=f".{time.time_ns()}")


def _wandb(workdir: epath.Path, project: str, config: Mapping[str, Any] | None):
    wandb = importlib.import_module("wandb")
    id_file = workdir / "wandb-id.txt"
    if not id_file.exists():
        write_atomic(id_file, secrets.token_hex(4) + "\n")
    directory = str(workdir) if is_local(workdir) else tempfile.mkdtemp(prefix="wandb-")
    identity = id_file.read_text().strip()
    return wandb.init(project=project, id=identity, resume="allow", dir=directory, config=dict(config or {}))


def train_flops_per_token(
    *,
    matmul_params: int,
    trained_matmul_params: int,
    num_layers: int,
    attention_width: int,
    sequence_length: int,
) -> float:
    """Model FLOPs of one trained token: 4·N + 2·N_trained + 12·L·H·Q·T.

    "PaLM: Scaling Language Modeling with Pathways" (arXiv 2204.02311), appendix B, has 6·N + 12·L·H·Q·T:
    2·N forward, 2·N for the gradient of the inputs, 2·N for that of the weights, which frozen weights
    do not need. Causal masks and recomputation are not counted, as there.

    Args:
      matmul_params: N, numbers of all matrices that multiply a token, the head included and the
        embedding lookup not.
      trained_matmul_params: those of them that are trained.
      num_layers: L.
      attention_width: H·Q, query heads times their size.
      sequence_length: T.
    """
    attention = 12 * num_layers * attention_width * sequence_length
    return 4.0 * matmul_params + 2.0 * trained_matmul_params + attention


def forward_flops_per_token(
    *, matmul_params: int, num_layers: int, attention_width: int, sequence_length: int
) -> float:
    """Model FLOPs of one token of a forward pass, as a third of a trained one's: 2·N + 4·L·H·Q·T."""
    return 2.0 * matmul_params + 4 * num_layers * attention_width * sequence_length


# Dense bfloat16 FLOP/s of one JAX device (float16 where the device has no bfloat16), from the vendors'
# data sheets; the first pattern found in `device_kind` counts.
PEAK_FLOPS: tuple[tuple[str, float], ...] = (
    (r"TPU v6|TPU v6e|TPU v6 lite", 918e12),
    (r"TPU v5p|TPU v5$", 459e12),
    (r"TPU v5", 197e12),  # v5e calls itself "TPU v5 lite".
    (r"TPU v4", 275e12),
    (r"TPU v3", 61.5e12),  # A device is one of the two cores of a chip.
    (r"TPU v2", 22.5e12),
    (r"B200|GB200", 2250e12),
    (r"H100 PCIe", 756e12),
    (r"H100|H200|GH200", 989e12),
    (r"A100|A800", 312e12),
    (r"L40S", 362e12),
    (r"\bL4\b", 121e12),
    (r"A10G", 70e12),
    (r"V100", 125e12),
    (r"\bT4\b", 65e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense FLOP/s of one device, or None where it is not known (CPUs)."""
    return next((peak for pattern, peak in PEAK_FLOPS if re.search(pattern, device_kind)), None)


class Throughput:
    """Tokens and steps per second, and model-FLOP utilisation, averaged over the last calls.

    A single step says little: results reach the host in bursts.

    Args:
      flops_per_token: see `train_flops_per_token`.
      peak: FLOP/s of all devices together; None where unknown, then utilisation is None.
      window: calls averaged over.
    """

    def __init__(self, flops_per_token: float, *, peak: float | None, window: int = 10):
        self.flops_per_token, self.peak = flops_per_token, peak
        self._recent = collections.deque(maxlen=window)
        self.restart()

    @classmethod
    def of_devices(cls, flops_per_token: float) -> "Throughput":
        """Measures against the peak of all devices of the run."""
        peak = peak_flops(jax.devices()[0].device_kind)
        return cls(flops_per_token, peak=peak and peak * jax.device_count())

    def restart(self) -> None:
        """Leaves out the time since the last call: compilation, an evaluation, a pause."""
        self._since = time.perf_counter()

    def measure(self, steps: int, tokens: int) -> dict[str, float | None]:
        """Metrics with the steps since the last call added; their results must have reached the host.

        Args:
          tokens: of all processes in these steps, padding not counted.
        """
        now = time.perf_counter()
        self._recent.append((now - self._since, steps, tokens))
        self._since = now
        seconds, steps, tokens = map(sum, zip(*self._recent))
        rate = tokens / max(seconds, 1e-9)
        return {
            "time/step_seconds": seconds / max(steps, 1),
            "time/tokens_per_second": rate,
            "time/mfu": None if self.peak is None else rate * self.flops_per_token / self.peak,
        }


def peak_memory_gib() -> float:
    """Peak memory so far in GiB: of the fullest local accelerator, or of this process on a CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices() if device.platform != "cpu"]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) / 2**30 if peaks else _host_peak_bytes() / 2**30


def _host_peak_bytes() -> int:
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Bytes on macOS, kilobytes elsewhere.
    return peak if sys.platform == "darwin" else peak * 1024

"""Live progress of a long job: a line redrawn on a terminal, a curve in a notebook, plain lines anywhere else."""

import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from luthier.reporting import notebook

# (metric, how it reads), in the order shown; a metric that a job does not report is left out.
_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("mean_token_accuracy", "accuracy {:.1%}"),
    ("time/tokens_per_second", "{:,.0f} tokens/s"),
    ("memory/peak_gib", "{:.1f} GiB"),
)


class Progress:
    """Shows where a job of `total` steps stands.

    with Progress(total=60, description="sft") as progress:
        progress.update(step, {"loss": 0.31, "time/tokens_per_second": 2100.0})

    On a terminal one line is redrawn, in a notebook a line and the loss curve; otherwise each
    update prints one line, at most one every `plain_seconds` (the first and the last always).

    Args:
      total: number of the last step.
      description: what is going on, such as the stage's name.
      start: steps done before (a resumed run), which the remaining time does not count.
      console: where to write; standard error by default, so that results can be piped.
      plain_seconds: least time between two plain lines.
      quiet: show nothing, as in all processes of a run but the first.
    """

    def __init__(
        self,
        total: int,
        description: str,
        *,
        start: int = 0,
        console: Console | None = None,
        plain_seconds: float = 10.0,
        quiet: bool = False,
    ):
        self.total, self.description, self.start = total, description, start
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)
        self._plain_seconds = plain_seconds
        self._bar, self._task, self._live = None, None, None
        self._first: tuple[int, float] | None = None
        self._printed = float("-inf")

    def __enter__(self) -> "Progress":
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = Bar(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}", markup=False),
                console=self._console,
                redirect_stdout=False,
            )
            self._task = self._bar.add_task(self.description, total=self.total, completed=self.start, shown="starting")
            self._bar.start()
        elif self._console.is_jupyter:
            self._live = notebook.Live()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, metrics: Mapping[str, float] | None = None) -> None:
        """Says that `step` of `total` is done, with the latest metrics (keys as in metrics.jsonl)."""
        now = time.monotonic()
        shown = " · ".join([*_readings(metrics or {}), *self._remaining(step, now)])
        if self._bar is not None:
            self._bar.update(self._task, completed=step, shown=shown)
            return
        line = f"{self.description} {step}/{self.total}" + (f" · {shown}" if shown else "")
        if self._live is not None:
            self._live.update(step, line, metrics or {}, last=step >= self.total)
        elif step >= self.total or now - self._printed >= self._plain_seconds:
            self._printed = now
            self._console.print(line, markup=False)

    def log(self, text: str) -> None:
        """Prints a line above the progress."""
        (self._bar.console if self._bar is not None else self._console).print(text, markup=False)

    def _remaining(self, step: int, now: float) -> list[str]:
        # Measured from the first update on: what comes before it is mostly compilation.
        if self._first is None:
            self._first = (step, now)
        first_step, first_time = self._first
        if step <= first_step or step >= self.total:
            return []
        return [f"{duration((now - first_time) / (step - first_step) * (self.total - step))} left"]


def duration(seconds: float) -> str:
    """`41 s`, `3 min 05 s` or `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def _readings(metrics: Mapping[str, float]) -> list[str]:
    return [text.format(metrics[key]) for key, text in _SHOWN if metrics.get(key) is not None]

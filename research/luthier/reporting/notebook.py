"""Live progress in a notebook: a line of readings above the loss curve, redrawn in place."""

import html
import importlib.util
import time
from collections.abc import Mapping, Sequence
from typing import Any

SECONDS = 1.0  # least time between two drawings: one takes about 50 ms of the training's time

# What style.css gives the report's page: greys that read on a light and a dark notebook.
_STYLE = "--muted: #808080; --line: #80808040; --series-0: #1f8f75; --series-1: #c2662d; --series-2: #4a66b0"


class Live:
    """An output of the current cell that follows a job."""

    def __init__(self) -> None:
        from IPython.display import HTML, display

        self._html = HTML
        self._rows: list[dict[str, Any]] = []
        self._drawn = float("-inf")
        self._handle = display(HTML("<pre>starting</pre>"), display_id=True)

    def update(self, step: int, line: str, metrics: Mapping[str, Any], *, last: bool = False) -> None:
        """Shows `line` and the losses so far; at most once in `SECONDS`, the last always."""
        self._rows.append({"step": step, **metrics})
        if last or time.monotonic() - self._drawn >= SECONDS:
            self._handle.update(self._html(f"<pre>{html.escape(line)}</pre>{loss_curve(self._rows)}"))
            self._drawn = time.monotonic()


def loss_curve(metrics: Sequence[Mapping[str, Any]]) -> str:
    """HTML of the loss against the step, for records of metrics.jsonl; "" without the extra `report`."""
    if any(importlib.util.find_spec(name) is None for name in ("altair", "vl_convert")):
        return ""
    from luthier.reporting import charts

    curve = charts.line(metrics, "loss", title="loss", name="live-loss")
    return f'<div style="max-width: 30rem; {_STYLE}">{curve}</div>' if curve else ""

"""Tables for the terminal, and how numbers are written there and in the report."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from luthier.reporting import compare
from luthier.reporting.workdir import Evaluation


def evaluation_table(evaluations: Iterable[Evaluation], note: str = "") -> Table:
    """Results before and after training with 95% intervals and the difference."""
    table = Table(caption=note or None, caption_justify="left")
    table.add_column("evaluation")
    table.add_column("shots", justify="right")
    table.add_column("n", justify="right")
    for heading in ("before", "after", "difference"):
        table.add_column(heading, justify="right")
    for c in compare.comparisons(evaluations):
        result = c.latest.result
        cells = [f"{value(e.result)} {interval(e.result)}" if e else "–" for e in (c.before, c.after)]
        table.add_row(c.label, str(result.get("shots", "–")), str(result.get("n", "–")), *cells, change(c))
    return table


def retention_table(retention) -> Table:
    """What fine-tuning kept (a `luthier.evals.retention.Retention`), in points; the mean is the last row."""
    left_out = "\n".join(f"left out: {label}: {reason}" for label, reason in retention.left_out)
    table = Table("retention", caption=left_out or None, caption_justify="left")
    for heading in ("shots", "n", "chance", "before", "after", "difference"):
        table.add_column(heading, justify="right")
    for row in retention.rows:
        values = (percent(x) for x in (row.chance, row.before, row.after))
        table.add_row(row.label, str(row.shots), str(row.n), *values, points(row.difference))
    if retention.rows:
        table.add_section()
        ends = (f"{percent(side.value)} {_range(side)}" for side in (retention.before, retention.after))
        table.add_row("mean", "", "", "", *ends, points(retention.difference))
    return table


def parameter_table(counts: Mapping[str, int], *, trainable: Iterable[str]) -> Table:
    """Numbers held by each collection, such as {"params": 134515008, "lora": 4884480}."""
    table = Table("collection", "trained")
    table.add_column("parameters", justify="right")
    trained = set(trainable)
    for name, count in counts.items():
        table.add_row(name, "yes" if name in trained else "no", f"{count:,}")
    total = sum(counts.values())
    share = sum(count for name, count in counts.items() if name in trained) / total if total else 0.0
    table.add_row("all", f"{share:.2%}", f"{total:,}")
    return table


def result_table(results: Iterable[Mapping[str, Any]], note: str = "") -> Table:
    """Results of one model (the keys of evaluations/*.json) with 95% intervals."""
    table = Table("evaluation", "metric", caption=note or None, caption_justify="left")
    for heading in ("shots", "n", "value", "95% interval"):
        table.add_column(heading, justify="right")
    for r in results:
        table.add_row(r["name"], r["metric"], str(r["shots"]), str(r["n"]), value(r), interval(r))
    return table


def show(table: Table, console: Console | None = None) -> None:
    """Prints a table on standard output; full width where that is not a terminal."""
    if console is None:
        console = Console(highlight=False)
        if not console.is_terminal:
            console = Console(highlight=False, width=max(console.width, 120))
    console.print(table)


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def number(count: float) -> str:
    """1,234; above a hundred thousand 1.23 M and the like."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:,.0f}"


def value(result: Mapping[str, Any]) -> str:
    """The value of an evaluation: percent for shares, else four figures."""
    return percent(result["value"]) if compare.is_share(result) else f"{result['value']:.4g}"


def interval(result: Mapping[str, Any]) -> str:
    """`[12.3, 45.6]`, or "" where none was measured."""
    low, high = result.get("low"), result.get("high")
    if low is None or high is None:
        return ""
    scale = 100 if compare.is_share(result) else 1
    return f"[{_short(scale * low, scale)}, {_short(scale * high, scale)}]"


def change(comparison: compare.Comparison) -> str:
    """After − before: `+67.0 points [60.3, 73.0]`, or "–"."""
    difference = comparison.difference
    if difference is None:
        return "–"
    scale, unit = (100, " points") if comparison.share else (1, "")
    text = f"{scale * difference.value:+.1f}{unit}" if scale == 100 else f"{difference.value:+.4g}"
    if difference.low is None:
        return text
    return f"{text} [{_short(scale * difference.low, scale)}, {_short(scale * difference.high, scale)}]"


def points(difference) -> str:
    """A difference of shares with its interval: `-12.0 points [-15.1, -8.9]`."""
    return f"{100 * difference.value:+.1f} points {_range(difference)}"


def _range(interval) -> str:
    return f"[{100 * interval.low:.1f}, {100 * interval.high:.1f}]"


def _short(x: float, scale: int) -> str:
    return f"{x:.1f}" if scale == 100 else f"{x:.4g}"

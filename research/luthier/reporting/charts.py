"""Charts as inline SVG: Altair describes, vl-convert draws, without JavaScript or a network.

Colours are written as CSS variables of the page, so the same drawing serves light and dark.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert

# Stand-ins that survive Vega, each replaced by a variable of style.css afterwards.
_INK, _GRID = "#010101", "#020202"
_SERIES = ("#030301", "#030302", "#030303", "#030304", "#030305", "#030306")
_VARIABLES = {_INK: "var(--muted)", _GRID: "var(--line)", **{c: f"var(--series-{i})" for i, c in enumerate(_SERIES)}}

_CONFIG = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": _INK, "titleColor": _INK, "gridColor": _GRID, "domainColor": _GRID, "tickColor": _GRID,
        "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal", "titlePadding": 8, "tickCount": 5,
        "labelFlush": False,
    },
    "legend": {"labelColor": _INK, "titleColor": _INK, "labelFontSize": 11, "orient": "top", "title": None},
}  # fmt: skip


def line(
    metrics: Sequence[Mapping[str, Any]],
    key: str,
    *,
    title: str,
    name: str,
    format: str = "~s",
    from_zero: bool = False,
    size: tuple[int, int] = (330, 190),
) -> str:
    """An SVG of `key` against the step, one line a stage; "" where nothing was logged.

    Args:
      metrics: lines of metrics.jsonl.
      title: what is drawn, for readers who do not see it.
      name: makes the ids inside the SVG unique on the page.
      format: d3 format of the axis.
      from_zero: whether the axis starts at 0.
      size: width and height of the whole drawing; the page scales it.
    """
    rows = [
        {"step": m["step"], "value": m[key], "stage": str(m.get("stage", ""))}
        for m in metrics
        if _number(m.get(key)) and _number(m.get("step"))
    ]
    if not rows:
        return ""
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    scale = alt.Scale(domain=stages, range=[_SERIES[i % len(_SERIES)] for i in range(len(stages))])
    chart = (
        alt.Chart(
            alt.Data(values=rows),
            width=size[0],
            height=size[1],
            autosize=alt.AutoSizeParams(type="fit", contains="padding"),
            padding=2,
        )
        .mark_line(strokeWidth=2, interpolate="linear", point=len(rows) == 1)
        .encode(
            x=alt.X("step:Q", title=None, axis=alt.Axis(grid=False, format="~s"), scale=alt.Scale(nice=False)),
            y=alt.Y("value:Q", title=None, axis=alt.Axis(format=format), scale=alt.Scale(zero=from_zero)),
            color=alt.Color("stage:N", scale=scale, legend=alt.Legend() if len(stages) > 1 else None),
        )
    )
    return _svg({**chart.to_dict(), "config": _CONFIG}, name, title)


def _svg(spec: dict[str, Any], name: str, title: str) -> str:
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[\d.]+" height="[\d.]+"', rf'\1 role="img" aria-label="{title}"', svg, count=1)
    for stand_in, variable in _VARIABLES.items():
        svg = svg.replace(stand_in, variable)
    return svg


def _number(value: Any) -> bool:
    # JSON has no NaN; Python writes and reads it all the same, and a diverged run logs it.
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")

"""The results of a study as a page: a table with intervals, a plot, what became of each direction, and its reading.

    PYTHONPATH=benchmarks/studies python -m page [STUDY …]     # docs/results/STUDY.{md,svg} again, from its .json

What a study says in words is written after it was run, in `readings.yaml`.
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from harness import Plan, interval, read_plan, values_of

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "results"
READINGS = pathlib.Path(__file__).parent / "readings.yaml"


def write_page(plan: Plan, results: Mapping[str, Any], folder: pathlib.Path = DOCS) -> pathlib.Path:
    """Writes NAME.md, NAME.svg (with the extra `report`) and NAME.json, the results."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{plan.name}.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / f"{plan.name}.svg").write_text(plot(plan, results))
    page = folder / f"{plan.name}.md"
    page.write_text(text(plan, results))
    return page


def text(plan: Plan, results: Mapping[str, Any]) -> str:
    reading = (yaml.safe_load(READINGS.read_text()) or {}).get(plan.name, "")
    lines = [f"# {plan.name}", "", plan.question.strip(), *(["", reading.strip()] if reading else []), ""]
    lines += [f"![{plan.name}]({plan.name}.svg)", ""]
    lines += [f"| method | learning rate | {' | '.join(plan.shows)} |", f"|---|---|{'---|' * len(plan.shows)}"]
    before = [name.replace("after-", "before-", 1) if name.startswith("after-") else "" for name in plan.shows]
    start = [results["cells"][0]["measures"].get(name) for name in before]
    lines.append(f"| before training | | {' | '.join('–' if x is None else f'{x:.3f}' for x in start)} |")
    for method, rate in results["rates"].items():
        cells = [_cell(values_of(results["cells"], method, name)) for name in plan.shows]
        lines.append(f"| {method} | {rate:g} | {' | '.join(cells)} |")
    lines += ["", f"Means over {len(plan.seeds)} seeds with Student's 95% interval.", "", *_tuning(plan, results), ""]
    lines += ["Directions, written down before the run (`benchmarks/studies/plans.yaml`):", ""]
    lines += [f"- {_sentence(found)}" for found in results["directions"]]
    return "\n".join([*lines, *_kept(results)]) + "\n"


def _kept(results: Mapping[str, Any]) -> list[str]:
    """The tasks behind `retention`: before training, and how many points each method gained or lost on them."""
    cells, methods = results["cells"], list(results["rates"])
    labels = [name.removeprefix("kept-") for name in cells[0]["measures"] if name.startswith("kept-")]
    if not labels:
        return []
    rows = []
    for label in labels:
        changes = [list(values_of(cells, method, f"kept-{label}").values()) for method in methods]
        cut = [f"{round(100 * statistics.mean(found)):+d}" if found else "–" for found in changes]
        rows.append(f"| {label} | {100 * cells[0]['measures'][f'before-{label}']:.0f}% | {' | '.join(cut)} |")
    return [
        "",
        "What `retention` is the mean of: accuracy before training, and the points gained or lost (means over seeds).",
        "",
        f"| task | before | {' | '.join(methods)} |",
        f"|---|--:|{'--:|' * len(methods)}",
        *rows,
    ]


def _tuning(plan: Plan, results: Mapping[str, Any]) -> list[str]:
    """What each learning rate gave on the seed that chose."""
    if not results["tuning"]:
        return ["Learning rates were not tuned here."]
    lines = [f"Learning rates by {plan.tune['measure']} on seed {plan.tune['seed']}, of other records:", ""]
    for method in results["rates"]:
        tried = [cell for cell in results["tuning"] if cell["method"] == method]
        found = ", ".join(f"{cell['rate']:g}: {cell['measures'][plan.tune['measure']]:.3f}" for cell in tried)
        lines += [f"- {method}: {found}"] if tried else []
    return lines


def plot(plan: Plan, results: Mapping[str, Any]) -> str:
    """The results as SVG: lines over steps where the plan has a `curve`, else points with intervals."""
    import vl_convert

    chart = _lines(plan, results) if plan.curve else _points(plan, results)
    return vl_convert.vegalite_to_svg(chart.to_dict(), allowed_base_urls=[])


def _lines(plan: Plan, results: Mapping[str, Any]):
    """A measure over the steps: every seed thin, the mean of each method thick."""
    import altair as alt

    rows = [
        {"method": cell["method"], "seed": cell["seed"], "step": step, "value": cell["measures"][name]}
        for cell in results["cells"]
        for name, step in plan.curve["at"].items()
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("step:Q", title="step"), color=alt.Color("method:N", title=None, sort=list(results["rates"]))
    )
    value = alt.Y("value:Q", title=plan.curve["title"])
    each = base.mark_line(strokeWidth=1, opacity=0.35).encode(y=value, detail="seed:N")
    mean = base.mark_line(strokeWidth=3, point=True).encode(
        y=alt.Y("value:Q", aggregate="mean", title=plan.curve["title"])
    )
    return (each + mean).properties(width=480, height=280)


def _points(plan: Plan, results: Mapping[str, Any]):
    """Every method's measures as points with intervals, one panel a measure."""
    import altair as alt

    rows = [
        {"method": method, "measure": name, "value": mean, "low": max(low, -1e9), "high": min(high, 1e9)}
        for name in plan.shows
        for method in results["rates"]
        for mean, low, high in _intervals(values_of(results["cells"], method, name))
    ]
    base = alt.Chart(alt.Data(values=rows)).encode(y=alt.Y("method:N", title=None, sort=list(results["rates"])))
    spans = base.mark_rule(clip=True).encode(x=alt.X("low:Q", title=None, scale=alt.Scale(zero=False)), x2="high:Q")
    points = base.mark_point(filled=True, size=60).encode(x="value:Q")
    panels = (spans + points).properties(width=220, height=22 * len(results["rates"]))
    faceted = panels.facet(alt.Facet("measure:N", title=None, sort=list(plan.shows)), columns=3)
    return faceted.resolve_scale(x="independent")


def _intervals(by_seed: Mapping[int, float]) -> list[tuple[float, float, float]]:
    return [interval(list(by_seed.values()))] if by_seed else []


def _cell(by_seed: Mapping[int, float]) -> str:
    found = _intervals(by_seed)
    return "–" if not found else "{:.3f} [{:.3f}, {:.3f}]".format(*found[0])


def _sentence(found: Mapping[str, Any]) -> str:
    same = found.get("same")
    claim = f"{same[0]} and {same[1]} are the same" if same else f"{found.get('better')} exceeds {found.get('than')}"
    if "above" in found:
        claim = f"{found['method']} is above {found['above']:g}"
    margin = f" up to {found['within']:g}" if same else ""
    ends: Sequence[float | None] = found.get("interval", (None, None))
    measured = "" if "difference" not in found else f": {found['difference']:+.3f}"
    measured += "" if None in ends else " [{:+.3f}, {:+.3f}]".format(*ends)
    return f"{claim} on {found['measure']}{margin} ({found['because']}){measured}: **{found['verdict']}**."


if __name__ == "__main__":
    for name in sys.argv[1:] or [file.stem for file in DOCS.glob("*.json")]:
        print(write_page(read_plan(name), json.loads((DOCS / f"{name}.json").read_text())))

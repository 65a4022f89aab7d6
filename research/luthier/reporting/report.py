"""One self-contained HTML page about a run, made from nothing but the files of its workdir."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2.sandbox
from etils import epath

from luthier.reporting import compare, tables
from luthier.reporting.progress import duration
from luthier.reporting.workdir import Run, read_run, weights_note

_FOLDER = pathlib.Path(__file__).parent
_LONGEST_TEXT = 4000  # characters of one prompt or completion; the records keep the rest
# Control characters in a model's text are shown as pictures (␛); HTML does not allow them.
_CONTROL_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}

# (metric, title with unit, d3 format, axis from zero), in reading order.
_LEARNING = (
    ("loss", "loss, nats per target token", ".3~g", True),
    ("mean_token_accuracy", "token accuracy", ".0%", False),
    ("entropy", "entropy, nats", ".3~g", False),
    ("grad_norm", "gradient norm", ".2~g", True),
    ("update_norm", "update norm", ".2~g", True),
    ("learning_rate", "learning rate", ".1~e", True),
)
_MACHINE = (
    ("time/tokens_per_second", "tokens per second", "~s", True),
    ("time/step_seconds", "seconds per step", ".3~g", True),
    ("time/mfu", "model-FLOP utilisation", ".1%", True),
    ("memory/peak_gib", "peak memory, GiB", ".3~g", True),
)


def write_report(workdir: epath.PathLike) -> epath.Path:
    """Writes `report.html` into a workdir and returns its path.

    The page needs no JavaScript and no network. What the run did not get to write is left out;
    without the extra `report` the page has no charts.

    Raises:
      LuthierError: there is no workdir.
    """
    run = read_run(workdir)
    path = run.path / "report.html"
    unfinished = run.path / "report.html.tmp"
    unfinished.write_text(render(run))
    unfinished.replace(path)
    return path


def render(run: Run) -> str:
    """The page as HTML; all text of the run is escaped."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "text": message_text, "percent": tables.percent, "value": tables.value, "interval": tables.interval,
        "change": tables.change, "pretty": pretty, "number": tables.number, "points": tables.points,
    }  # fmt: skip
    found = compare.comparisons(run.evaluations)
    charts, why_not = _charts(run)
    asked = [c for c in found if c.latest.records]
    groups = [(c, compare.samples(c)) for c in [c for c in asked if c.after] or asked[:1]]
    page = environment.get_template("template.html").render(
        style=(_FOLDER / "style.css").read_text(),
        run=run,
        title=(run.manifest.get("config") or {}).get("name") or run.path.name,
        state=state(run),
        note=weights_note(run),
        headline=next((c for c in found if c.before and c.after), None),
        baseline=_best_before(found),
        shots_before=sorted({c.before.result.get("shots") or 0 for c in found if c.before}),
        comparisons=found,
        retained=compare.retained(run.evaluations),
        charts=charts,
        no_charts=why_not,
        samples=[(c, all_, _counts(all_), compare.chosen(all_)) for c, all_ in groups if all_],
        facts=_facts(run),
        stages=_stages(run),
        data=_data(run.manifest),
        data_names=list(dict.fromkeys(name for counts in _data(run.manifest).values() for name in counts)),
        manifest=_manifest(run.manifest),
    )
    return page.translate(_CONTROL_PICTURES).encode("utf-8", "replace").decode("utf-8")


def state(run: Run) -> str:
    """How far the run came, in a few words."""
    planned = sum(
        s.get("steps", 0) for s in (run.manifest.get("config") or {}).get("stages", ()) if isinstance(s, dict)
    )
    done = max((stage["step"] for stage in _stages(run)), default=0)
    if (run.path / "final").exists() or any(e.when == "after" for e in run.evaluations):
        return "finished"
    if not run.metrics:
        return "no step was logged"
    return f"not finished: last logged step is {done}" + (f" of {planned}" if planned else "")


def message_text(value: Any) -> str:
    """A prompt, completion or expected answer as text; chat messages one a paragraph."""
    if isinstance(value, (list, tuple)) and all(isinstance(m, Mapping) and "content" in m for m in value):
        value = "\n\n".join(f"{m.get('role', '')}: {m['content']}" for m in value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    left_out = len(text) - _LONGEST_TEXT
    return text if left_out <= 0 else f"{text[:_LONGEST_TEXT]} … ({left_out} more characters)"


def pretty(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, indent=1, ensure_ascii=False)


def _charts(run: Run) -> tuple[dict[str, list[tuple[str, str]]], str]:
    """(title, SVG) pairs by section, and why there are none where the extra is not installed."""
    try:
        from luthier.reporting import charts
    except ImportError as missing:
        return {}, f"Charts need the extra “report” ({missing.name} is not installed): pip install 'luthier[report]'"
    sections = {"learning": _LEARNING, "machine": _MACHINE}
    drawn = {
        section: [
            (title, charts.line(run.metrics, key, title=title, name=f"{section}{i}", format=format_, from_zero=zero))
            for i, (key, title, format_, zero) in enumerate(wanted)
        ]
        for section, wanted in sections.items()
    }
    return {section: [(title, svg) for title, svg in pairs if svg] for section, pairs in drawn.items()}, ""


def _best_before(found: tuple[compare.Comparison, ...]) -> compare.Comparison | None:
    """The best value before training among comparisons of one metric, where there are several."""
    before = [c for c in found if c.before and c.share]
    return max(before, key=lambda c: c.before.value) if len(before) > 1 else None


def _counts(found: tuple[compare.Sample, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for sample in found:
        counts[sample.kind] = counts.get(sample.kind, 0) + 1
    return counts


def _stages(run: Run) -> list[dict[str, Any]]:
    """The last metrics of each stage, and its median speed."""
    last: dict[str, dict[str, Any]] = {}
    speeds: dict[str, list[float]] = {}
    for m in run.metrics:
        name = str(m.get("stage", ""))
        if not isinstance(m.get("step"), int):
            continue
        last[name] = m
        speeds.setdefault(name, []).append(m.get("time/tokens_per_second") or 0.0)
    return [{**m, "name": name, "speed": sorted(speeds[name])[len(speeds[name]) // 2]} for name, m in last.items()]


def _facts(run: Run) -> list[tuple[str, str]]:
    """(what, value) pairs for the tiles at the top; only what is known."""
    stages, facts = _stages(run), []
    if stages:
        facts.append(("steps", tables.number(stages[-1]["step"])))
        tokens = [s["num_tokens"] for s in stages if isinstance(s.get("num_tokens"), (int, float))]
        if tokens:
            facts.append(("tokens", tables.number(sum(tokens))))
        if stages[-1]["speed"]:
            facts.append(("tokens per second", tables.number(stages[-1]["speed"])))
        seconds = _training_seconds(run)
        if seconds:
            facts.append(("training", duration(seconds)))
    memory = [m["memory/peak_gib"] for m in run.metrics if isinstance(m.get("memory/peak_gib"), (int, float))]
    if memory:
        facts.append(("peak memory", f"{max(memory):.1f} GiB"))
    return facts


def _training_seconds(run: Run) -> float:
    """Step time over the logged steps, each logged value standing for the steps since the one before."""
    total, done = 0.0, 0
    for m in run.metrics:
        step, seconds = m.get("step"), m.get("time/step_seconds")
        if isinstance(step, int) and isinstance(seconds, (int, float)):
            total += seconds * max(step - done, 0)
            done = step
    return total


def _data(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Counts of records by stage, where the manifest has them."""
    data = manifest.get("data")
    return {s: counts for s, counts in data.items() if isinstance(counts, dict)} if isinstance(data, dict) else {}


def _manifest(manifest: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Short values for a table, and the rest to unfold."""
    manifest = {k: v for k, v in manifest.items() if k != "data"}
    short = {k: v for k, v in manifest.items() if not isinstance(v, (dict, list)) and len(str(v)) < 120}
    return short, {k: v for k, v in manifest.items() if k not in short and v not in ("", None, {}, [])}

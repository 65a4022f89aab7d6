"""Reads the files of a workdir, as many as there are: a run may have been killed at any moment."""

import dataclasses
import json
from typing import Any

from etils import epath

from luthier.errors import LuthierError


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One evaluation: its result (evaluations/WHEN-LABEL.json) and its records (.jsonl)."""

    label: str
    result: dict[str, Any]
    records: tuple[dict[str, Any], ...] = ()

    @property
    def when(self) -> str:
        return self.result["when"]

    @property
    def value(self) -> float:
        return self.result["value"]

    @property
    def interval(self) -> tuple[float, float] | None:
        low, high = self.result.get("low"), self.result.get("high")
        return None if low is None or high is None else (low, high)


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir holds.

    Attributes:
      path: the workdir.
      manifest: manifest.json, or {}.
      metrics: the lines of metrics.jsonl, oldest first.
      evaluations: in order of time: before, steps, after.
      problems: what could not be read, one line each.
    """

    path: epath.Path
    manifest: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    evaluations: tuple[Evaluation, ...]
    problems: tuple[str, ...]


def read_run(workdir: epath.PathLike) -> Run:
    """The run in `workdir` (local or gs://); pieces that are missing or half-written are left out.

    Raises:
      LuthierError: the folder does not exist or is not a workdir.
    """
    path = epath.Path(workdir)
    if not path.is_dir():
        raise LuthierError(
            "no such workdir", where=workdir, mend="Give the folder that `luthier train --workdir` wrote"
        )
    problems: list[str] = []
    manifest_path, metrics_path = path / "manifest.json", path / "metrics.jsonl"
    manifest = _json(manifest_path, problems) if manifest_path.exists() else {}
    metrics = _json_lines(metrics_path, problems) if metrics_path.exists() else ()
    evaluations = _evaluations(path / "evaluations", problems)
    if not (manifest or metrics or evaluations or problems):
        mend = "Give the folder that `luthier train --workdir` wrote"
        raise LuthierError("not a workdir: it has no manifest, metrics or evaluations", where=workdir, mend=mend)
    return Run(path, manifest or {}, metrics, evaluations, tuple(problems))


def _evaluations(folder: epath.Path, problems: list[str]) -> tuple[Evaluation, ...]:
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        result = _json(path, problems)
        if result is None:
            continue
        if not {"when", "value"} <= result.keys() or not isinstance(result["value"], (int, float)):
            problems.append(f"evaluations/{path.name}: no result in it")
            continue
        label = path.stem.removeprefix(f"{result['when']}-")
        records = path.with_suffix(".jsonl")
        found.append(Evaluation(label, result, _json_lines(records, problems) if records.exists() else ()))
    return tuple(sorted(found, key=lambda e: (_order(e), e.label)))


def _order(evaluation: Evaluation) -> tuple[int, int]:
    phase = {"before": 0, "after": 2}.get(evaluation.when, 1)
    return phase, evaluation.result.get("step") or 0


def _json(path: epath.Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name}: not readable as JSON")
        return None
    return value


def _json_lines(path: epath.Path, problems: list[str]) -> tuple[dict[str, Any], ...]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError):
        problems.append(f"{path.name}: not readable")
        return ()
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            values.append(value)
        elif line.strip():
            problems.append(f"{path.name}:{number}: not a JSON object, left out")
    return tuple(values)


def weights_note(run: Run) -> str:
    """What a reader must know of the weights behind every number of this run, or ""."""
    notes = [run.manifest.get("note"), *(evaluation.result.get("note") for evaluation in run.evaluations)]
    return next((str(note) for note in notes if note), "")

"""Studies: a plan written down beforehand, cells that are run once each, a page that says what came of it.

A cell is a method, a learning rate and a seed: one `luthier.train` in a workdir of its own, so a killed study goes on
where it was, in the middle of a cell too. First the rate of each method is chosen on a seed of its own, then every
seed is run with it. All cells start from one model, so what is measured before training is measured once.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats
import yaml
from ml_collections import ConfigDict

from luthier.errors import LuthierError, near
from luthier.reporting import compare, read_run
from luthier.reporting.workdir import Evaluation

Train = Callable[[ConfigDict, pathlib.Path], Any]
PLANS = pathlib.Path(__file__).parent / "plans.yaml"


@dataclasses.dataclass(frozen=True)
class Cell:
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-lr{self.rate:g}-seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """One study of `plans.yaml`.

    Attributes:
      shows: measures of the page's table and plot.
      minutes: what a cell takes, about.
      tune: the `measure` and the `seed` that choose each method's rate.
      methods: learning rates to try, by method.
      curve: a `title`, and `at`, the step of each measure, where the plot is of one measure over steps.
    """

    name: str
    question: str
    shows: tuple[str, ...]
    directions: tuple[Mapping[str, Any], ...]
    minutes: float
    tune: Mapping[str, Any]
    seeds: tuple[int, ...]
    methods: Mapping[str, tuple[float, ...]]
    curve: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def tuning(self) -> list[Cell]:
        """Cells that choose a rate; a method with one rate needs none."""
        return [
            Cell(m, rate, self.tune["seed"]) for m, rates in self.methods.items() for rate in rates if len(rates) > 1
        ]

    def final(self, rates: Mapping[str, float]) -> list[Cell]:
        return [Cell(method, rate, seed) for method, rate in rates.items() for seed in self.seeds]


def read_plan(name: str, file: pathlib.Path = PLANS) -> Plan:
    plans = yaml.safe_load(file.read_text())
    if name not in plans:
        raise LuthierError(f"no study {name!r}", where=file, mend=near(name, plans))
    found = plans[name]
    lists = {key: tuple(found[key]) for key in ("directions", "seeds", "shows")}
    return Plan(name=name, **{**found, **lists, "methods": {m: tuple(rates) for m, rates in found["methods"].items()}})


def run_study(
    plan: Plan,
    recipe: Callable[[Cell], ConfigDict],
    folder: pathlib.Path,
    train: Train | None = None,
    *,
    further: Callable[[Sequence[Evaluation]], dict[str, float]] | None = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """Runs what is left of a study, and writes `results.json`.

    Args:
      recipe: the whole recipe of a cell.
      folder: of the study; cells are workdirs below it.
      train: `(recipe, workdir) -> None`; `luthier.train` if None.
      further: measures by name that are read off a cell's evaluations.
      jobs: cells at a time, each in a process with a core of its own; then all functions must be those of a module.
    """
    _announce(plan, folder)
    run = functools.partial(measured, recipe=recipe, folder=folder, train=train, further=further)
    with _mapper(jobs) as each:
        tuned = dict(zip(plan.tuning(), each(run, plan.tuning())))
        rates = {method: _best(plan, method, tuned) for method in plan.methods}
        cells = dict(zip(plan.final(rates), each(run, plan.final(rates))))
    results = {
        "study": plan.name,
        "rates": rates,
        "tuning": [dataclasses.asdict(cell) | found for cell, found in tuned.items()],
        "cells": [dataclasses.asdict(cell) | found for cell, found in cells.items()],
    }
    results["directions"] = [verdict(direction, results["cells"]) for direction in plan.directions]
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return results


@contextlib.contextmanager
def _mapper(jobs: int):
    """`map`, or that of `jobs` processes with a core each."""
    if jobs == 1:
        yield map
        return
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in range(jobs):
        cores.put(core)
    with concurrent.futures.ProcessPoolExecutor(jobs, context, _own_core, (cores,)) as pool:
        yield pool.map


def _own_core(cores) -> None:
    os.sched_setaffinity(0, {cores.get()})


def measured(
    cell: Cell,
    *,
    recipe: Callable[[Cell], ConfigDict],
    folder: pathlib.Path,
    train: Train | None = None,
    further: Callable[[Sequence[Evaluation]], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """The measures of a cell, run unless it was."""
    file, workdir = folder / f"{cell.name}.json", folder / cell.name
    if file.exists():
        return json.loads(file.read_text())
    if train is None:
        from luthier import train
    start = time.monotonic()
    _copy_results(folder / "before", workdir / "evaluations")
    train(recipe(cell), workdir)
    _copy_results(workdir / "evaluations", folder / "before")
    evaluations = read_run(workdir).evaluations
    measures = {f"{e.when}-{e.label}": e.value for e in evaluations}
    kept = compare.retained(evaluations)
    if kept and kept.rows:
        measures["retention"] = kept.difference.value
        measures |= {f"kept-{row.label}": row.difference.value for row in kept.rows}
    if further:
        measures |= further(evaluations)
    found = {"seconds": round(time.monotonic() - start, 1), "measures": measures}
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{cell.name}: {found['seconds']:.0f} s", flush=True)
    return found


def _copy_results(source: pathlib.Path, target: pathlib.Path) -> None:
    """What was measured before training; luthier measures again where the evaluation is another one."""
    for file in sorted(source.glob("before-*"), reverse=True):  # .jsonl, then the .json that says it is whole
        if not (target / file.name).exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target / f"{file.name}.part")
            (target / f"{file.name}.part").replace(target / file.name)


def _announce(plan: Plan, folder: pathlib.Path) -> None:
    """The hours that are left, by the cells that are done or else by the plan."""
    folder.mkdir(parents=True, exist_ok=True)
    patterns = [f"{cell.name}.json" for cell in plan.tuning()]
    patterns += [
        f"{method}-lr*-seed{seed}.json" for method in plan.methods for seed in plan.seeds
    ]  # rates to be chosen
    done = [json.loads(file.read_text())["seconds"] for pattern in patterns for file in folder.glob(pattern)]
    left = len(patterns) - len(done)
    seconds = statistics.median(done) if done else 60 * plan.minutes
    print(f"{plan.name}: {left} of {len(patterns)} cells left, about {left * seconds / 3600:.1f} hours", flush=True)


def _best(plan: Plan, method: str, tuned: Mapping[Cell, Mapping[str, Any]]) -> float:
    rates = plan.methods[method]
    if len(rates) == 1:
        return rates[0]
    found = {
        cell.rate: result["measures"][plan.tune["measure"]] for cell, result in tuned.items() if cell.method == method
    }
    return max(rates, key=found.__getitem__)


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over seeds with Student's 95% interval; infinite for one seed."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, -np.inf, np.inf
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)
    return mean, mean - half, mean + half


def values_of(cells: Sequence[Mapping[str, Any]], method: str, measure: str) -> dict[int, float]:
    """A measure of a method by seed."""
    rows = [row for row in cells if row["method"] == method and measure in row["measures"]]
    return {row["seed"]: row["measures"][measure] for row in rows}


def verdict(direction: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the seeds say of a direction: `holds`, `fails` or `open` (the interval covers both).

    Differences are taken seed by seed. "better" holds if the interval is above 0 and fails if it is below; "same"
    holds if the interval is within ±`within` and fails if it is outside altogether; "above" holds if the interval of
    `method` itself is above the number and fails if it is below.
    """
    values = functools.partial(values_of, cells, measure=direction["measure"])
    if "above" in direction:
        ours = values(direction["method"])
        apart = [value - direction["above"] for value in ours.values()]
    else:
        ours, theirs = map(values, direction.get("same") or (direction["better"], direction["than"]))
        apart = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    if not apart:
        return {**direction, "verdict": "open", "n": 0}
    mean, low, high = interval(apart)
    if "same" in direction:
        margin = direction["within"]
        holds, fails = -margin <= low and high <= margin, low > margin or high < -margin
    else:
        holds, fails = low > 0, high < 0
    found = "holds" if holds else "fails" if fails else "open"
    ends = [end if np.isfinite(end) else None for end in (low, high)]
    return {**direction, "difference": mean, "interval": ends, "n": len(apart), "verdict": found}

"""What fine-tuning kept of the other tasks: the retention table, before against after on the same records.

A task says something about forgetting only where there was something to forget: it enters the table if the model it
started from is at least `MARGIN` above the task's chance level, and is listed with the reason otherwise.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from luthier.evals.statistics import RESAMPLES, Difference, Interval, paired_difference

MARGIN = 0.20


@dataclasses.dataclass(frozen=True)
class Task:
    """Scores in [0, 1] of one task, record by record, by the model before and after.

    Attributes:
      label: its name.
      chance: the mean score of an answer that ignores the question.
      shots: solved examples in each prompt.
    """

    label: str
    before: Float[np.ndarray, " n"] | Sequence[float]
    after: Float[np.ndarray, " n"] | Sequence[float]
    chance: float = 0.0
    shots: int = 0


@dataclasses.dataclass(frozen=True)
class Row:
    """One task of the table; `difference` is after − before with its paired bootstrap interval."""

    label: str
    shots: int
    n: int
    chance: float
    before: float
    after: float
    difference: Difference


@dataclasses.dataclass(frozen=True)
class Retention:
    """The table, the tasks that did not enter it with the reason, and the means over those that did.

    The means weigh tasks alike. Their intervals are percentile bootstraps that resample records within tasks: they
    say how sure the means over these tasks are, not over all tasks there might be. None without a task.
    """

    rows: tuple[Row, ...]
    left_out: tuple[tuple[str, str], ...]
    before: Interval | None
    after: Interval | None
    difference: Interval | None


def retention(
    tasks: Iterable[Task],
    *,
    left_out: Sequence[tuple[str, str]] = (),
    margin: float = MARGIN,
    confidence: float = 0.95,
    seed: int = 0,
) -> Retention:
    """The retention table of tasks.

    Args:
      tasks: with as many scores before as after, of the same records in the same order.
      left_out: (label, reason) of tasks that were not measured on both sides.
      margin: how far above chance a task must be before, at least.
    """
    entered, outside = [], list(left_out)
    for task in tasks:
        start = float(np.mean(task.before))
        if start >= task.chance + margin - 1e-9:
            entered.append(task)
        else:
            reason = f"{start:.1%} before, less than {100 * margin:.0f} points above the chance level {task.chance:.1%}"
            outside.append((task.label, reason))
    rows = tuple(_row(task, confidence, seed) for task in entered)
    means = _means(entered, confidence, seed) if entered else (None, None, None)
    return Retention(rows, tuple(outside), *means)


def _row(task: Task, confidence: float, seed: int) -> Row:
    difference = paired_difference(task.after, task.before, confidence=confidence, seed=seed)
    before, after = float(np.mean(task.before)), float(np.mean(task.after))
    return Row(task.label, task.shots, len(task.before), task.chance, before, after, difference)


def _means(tasks: Sequence[Task], confidence: float, seed: int) -> tuple[Interval, Interval, Interval]:
    """Means over tasks of before, after and their difference; each resample draws records within every task."""
    rng = np.random.default_rng(seed)
    drawn, means = np.zeros((3, RESAMPLES)), np.zeros(3)
    for task in tasks:
        before, after = np.asarray(task.before, float), np.asarray(task.after, float)
        scores = np.stack([before, after, after - before])
        # How often each record is drawn is all that a mean needs.
        counts = rng.multinomial(len(before), np.full(len(before), 1 / len(before)), size=RESAMPLES)
        drawn += scores @ counts.T / len(before) / len(tasks)
        means += scores.mean(axis=1) / len(tasks)
    ends = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2], axis=1)
    return tuple(Interval(float(m), float(low), float(high)) for m, low, high in zip(means, *ends))


def of_evaluations(found: Mapping[str, tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]) -> Retention:
    """The table of evaluations of a run.

    Args:
      found: by label the evaluation before and after, each the content of `evaluations/WHEN-LABEL.json` with its
        `records`, or None where it was not measured.
    """
    tasks, left_out = [], []
    for label, (before, after) in found.items():
        reason = _unfit(before, after)
        if reason:
            left_out.append((label, reason))
            continue
        scores = [np.array([record["score"] for record in side["records"]]) for side in (before, after)]
        tasks.append(Task(label, *scores, chance=before["metrics"]["chance"], shots=before.get("shots") or 0))
    return retention(tasks, left_out=left_out)


def _unfit(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    """Why two results cannot be compared record by record, or ""."""
    if before is None or after is None:
        return f"not measured {'before' if before is None else 'after'}"
    asked = [[(r.get("prompt"), r.get("expected")) for r in side["records"]] for side in (before, after)]
    if not asked[0] or asked[0] != asked[1]:
        return "the records before and after differ"
    return ""

"""Before against after: which evaluations belong together, by how much they differ, which samples tell most."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from luthier.reporting.workdir import Evaluation

_NOT_SHARES = {"loss", "kl", "perplexity", "nll", "bits_per_byte", "ece", "brier"}


@dataclasses.dataclass(frozen=True)
class Difference:
    """`value` = after − before with its 95% interval; `paired` if the same examples were compared."""

    value: float
    low: float | None
    high: float | None
    paired: bool


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One evaluation (same label) over time; `before` or `after` may be missing."""

    label: str
    before: Evaluation | None
    during: tuple[Evaluation, ...]
    after: Evaluation | None

    @property
    def latest(self) -> Evaluation:
        return self.after or (self.during[-1] if self.during else self.before)

    @property
    def share(self) -> bool:
        """Whether the values are shares of examples, shown in percent."""
        return is_share(self.latest.result)

    @property
    def difference(self) -> Difference | None:
        return difference(self.before, self.after) if self.before and self.after else None


def is_share(result: Mapping[str, Any]) -> bool:
    return result.get("metric") not in _NOT_SHARES and 0 <= result["value"] <= 1


def comparisons(evaluations: Iterable[Evaluation]) -> tuple[Comparison, ...]:
    """Evaluations grouped by label, those measured both before and after first."""
    groups: dict[str, list[Evaluation]] = {}
    for evaluation in evaluations:
        groups.setdefault(evaluation.label, []).append(evaluation)
    found = []
    for label, group in groups.items():
        at = {e.when: e for e in group}
        during = tuple(e for e in group if e.when not in ("before", "after"))
        found.append(Comparison(label, at.get("before"), during, at.get("after")))
    return tuple(sorted(found, key=lambda c: (not (c.before and c.after), c.label)))


def retained(evaluations: Iterable[Evaluation]):
    """The `luthier.evals.retention.Retention` of the evaluations that ask for it, or None."""
    found = comparisons(evaluations)
    sides = lambda c: ({**e.result, "records": e.records} if e else None for e in (c.before, c.after))  # noqa: E731
    marked = {c.label: tuple(sides(c)) for c in found if (c.latest.result.get("spec") or {}).get("retention")}
    if not marked:
        return None
    from luthier.evals.retention import of_evaluations  # and scipy, half a second

    return of_evaluations(marked)


def difference(before: Evaluation, after: Evaluation) -> Difference:
    """After − before, its interval recovered from the two intervals.

    low = d − √((a−aₗ)² − 2ρ(a−aₗ)(bᵤ−b) + (bᵤ−b)²), high likewise; ρ is the correlation of the
    scores where both evaluations scored the same prompts, else 0 (MOVER: Zou and Donner 2008;
    with Wilson intervals Newcombe's hybrid score interval, 1998).
    """
    pairs = list(paired(before, after))
    complete = bool(pairs) and len(pairs) == len(before.records) == len(after.records)
    value = after.value - before.value
    if before.interval is None or after.interval is None:
        return Difference(value, None, None, complete)
    rho = _correlation([(b["score"], a["score"]) for b, a in pairs]) if complete else 0.0
    down = _hypotenuse(after.value - after.interval[0], before.interval[1] - before.value, rho)
    up = _hypotenuse(after.interval[1] - after.value, before.value - before.interval[0], rho)
    return Difference(value, value - down, value + up, complete)


def paired(before: Evaluation, after: Evaluation) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Records of both evaluations with the same prompt and expected answer, in the order of `after`."""
    waiting: dict[str, list[dict[str, Any]]] = {}
    for record in before.records:
        waiting.setdefault(_identity(record), []).append(record)
    for record in after.records:
        candidates = waiting.get(_identity(record))
        if candidates and _scored(record) and _scored(candidates[0]):
            yield candidates.pop(0), record


@dataclasses.dataclass(frozen=True)
class Sample:
    """One example side by side; `kind` is learnt, kept, lost, or missed (in words: outcome)."""

    prompt: Any
    expected: Any
    before: str | None
    after: str
    before_right: bool | None
    after_right: bool

    @property
    def kind(self) -> str:
        if self.before_right is None:
            return "right" if self.after_right else "wrong"
        return {(False, True): "learnt", (True, True): "kept", (True, False): "lost", (False, False): "missed"}[
            self.before_right, self.after_right
        ]


def samples(comparison: Comparison) -> tuple[Sample, ...]:
    """All examples of a comparison; single ones where there is no before or no after."""
    if comparison.before and comparison.after:
        pairs = list(paired(comparison.before, comparison.after))
        if pairs:
            return tuple(_sample(b, a) for b, a in pairs)
    return tuple(_sample(None, r) for r in comparison.latest.records if _scored(r))


def chosen(found: Iterable[Sample], count: int = 12) -> tuple[Sample, ...]:
    """Up to `count` samples, every kind represented: at least two of each, the rest in proportion."""
    groups: dict[str, list[Sample]] = {}
    for sample in found:
        groups.setdefault(sample.kind, []).append(sample)
    total = sum(map(len, groups.values()))
    quota = {kind: min(len(g), max(2, round(count * len(g) / total))) for kind, g in groups.items()}
    while sum(quota.values()) > count and max(quota.values()) > 1:
        quota[max(quota, key=quota.get)] -= 1
    order = [kind for kind in ("learnt", "lost", "missed", "kept", "right", "wrong") if kind in groups]
    return tuple(sample for kind in order for sample in groups[kind][: quota[kind]])


def _sample(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Sample:
    return Sample(
        prompt=after.get("prompt", ""),
        expected=after.get("expected"),
        before=None if before is None else str(before.get("completion", "")),
        after=str(after.get("completion", "")),
        before_right=None if before is None else before["score"] >= 0.5,
        after_right=after["score"] >= 0.5,
    )


def _identity(record: Mapping[str, Any]) -> str:
    return repr((record.get("prompt"), record.get("expected")))


def _scored(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("score"), (int, float))


def _hypotenuse(a: float, b: float, rho: float) -> float:
    return math.sqrt(max(a * a - 2 * rho * a * b + b * b, 0.0))


def _correlation(pairs: list[tuple[float, float]]) -> float:
    n = len(pairs)
    mean_x, mean_y = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in pairs)
    scale = math.sqrt(sum((x - mean_x) ** 2 for x, _ in pairs) * sum((y - mean_y) ** 2 for _, y in pairs))
    return covariance / scale if scale else 0.0

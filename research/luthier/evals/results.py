"""What an evaluation found, on disk as `evaluations/WHEN-LABEL.json` and `.jsonl` (its records)."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from luthier.errors import LuthierError
from luthier.evals.statistics import Interval


@dataclasses.dataclass(frozen=True)
class EvalResult:
    """One number with what stands behind it.

    Attributes:
      name: the evaluation's label in the recipe.
      metric: what `value` is: `accuracy`, `perplexity`, …
      value, low, high: the estimate and its 95% confidence interval.
      n: number of examples.
      metrics: further numbers.
      shots: solved examples in each prompt.
      note: what must be said beside the number, such as "4-bit-rounded weights".
      records: one object an example.
    """

    name: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    shots: int = 0
    note: str = ""
    records: tuple[Mapping[str, Any], ...] = dataclasses.field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        name: str,
        metric: str,
        interval: Interval,
        records: Sequence[Mapping[str, Any]],
        metrics: Mapping[str, float],
        shots: int = 0,
    ) -> "EvalResult":
        """The result over `records`; its value is among its metrics too."""
        value, low, high = interval.value, interval.low, interval.high
        metrics = {metric: value, **metrics}
        return cls(name, metric, value, low, high, len(records), metrics, shots=shots, records=tuple(records))


_FIELDS = [field.name for field in dataclasses.fields(EvalResult) if field.name != "records"]


def check_label(label: str) -> str:
    """The label, which names files.

    Raises:
      LuthierError: if it has characters that a file name should not have.
    """
    if not re.fullmatch(r"[\w][\w.+-]*", label):
        raise LuthierError(
            f"label {label!r} cannot name a file", where="evaluations", mend="Use letters, digits, _, -, + and dots"
        )
    return label


def write_result(workdir: epath.PathLike, when: str, result: EvalResult, spec: Mapping[str, Any] | None = None) -> None:
    """Writes the records, then the result: where that is, the evaluation is whole. Process 0 writes.

    Args:
      when: `before`, `after` or `step-N`.
      spec: the choice that it came from, so that a resumed run knows it again.
    """
    if jax.process_index():
        return
    folder = epath.Path(workdir) / "evaluations"
    step = int(when.removeprefix("step-")) if when.startswith("step-") else None
    about = {field: getattr(result, field) for field in _FIELDS} | {"when": when, "step": step, "spec": spec}
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in result.records)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / f"{when}-{check_label(result.name)}.jsonl", lines)
        _replace(folder / f"{when}-{result.name}.json", json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise LuthierError(
            f"cannot write: {error.strerror or error}",
            where=folder,
            mend="Free space and start the same command again",
        ) from error


def read_results(workdir: epath.PathLike) -> dict[str, EvalResult]:
    """Every whole evaluation of a workdir by "WHEN-LABEL", with its records."""
    folder = epath.Path(workdir) / "evaluations"
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    found = {}
    for file in files:
        lines = file.with_suffix(".jsonl").read_text().splitlines()
        found[file.stem] = parse_result(file.read_text(), tuple(map(json.loads, lines)))
    return found


def parse_result(text: str, records: tuple[Mapping[str, Any], ...] = ()) -> EvalResult:
    """The result that `write_result` wrote."""
    about = json.loads(text)
    return EvalResult(**{field: about[field] for field in _FIELDS}, records=records)


def _replace(path: epath.Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)

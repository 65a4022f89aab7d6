"""Runs the evaluations of a recipe, each once for a moment of the run."""

import dataclasses
import json
import logging
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from luthier.config import resolve, thaw
from luthier.decoding import Policy
from luthier.errors import LuthierError
from luthier.evals.results import EvalResult, check_label, parse_result, write_result

log = logging.getLogger(__name__)


def evaluate(
    policy: Policy,
    specs: Sequence[ConfigDict],
    *,
    workdir: epath.PathLike | None = None,
    when: str = "after",
    note: str = "",
) -> dict[str, EvalResult]:
    """Results by label; written to the workdir, and read from there where the same spec was run before.

    Args:
      specs: choices such as `spec('verifier', label=…, data=…)`; labels differ.
      when: `before`, `after` or `step-N`.
      note: what must be said beside every number of this model.
    """
    labels = [check_label(spec.label) for spec in specs]
    if len(set(labels)) < len(labels):
        raise LuthierError(f"labels repeat: {labels}", where="evaluations", mend="Give each evaluation its own label")
    results = {}
    for spec in specs:
        plain = json.loads(json.dumps(thaw(spec)))
        known = _known(workdir, when, spec.label, plain) if workdir is not None else None
        if known is None:
            known = dataclasses.replace(resolve(spec, "evaluation")(policy), note=note)
            if workdir is not None:
                write_result(workdir, when, known, plain)
        log.info("%s %s: %s %.4g [%.4g, %.4g]", when, spec.label, known.metric, known.value, known.low, known.high)
        results[spec.label] = known
    return results


def _known(workdir: epath.PathLike, when: str, label: str, spec: dict) -> EvalResult | None:
    """The result of an earlier start of this run; process 0 looks, and all act alike."""
    text = ""
    if jax.process_index() == 0:
        file = epath.Path(workdir) / "evaluations" / f"{when}-{label}.json"
        text = file.read_text() if file.exists() else ""
        text = text if text and json.loads(text).get("spec") == spec else ""
    if jax.process_count() > 1:
        data = np.frombuffer(text.encode(), np.uint8)
        size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
        full = np.resize(data, size) if len(data) else np.zeros(size, np.uint8)
        text = bytes(np.asarray(multihost_utils.broadcast_one_to_all(full), np.uint8)).decode() if size else ""
    return parse_result(text) if text else None

"""What is measured: tasks, verifiers, few-shot prompts, statistics."""

from luthier.evals.evaluate import evaluate
from luthier.evals.results import EvalResult, read_results, write_result

__all__ = ["EvalResult", "evaluate", "read_results", "write_result"]

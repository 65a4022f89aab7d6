"""What is measured: tasks, verifiers, few-shot prompts, statistics, and what fine-tuning kept.

The names below are imported when asked for: tables of results need no jax.
"""

from importlib import import_module

_PUBLIC = {
    "EvalResult": "luthier.evals.results",
    "evaluate": "luthier.evals.run",
    "read_results": "luthier.evals.results",
    "write_result": "luthier.evals.results",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'luthier.evals' has no attribute {name!r}")

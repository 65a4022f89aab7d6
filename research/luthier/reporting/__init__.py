"""What a run looks like: live progress, tables, and the HTML report made from the files of a workdir.

Imports no jax: everything is read from plain files or given as plain numbers.
"""

from importlib import import_module

_PUBLIC = {
    "Progress": "luthier.reporting.progress",
    "Run": "luthier.reporting.workdir",
    "read_run": "luthier.reporting.workdir",
    "write_report": "luthier.reporting.report",
    "evaluation_table": "luthier.reporting.tables",
    "parameter_table": "luthier.reporting.tables",
    "retention_table": "luthier.reporting.tables",
    "result_table": "luthier.reporting.tables",
    "show": "luthier.reporting.tables",
}

__all__ = list(_PUBLIC)


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'luthier.reporting' has no attribute {name!r}")

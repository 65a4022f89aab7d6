"""Notebooks: the `.py` source and the `.ipynb` say the same, and run to the end on a tiny model."""

import pathlib
import re

import jupytext
import nbclient
import nbformat
import pytest
import tiny_policy

from luthier import weights

COLABS = pathlib.Path(__file__).parents[1] / "colabs"
NAMES = sorted(path.stem for path in COLABS.glob("*.py"))


def said(cell) -> str:
    """All text and HTML that a cell put out."""
    parts = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        parts.append(output.get("text") or data.get("text/html") or data.get("text/plain") or "")
    return "".join(parts)


@pytest.mark.parametrize("name", NAMES)
def test_source_and_notebook_are_in_step(name):
    source, notebook = (jupytext.read(COLABS / f"{name}.{ending}") for ending in ("py", "ipynb"))
    mend = f"run jupytext --sync colabs/{name}.py"
    assert [(c.cell_type, c.source) for c in source.cells] == [(c.cell_type, c.source) for c in notebook.cells], mend
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    nbformat.validate(notebook)


def test_quickstart_runs_from_start_to_end(tmp_path, monkeypatch):
    policy = tiny_policy.policy()
    weights.export(tmp_path / "tiny", policy.bound.model.config, policy.variables["params"], policy.tokenizer)
    environment = {
        "LUTHIER_TINY": str(tmp_path / "tiny"),
        "LUTHIER_STEPS": "3",
        "LUTHIER_QUESTIONS": "4",
        "LUTHIER_CACHE": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
    }
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    notebook = nbformat.read(COLABS / "quickstart.ipynb", as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute()
    cells = dict.fromkeys(("The data", "Train", "After", "Talk to it", "Take it with you"), "")
    heading = ""
    for cell in notebook.cells:
        heading = cell.source.splitlines()[0].lstrip("# ") if cell.source.startswith("## ") else heading
        if heading in cells and cell.cell_type == "code":
            cells[heading] += said(cell)
    assert "assistant" in cells["The data"] or "completion" in cells["The data"]
    assert "3/3" in cells["Train"] and "<svg" in cells["Train"]
    assert "sums" in cells["After"] and re.search(r"\[\d+\.\d, \d+\.\d\]", cells["After"])
    # The merged model, written and read again, answers as the adapter does.
    assert cells["Talk to it"].startswith(cells["Take it with you"].splitlines()[1] + " ")
    run = tmp_path / "runs" / "quickstart"
    for made in ("report.html", "final/adapter_model.safetensors", "my-model/model.safetensors", "metrics.jsonl"):
        assert (run / made).is_file(), made

"""docs/igpt.ipynb runs from a clean clone, and is committed with its pictures."""

import json
import shutil

import pytest

from tests.helpers import ROOT

NOTEBOOK = ROOT / "docs" / "igpt.ipynb"
SECONDS = 600  # it promises less than ten minutes on two CPU cores


def outputs_of(notebook):
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def pictures_of(notebook):
    return [output["data"]["image/png"] for output in outputs_of(notebook) if "image/png" in output.get("data", {})]


def test_the_notebook_is_committed_as_it_ran_from_the_first_cell_to_the_last():
    notebook = json.loads(NOTEBOOK.read_text())
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert len(pictures_of(notebook)) == 6
    text = json.dumps([cell["source"] for cell in notebook["cells"]] + [o for o in outputs_of(notebook) if "text" in o])
    assert not any(output["output_type"] == "error" for output in outputs_of(notebook)) and "/tmp" not in text


@pytest.mark.slow
def test_the_notebook_runs_from_a_clean_clone(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name in ("igpt", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "eval_probe.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "docs").mkdir()
    monkeypatch.delenv("XLA_FLAGS")  # conftest.py turns LLVM's optimisation off
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = [cell["source"] for cell in notebook.cells]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    folder = {"metadata": {"path": str(tmp_path / "docs")}}
    nbclient.NotebookClient(notebook, timeout=SECONDS, resources=folder, record_timing=False).execute()
    assert len(pictures_of(notebook)) == 6 and [cell["source"] for cell in notebook.cells] == before
    assert (tmp_path / "runs" / "notebook" / "hf" / "model.safetensors").exists()

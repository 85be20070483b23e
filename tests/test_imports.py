"""Imports point one way through the layers of pyproject.toml; the contract notices every kind of forbidden import."""

import shutil
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def lint_imports(folder):
    """Checks the package `igpt` of a folder against the contract in its pyproject.toml: (kept, the report)."""
    code = "from importlinter.cli import lint_imports_command as main; main()"
    command = [sys.executable, "-c", code, "--no-cache"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert "Contracts: " in done.stdout, done.stdout + done.stderr
    return done.returncode == 0, done.stdout


def test_imports_point_one_way():
    kept, report = lint_imports(ROOT)
    assert kept, report


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("model.py", "import igpt.sample", "igpt.model -> igpt.sample"),
        ("palette.py", "def load():\n    from igpt.data import prepare", "igpt.palette -> igpt.data.prepare"),
        ("optim.py", "from igpt.model import ImageGPT", "igpt.optim -> igpt.model"),
        ("run/journal.py", "from igpt import evaluate", "igpt.run.journal -> igpt.evaluate"),
        ("tokens.py", "", "igpt.tokens"),
    ],
    ids=["upward", "upward in a function", "within a layer", "upward from a folder", "without a layer"],
)
def test_a_forbidden_import_breaks_the_contract(tmp_path, module, code, message):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "igpt", tmp_path / "igpt", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "igpt" / module).open("a") as file:
        file.write(f"\n{code}\n")
    kept, report = lint_imports(tmp_path)
    assert not kept and message in report, report

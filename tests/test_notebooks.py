"""Notebooks run from top to bottom, show their figures, and are kept without outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KERNEL = "molae-test"

#: Figures that each notebook draws.
FIGURES = {
    "01_convert": 5,
    "02_pretrain_latent": 2,
    "03_calibrate": 3,
    "04_compressed_experts": 4,
    "05_heal": 3,
}

#: Those that import torch and transformers.
NEED_TORCH = {"02_pretrain_latent", "03_calibrate", "04_compressed_experts", "05_heal"}

#: What libraries say on first use, or where no widgets are installed.
HARMLESS = ("font cache", "IProgress not found")


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    """A kernel of this very interpreter, whatever is registered on the machine."""
    pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    folder = tmp_path / "jupyter" / "kernels" / KERNEL
    folder.mkdir(parents=True)
    argv = [sys.executable, "-P", "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": KERNEL, "language": "python"}
    (folder / "kernel.json").write_text(json.dumps(spec))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setenv("MOLAE_NOTEBOOK_TINY", "1")
    return KERNEL


def test_all_are_listed():
    assert [path.stem for path in NOTEBOOKS] == sorted(FIGURES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_draws(path, kernel, tmp_path):
    import nbformat
    from nbclient import NotebookClient

    if path.stem in NEED_TORCH:
        pytest.importorskip("torch")
        pytest.importorskip("transformers")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    client = NotebookClient(
        notebook, timeout=300, kernel_name=kernel, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    complaints = [out.text for out in outputs if out.get("name") == "stderr"]
    assert [text for text in complaints if not any(h in text for h in HARMLESS)] == []
    figures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(figures) == FIGURES[path.stem]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_without_outputs(path):
    for cell in json.loads(_kept(path))["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def _kept(path: Path) -> str:
    """The text in git's index, so that a notebook may be open and run; else the file."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "show", f":notebooks/{path.name}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout if done.returncode == 0 else path.read_text(encoding="utf-8")

"""The tutorial notebook runs from top to bottom."""

import warnings

import nbformat
import pytest
from nbclient import NotebookClient

from helpers.documents import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.ipynb"
FIGURES = ("grad_norm_raw", "grad_norm", "condition", "mean_eigenvalue")


def text_of(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    notebook = nbformat.read(TUTORIAL, as_version=4)
    folder = str(tmp_path_factory.mktemp("tutorial"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own client
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": folder}}).execute()
    return notebook


def test_it_runs_and_shows_what_trained(executed):
    text = text_of(executed)
    assert "vit.embeddings.patch_embeddings.projection: Conv2d, n=192" in text
    assert all(figure in text for figure in FIGURES)
    assert "ViTForImageClassification" in text.strip().splitlines()[-1]


def test_its_last_plot_has_both_curves(executed):
    pictures = [output for cell in executed.cells for output in cell.get("outputs", []) if "data" in output]
    assert any("image/png" in picture.data for picture in pictures)


def test_what_it_stores_is_what_it_prints():
    """The site shows the stored outputs."""
    stored = nbformat.read(TUTORIAL, as_version=4)
    assert all(figure in text_of(stored) for figure in FIGURES)
    assert TUTORIAL.stat().st_size < 100_000

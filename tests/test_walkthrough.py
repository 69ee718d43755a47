"""walkthrough.ipynb: every cell runs, and its committed outputs are whole and say nothing about a machine."""

import json
import re

import nbformat
import pytest
from nbmake.nb_run import NotebookRun
from random_models import ROOT

NOTEBOOK = ROOT / "walkthrough.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows: of "stdout", "stderr", "display_data", "execute_result", "error"."""
    return {output.get("name", output.output_type) for output in cell.outputs}


def test_every_cell_runs_and_shows_what_is_committed(notebook):
    result = NotebookRun(NOTEBOOK, default_timeout=1800).execute()  # seconds a cell: only a hang takes as long
    assert result.error is None, result.error.trace
    for committed, executed in zip(code_cells(notebook), code_cells(result.nb), strict=True):
        assert kinds(executed) == kinds(committed), committed.source


def test_was_executed_once_from_top_to_bottom(notebook):
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    shown = set().union(*map(kinds, cells))
    assert shown == {"stdout", "display_data"}  # no errors, no warnings, no progress bars


def test_says_nothing_about_the_machine(notebook):
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in code_cells(notebook):
        assert cell.metadata == {}
        text = json.dumps([output.get("text") or output.data.get("text/plain") for output in cell.outputs])
        assert not re.search(r"[\s'\"(=]/\w+/", text), text  # an absolute path
    assert NOTEBOOK.stat().st_size < 600_000


def test_links_lead_to_files(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)", text)
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []

"""The notebooks run from top to bottom and show what they promise. One training run: over five seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from traitlets.config import Config

pytestmark = [
    pytest.mark.slow,  # starts a kernel and trains
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::ResourceWarning"
    ),  # the kernel client's
]


@pytest.fixture(scope="module")
def cells(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    notebook = nbformat.read(repository / "notebooks" / "01_first_federation.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    sockets = str(tmp_path_factory.mktemp("kernel") / "k")  # no ports, which somebody else might take first
    client = NotebookClient(
        notebook,
        timeout=120,
        resources={"metadata": {"path": str(repository)}},
        config=Config({"KernelManager": {"transport": "ipc", "ip": sockets}}),
    )
    client.execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(cells: list[Any], containing: str) -> str:
    """Return what the cell with this source shows, as text and HTML."""
    (cell,) = [cell for cell in cells if containing in cell.source]
    parts = []
    for output in cell.outputs:
        data = output.get("data", {})
        parts += [output.get("text", ""), data.get("text/plain", ""), data.get("text/html", "")]
    return "\n".join(parts)


def test_the_first_federation_trains_within_its_budget(cells: list[Any]) -> None:
    text = shown(cells, "affidavit.simulate(charter, sites, public=public)")
    assert "eastfield, northgate, riverside, st-olaf" in text
    assert "for one row (add_remove), delta 0.00001" in text


def test_an_entry_shows_what_its_site_signed(cells: list[Any]) -> None:
    text = shown(cells, 'run.entries("site.statement")[0]')
    assert "Entry site.statement" in text
    assert "discrete_gaussian" in text


def test_the_plot_is_a_picture(cells: list[Any]) -> None:
    (cell,) = [cell for cell in cells if cell.source == "run.plot()"]
    assert len(cell.outputs[0]["data"]["image/png"]) > 10_000


def test_a_run_without_privacy_is_refused_a_place_in_the_registry(cells: list[Any]) -> None:
    assert "cannot be registered" in shown(cells, "open_run.register()")


def test_the_version_goes_live_by_an_officers_signature(cells: list[Any]) -> None:
    assert "candidate" in shown(cells, "version = run.register()")
    assert "live" in shown(cells, "run.approve(")


def test_what_a_charter_cannot_describe_is_named(cells: list[Any]) -> None:
    assert "BatchNorm1d" in shown(cells, "nn.BatchNorm1d")

"""The Flower app bundle builds, carries both apps whole, and holds nothing of the agent."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCES = ("audit", "federation", "clients", "server", "tests/repository")
PARTS = ("pyproject.toml", "README.md", "LICENSE", "affidavit.py")
RELAY_MODULES = {"__init__.py", "client_app.py", "errors.py", "link.py", "socket_link.py"}
WHERE_APPS_COME_FROM = """
import sys
from clients.client_app import app as client_app
from federation.server_app import app as server_app
import audit.entries, clients.client_app, federation.server_app
for module in (audit.entries, clients.client_app, federation.server_app):
    print(module.__file__)
print(type(client_app).__name__, type(server_app).__name__, "torch" in sys.modules)
"""


@pytest.fixture(scope="module")
def bundle(repository, build_once) -> Path:
    return next(build_once("bundle", lambda folder: _build(repository, folder)).glob("*.fab"))


def test_bundle_holds_of_the_clients_the_relay_alone(bundle):
    with zipfile.ZipFile(bundle) as archive:
        names = archive.namelist()
    clients = {name.removeprefix("clients/") for name in names if name.startswith("clients/")}
    assert "client_app.py" in clients
    assert clients <= RELAY_MODULES
    assert {name.split("/")[0] for name in names} <= {
        "audit", "federation", "clients", "pyproject.toml", "README.md", "LICENSE", ".info",
    }  # fmt: skip


def test_bundle_loads_both_apps_from_itself_and_no_torch(bundle, tmp_path):
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", WHERE_APPS_COME_FROM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *files, apps = done.stdout.splitlines()
    assert all(Path(file).is_relative_to(tmp_path) for file in files), files
    assert apps == "ClientApp ServerApp False"


def test_same_sources_make_the_same_bundle(bundle, repository, tmp_path):
    again = _build(repository, tmp_path)
    assert again.name == bundle.name
    assert again.read_bytes() == bundle.read_bytes()


def _build(repository: Path, folder: Path) -> Path:
    """Build in a copy, because the builder writes beside the sources and dislikes some folder names."""
    app = folder / "affidavit"
    for name in SOURCES:
        shutil.copytree(repository / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in PARTS:
        shutil.copy(repository / name, app / name)
    done = subprocess.run(
        [str(Path(sys.executable).with_name("flwr")), "build", "--app", str(app)],
        cwd=folder,
        env={**os.environ, "FLWR_HOME": str(folder / "flower")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = folder.rglob("*.fab")
    return bundle.rename(folder / bundle.name)

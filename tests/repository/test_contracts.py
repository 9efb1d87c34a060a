"""The import contracts in pyproject.toml bite: each forbidden import, added to an innocent tree, is named."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = (
    "audit/verify/__init__.py",
    "audit/verify/steps.py",
    "audit/entries.py",
    "audit/epsilon.py",
    "audit/ledger.py",
    "federation/service.py",
    "clients/agent.py",
    "clients/client_app.py",
    "clients/loader.py",
    "server/app.py",
)
RUN_LINT_IMPORTS = (
    "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
)


@pytest.fixture
def tree(tmp_path: Path, repository: Path) -> Path:
    """Packages of our names and shape that import nothing, under our contracts."""
    for name in MODULES:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for package in ("audit", "federation", "clients", "server"):
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "affidavit.py").touch()
    shutil.copy(repository / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("audit/ledger.py", "import federation.service", "imports point down"),
        ("federation/service.py", "from clients import loader", "imports point down"),
        ("federation/service.py", "def late():\n    import server.app", "imports point down"),
        ("server/app.py", "import clients.loader", "imports point down"),
        ("clients/loader.py", "import server.app", "imports point down"),
        ("audit/ledger.py", "import affidavit", "nothing knows the front door"),
        ("audit/verify/steps.py", "import numpy", "the verifier stands alone"),
        ("audit/verify/__init__.py", "from audit import ledger", None),
        ("audit/entries.py", "import pydantic", "the verifier stands alone"),
        ("audit/epsilon.py", "def tighter():\n    import dp_accounting", "the verifier stands alone"),
        ("clients/client_app.py", "import torch", "the relay holds no data and no model"),
        ("clients/client_app.py", "import clients.agent", "the relay holds no data and no model"),
        ("clients/agent.py", "from flwr.app import Message", "the agent never meets Flower"),
    ],
)
def test_contract_names_a_forbidden_import(module, line, contract, tree):
    (tree / module).write_text(f"{line}\n")
    done = _lint(tree)
    if contract is None:
        assert done.returncode == 0, done.stdout
    else:
        assert done.returncode == 1, done.stdout + done.stderr
        assert f"{contract} BROKEN" in done.stdout


def test_contract_sees_through_a_module_between(tree):
    (tree / "audit/verify/steps.py").write_text("from audit import ledger\n")
    (tree / "audit/ledger.py").write_text("import sqlmodel\n")
    done = _lint(tree)
    assert done.returncode == 1
    assert "audit.verify.steps" in done.stdout
    assert "the verifier stands alone BROKEN" in done.stdout


def test_agent_is_reached_through_no_module_between(tree):
    (tree / "clients/client_app.py").write_text("from clients import loader\n")
    (tree / "clients/loader.py").write_text("import pandas\n")
    assert "the relay holds no data and no model BROKEN" in _lint(tree).stdout


def test_innocent_tree_keeps_every_contract(tree):
    assert _lint(tree).returncode == 0


def _lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN_LINT_IMPORTS, "--no-cache"],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

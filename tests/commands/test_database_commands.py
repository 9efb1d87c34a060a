"""`affidavit db upgrade`, and the commands on a log that lives in PostgreSQL."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ORIGIN = "hospital.example/log"
Affidavit = Callable[..., tuple[int, Any]]


@pytest.fixture(scope="module")
def server() -> Any:
    path = Path(__file__).parents[1] / "postgresql.py"
    spec = importlib.util.spec_from_file_location("tests_postgresql", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.running_server() as running:
        yield running


@pytest.fixture
def affidavit(run: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[int, Any]]:
    def command(*arguments: object) -> tuple[int, Any]:
        result = run(*arguments, "--home", tmp_path, "--json")
        return result.code, json.loads(result.out) if result.code == 0 else result.err

    return command


def test_log_in_postgresql_is_made_examined_and_given_a_new_key(server: Any, affidavit: Affidavit) -> None:
    url = server.new_schema()
    assert affidavit("init", ORIGIN, "--database", url)[0] == 0
    assert affidavit("log", "fsck") == (0, {"ok": True, "entries": 1})
    code, found = affidavit("log", "rotate-key", "--overlap", "5")
    assert (code, found["leaf_index"], found["retire_at"]) == (0, 1, 6)
    assert affidavit("db", "upgrade")[1]["after"] == 3
    server.execute("UPDATE leaf SET actor = 'nobody' WHERE idx = 1", url)
    code, said = affidavit("log", "fsck")
    assert code == 1
    assert "fsck.columns" in str(said)
    assert "leaf 1.actor" in str(said)


def test_older_log_says_which_command_it_needs(affidavit: Affidavit, tmp_path: Path) -> None:
    assert affidavit("init", ORIGIN)[0] == 0
    connection = sqlite3.connect(tmp_path / "coordinator" / "log.db")
    with connection:
        connection.executescript(
            "DROP TABLE lease; DROP TABLE ledger_migration; UPDATE head SET schema_version=1;"
            "DROP INDEX ix_leaf_subject; ALTER TABLE leaf DROP COLUMN subject"
        )
    connection.close()
    code, said = affidavit("log", "list")
    assert code == 1
    assert "affidavit db upgrade" in str(said)
    code, report = affidavit("db", "upgrade")
    assert (code, report["before"], report["after"]) == (0, 1, 3)
    assert affidavit("log", "fsck") == (0, {"ok": True, "entries": 1})
    assert affidavit("db", "upgrade")[1]["before"] == 3


@pytest.mark.parametrize(
    ("database", "code"),
    [
        ("mysql://h/d", "audit.location"),
        ("postgresql://u:hunter2@h/d", "federation."),
        ("postgresql://u@127.0.0.1:1/d?connect_timeout=2", "audit.ledger_unreachable"),
    ],
)
def test_database_that_cannot_be_used_makes_nothing(
    affidavit: Affidavit, tmp_path: Path, database: str, code: str
) -> None:
    status, said = affidavit("init", ORIGIN, "--database", database)
    assert status == 1
    assert code in str(said)
    assert "hunter2" not in str(said)
    assert not (tmp_path / "signer").exists()
    assert not (tmp_path / "coordinator" / "config.yaml").exists()


def test_upgrade_without_a_log_says_so(affidavit: Affidavit) -> None:
    status, said = affidavit("db", "upgrade")
    assert status == 1
    assert "audit.ledger_missing" in str(said)

"""`affidavit db upgrade`, and the commands on a log that lives in PostgreSQL."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from audit.checkpoints import Checkpoint, sign_checkpoint
from audit.entries import KeyRevoked
from audit.keys import SigningKey
from audit.notes import NoteSigner
from audit.tables import SCHEMA_VERSION
from federation.coordinator import Coordinator

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
    assert affidavit("log", "fsck") == (0, {"ok": True, "entries": 1, "checkpoints": 0})
    code, found = affidavit("log", "rotate-key", "--overlap", "5")
    assert (code, found["leaf_index"], found["retire_at"]) == (0, 1, 6)
    assert affidavit("db", "upgrade")[1]["after"] == SCHEMA_VERSION


# what somebody did to the database, the code that `log fsck` gives it, and where
DAMAGE = [
    ("UPDATE leaf SET actor = 'nobody' WHERE idx = 1", "columns", "leaf 1.actor"),
    ("UPDATE leaf SET time = '2020-01-01T00:00:00Z' WHERE idx = 1", "columns", "leaf 1.time"),
    ("UPDATE leaf SET run = 'r' WHERE idx = 1", "columns", "leaf 1.run"),
    ("UPDATE leaf SET event_id = 'x' WHERE idx = 1", "event_id", "leaf 1"),
    ("UPDATE leaf SET body = (SELECT body FROM leaf WHERE idx = 0) WHERE idx = 1", "leaf_hash", "leaf 1"),
    (
        "UPDATE leaf SET leaf_hash = (SELECT leaf_hash FROM leaf WHERE idx = 0) WHERE idx = 1",
        "leaf_hash", "leaf 1",
    ),
    ("DELETE FROM leaf WHERE idx = 1", "leaf_order", "leaf 2"),
    ("DELETE FROM leaf WHERE idx = 2", "head", "head"),
    ("UPDATE head SET size = 2", "checkpoint", "checkpoint 3"),
    ("UPDATE head SET size = 4", "head", "head"),
    ("UPDATE head SET edge = leaf_hash FROM leaf WHERE idx = 0", "head", "head"),
    ("UPDATE head SET origin = 'other.example/log'", "checkpoint", "checkpoint"),
    ("DELETE FROM head", "head", "head"),
    ("UPDATE ledger_migration SET version_num = 'x'", "schema", "ledger_migration"),
    ("UPDATE checkpoint SET tree_size = 1 WHERE tree_size = 2", "checkpoint", "checkpoint 1"),
    ("UPDATE checkpoint SET note_hash = note WHERE tree_size = 3", "checkpoint", "checkpoint 3"),
    ("INSERT INTO node SELECT 8, 0, leaf_hash FROM leaf WHERE idx = 0", "node", "node 8/0"),
    ("DROP INDEX ix_leaf_run", "schema", "leaf"),
    ("ALTER TABLE leaf ADD COLUMN more text", "schema", "leaf"),
    ("CREATE TABLE more (x integer)", "", ""),
    ("ALTER TABLE leaf DROP COLUMN round", "schema", "leaf"),
]  # fmt: skip


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {"folder": tmp_path_factory.mktemp("grown")}


@pytest.fixture(params=["sqlite", "postgresql"])
def grown(
    request: pytest.FixtureRequest, templates: dict[str, Any], tmp_path: Path, run: Callable[..., Any]
) -> Callable[[str], None]:
    """A log of three entries and a checkpoint; return what runs a statement on its database."""
    kind = request.param
    server = request.getfixturevalue("server") if kind == "postgresql" else None
    home = templates["folder"] / kind
    if kind not in templates:
        url = templates[kind] = server.new_database() if server else None
        commands = [["init", ORIGIN, *(["--database", url] if url else [])], ["log", "rotate-key"]]
        for command in [*commands, ["keys", "create", "--role", "officer"], ["log", "publish"]]:
            assert run(*command, "--home", home).code == 0
        good = run("log", "fsck", "--home", home, "--json").json
        assert good == {"ok": True, "entries": 3, "checkpoints": 2}
    shutil.copytree(home, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "coordinator" / "config.yaml"
    text = config.read_text().replace(str(home), str(tmp_path))
    if server:
        name = f"copy_{tmp_path.name}"
        original = templates[kind].partition("?")[0].rpartition("/")[2]
        server.execute(f'CREATE DATABASE "{name}" TEMPLATE "{original}"')
        text = text.replace(templates[kind], server.url(name))
    config.write_text(text)

    def execute(statement: str) -> None:
        if server:
            server.execute(statement, server.url(f"copy_{tmp_path.name}"))
            return
        with sqlite3.connect(tmp_path / "coordinator" / "log.db") as connection:
            connection.execute(statement)
        connection.close()

    return execute


@pytest.mark.parametrize(("statement", "problem", "where"), DAMAGE, ids=[item[0] for item in DAMAGE])
def test_damage_is_named_by_the_command_on_either_database(
    grown: Callable[[str], None], affidavit: Affidavit, statement: str, problem: str, where: str
) -> None:
    grown(statement)
    code, said = affidavit("log", "fsck")
    if not problem:  # SQLite's file is the log's alone; a PostgreSQL schema may be shared
        assert code == 0 or "fsck.schema" in str(said)
        return
    assert code == 1, said
    assert f"error fsck.{problem}: " in str(said)
    assert where in str(said)
    assert str(said).count("\n") == 1


def test_checkpoint_that_no_key_of_the_log_signed_is_named(
    grown: Callable[[str], None], affidavit: Affidavit, tmp_path: Path
) -> None:
    """Whoever writes to the database alone, without the key."""
    with Coordinator.open(tmp_path / "coordinator") as home:
        thief = NoteSigner(ORIGIN, SigningKey.generate())
        home.append(KeyRevoked(key_id="x"), "server")
        home.ledger.store_checkpoint(sign_checkpoint(Checkpoint(ORIGIN, 4, home.ledger.root_hash), thief))
    code, said = affidavit("log", "fsck")
    assert (code, "error fsck.checkpoint: checkpoint 4" in str(said)) == (1, True)
    assert affidavit("log", "publish")[1]["tree_size"] == 4, "and it keeps nobody from signing"


def test_dump_of_postgresql_is_refused_once_the_signer_went_on(
    server: Any, affidavit: Affidavit, tmp_path: Path
) -> None:
    """`backup` names the tools; a log restored by them is compared with the signer's state when opened."""
    url = server.new_database()
    assert affidavit("init", ORIGIN, "--database", url)[0] == 0
    code, said = affidavit("backup", tmp_path / "b.tar.gz")
    assert (code, "backup.unusable" in str(said)) == (1, True)
    for word in ("pg_dump --format=custom", "pg_basebackup", "the signer's home", url.partition("?")[0][:20]):
        assert word in str(said), word
    assert "psycopg" not in str(said)
    assert not (tmp_path / "b.tar.gz").exists()
    affidavit("log", "publish")
    dump = server.folder / "log.dump"
    server.run("pg_dump", "--format=custom", f"--file={dump}", f"--dbname={url}")
    again, behind = server.new_database(), server.new_database()
    server.run("pg_restore", f"--dbname={again}", str(dump))
    config = tmp_path / "coordinator" / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace(url, again))
    assert affidavit("log", "fsck") == (0, {"ok": True, "entries": 1, "checkpoints": 1})
    affidavit("keys", "create", "--role", "officer")
    assert affidavit("log", "publish")[1]["tree_size"] == 2
    server.run("pg_restore", f"--dbname={behind}", str(dump))
    config.write_text(text.replace(url, behind))
    for command in (("log", "publish"), ("log", "rotate-key"), ("models", "list"), ("serve", "--port", "0")):
        code, said = affidavit(*command)
        assert (code, "audit.signer_rollback" in str(said)) == (1, True), command
    assert affidavit("log", "list")[0] == 0, "it can still be read"


def test_older_log_says_which_command_it_needs(affidavit: Affidavit, tmp_path: Path) -> None:
    assert affidavit("init", ORIGIN)[0] == 0
    connection = sqlite3.connect(tmp_path / "coordinator" / "log.db")
    with connection:
        for column in ("model", "version", "run", "site", "principal"):  # once, an index held every entry
            connection.execute(f"DROP INDEX ix_leaf_{column}")
            connection.execute(f"CREATE INDEX ix_leaf_{column} ON leaf ({column})")
        connection.executescript(
            "DROP TABLE lease; DROP TABLE ledger_migration; UPDATE head SET schema_version=1;"
            "DROP INDEX ix_leaf_subject; ALTER TABLE leaf DROP COLUMN subject"
        )
    connection.close()
    code, said = affidavit("log", "list")
    assert code == 1
    assert "affidavit db upgrade" in str(said)
    assert affidavit("log", "fsck") == (0, {"ok": True, "entries": 1, "checkpoints": None})
    code, report = affidavit("db", "upgrade")
    assert (code, report["before"], report["after"]) == (0, 1, SCHEMA_VERSION)
    assert affidavit("log", "fsck") == (0, {"ok": True, "entries": 1, "checkpoints": 0})
    assert affidavit("db", "upgrade")[1]["before"] == SCHEMA_VERSION


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

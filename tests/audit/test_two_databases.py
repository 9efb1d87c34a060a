"""What a log promises on SQLite it promises on PostgreSQL, and the answers are the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from audit import merkle
from audit.errors import (
    EntryColumnsError,
    EntryNotFoundError,
    EventIdConflictError,
    LedgerExistsError,
    LedgerMissingError,
    LedgerUnreachableError,
    LedgerUnsafeError,
    LocationError,
    RootMismatchError,
    TreeRangeError,
)
from audit.fsck import fsck
from audit.ledger import Ledger
from audit.location import Location, log_location, read_secret
from audit.notes import NoteSigner

Place = Path | str


def test_log_reads_back_what_was_appended(place: Place, log_tools: SimpleNamespace) -> None:
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        placed = log_tools.fill(ledger, range(600), run="r1")
        assert [found.leaf_index for found in placed] == list(range(600))
        bodies = [log_tools.make_entry(n, run="r1").body for n in range(600)]
        assert ledger.entries(0, 600) == bodies
        assert ledger.root_hash == merkle.root_of([merkle.hash_leaf(body) for body in bodies])
        assert [found.leaf_index for found in ledger.search(run="r1", after=597)] == [598, 599]
        for leaf, size in ((0, 1), (3, 600), (255, 257), (511, 512), (599, 600)):
            merkle.verify_inclusion(
                leaf_index=leaf,
                tree_size=size,
                leaf_hash=merkle.hash_leaf(bodies[leaf]),
                proof=ledger.inclusion_proof(leaf, size),
                root_hash=ledger.root_at(size),
            )
    with Ledger.open(place) as again:
        assert (again.origin, again.tree_size) == (log_tools.ORIGIN, 600)
    report = fsck(place, columns_of=log_tools.columns_of, origin=log_tools.ORIGIN)
    assert (report.ok, report.entries) == (True, 600)


def test_both_databases_give_the_same_roots_proofs_and_pages(
    tmp_path: Path, postgresql_server: Any, log_tools: SimpleNamespace
) -> None:
    answers = []
    for place in (tmp_path / "log.db", postgresql_server.new_schema()):
        with Ledger.create(place, log_tools.ORIGIN) as ledger:
            log_tools.fill(ledger, range(300))
            for number, text in enumerate(("Zoë", "a b", "a-b", "B", "Ä", "z", "_", "ab")):
                made = log_tools.make_entry(1000 + number, run=text)
                ledger.append_wait(made.body, event_id=made.event_id, index_columns=made.columns)
            found = ledger.search(since="2026", until="2027", limit=500, newest_first=True)
            answers.append(
                (
                    ledger.root_hash,
                    ledger.inclusion_proof(17, 300),
                    ledger.consistency_proof(12, 300),
                    [(entry.leaf_index, entry.columns, entry.event_id) for entry in found],
                )
            )
    assert answers[0] == answers[1]


def test_retry_of_an_event_gets_its_place_and_another_body_is_refused(
    place: Place, log_tools: SimpleNamespace
) -> None:
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        made, other = log_tools.make_entry(1), log_tools.make_entry(1, text="changed")
        first = ledger.append(made.body, event_id=made.event_id, index_columns=made.columns)
        again = ledger.append(made.body, event_id=made.event_id, index_columns=made.columns)
        assert again.result(30)[:3] == first.result(30)[:3]
        with pytest.raises(EventIdConflictError):
            ledger.append_wait(other.body, event_id=made.event_id, index_columns=other.columns)
        assert ledger.tree_size == 1


def test_second_creation_and_missing_leaves_are_refused(place: Place, log_tools: SimpleNamespace) -> None:
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(2))
        with pytest.raises(LedgerExistsError):
            Ledger.create(place, log_tools.ORIGIN)
        with pytest.raises(EntryNotFoundError):
            ledger.entry(2)
        with pytest.raises(TreeRangeError):
            ledger.inclusion_proof(1, 3)
        assert ledger.tree_size == 2


def test_checkpoint_of_another_tree_is_not_kept(
    place: Place, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> None:
    from audit.checkpoints import Checkpoint, sign_checkpoint

    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(3))
        good = sign_checkpoint(Checkpoint(log_tools.ORIGIN, 3, ledger.root_hash), log_signer)
        bad = sign_checkpoint(Checkpoint(log_tools.ORIGIN, 3, bytes(32)), log_signer)
        assert ledger.store_checkpoint(good) == ledger.store_checkpoint(good) == good
        with pytest.raises(RootMismatchError):
            ledger.store_checkpoint(bad)
        assert ledger.checkpoints() == [good]


@pytest.mark.parametrize(
    ("column", "value"),
    [("run", "a\0b"), ("site", "x" * 1025), ("model", "\ud800"), ("round", 2**63), ("round", -(2**63) - 1)],
)
def test_column_that_no_database_can_hold_spoils_no_batch(
    place: Place, log_tools: SimpleNamespace, column: str, value: Any
) -> None:
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        made = log_tools.make_entry(1)
        neighbour = ledger.append(made.body, event_id=made.event_id, index_columns=made.columns)
        with pytest.raises(EntryColumnsError, match=column):
            ledger.append(b"{}", event_id="bad", index_columns=replace(made.columns, **{column: value}))
        assert neighbour.result(30).leaf_index == 0
        assert ledger.tree_size == 1


def test_numbers_beyond_32_bits_are_kept(place: Place, log_tools: SimpleNamespace) -> None:
    with Ledger.create(place, log_tools.ORIGIN) as ledger:
        made = log_tools.make_entry(1, round=2**40)
        ledger.append_wait(made.body, event_id=made.event_id, index_columns=made.columns)
        assert [found.columns.round for found in ledger.search(round=2**40)] == [2**40]


# PostgreSQL alone


@pytest.mark.parametrize(
    ("damage", "problem", "where"),
    [
        ("UPDATE leaf SET body = 'x' WHERE idx = 9", "leaf_hash", "leaf 9"),
        ("UPDATE leaf SET leaf_hash = sha256('x') WHERE idx = 9", "leaf_hash", "leaf 9"),
        ("UPDATE leaf SET event_id = 'other' WHERE idx = 9", "event_id", "leaf 9"),
        ("UPDATE leaf SET actor = 'other' WHERE idx = 9", "columns", "leaf 9.actor"),
        ("UPDATE leaf SET run = 'invented' WHERE idx = 9", "columns", "leaf 9.run"),
        ("DELETE FROM leaf WHERE idx = 9", "leaf_order", "leaf 10"),
        ("DELETE FROM leaf WHERE idx = 299", "head", "head"),
        ("UPDATE leaf SET idx = 300 WHERE idx = 9", "leaf_order", "leaf 10"),
        ("UPDATE node SET hash = sha256('x')", "node", "node 8/0"),
        ("INSERT INTO node VALUES (8, 1, sha256('x'))", "node", "node 8/1"),
        ("UPDATE head SET size = 299", "head", "head"),
        ("UPDATE head SET origin = 'other.example/log'", "head", "head.origin"),
        ("DELETE FROM head", "head", "head"),
        ("INSERT INTO checkpoint VALUES (5, 'note', sha256('note'))", "checkpoint", "checkpoint 5"),
        ("UPDATE ledger_migration SET version_num = '0001'", "schema", "ledger_migration"),
        ("DROP INDEX ix_leaf_run", "schema", "leaf"),
        ("CREATE INDEX sly ON leaf (body)", "schema", "leaf"),
        ("ALTER TABLE leaf ADD COLUMN sly text", "schema", "leaf.sly"),
        ("ALTER TABLE leaf ALTER COLUMN type SET DEFAULT 'x'", "schema", "leaf.type"),
        ("DROP TABLE lease", "schema", "lease"),
        ("CREATE RULE sly AS ON INSERT TO leaf DO INSTEAD NOTHING", "schema", "leaf.sly"),
    ],
)
def test_fsck_names_the_first_bad_thing_in_postgresql(
    postgresql_server: Any, log_tools: SimpleNamespace, damage: str, problem: str, where: str
) -> None:
    url = postgresql_server.new_schema()
    with Ledger.create(url, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(300))
    postgresql_server.execute(damage, url)
    report = fsck(url, columns_of=log_tools.columns_of, origin=log_tools.ORIGIN)
    assert (report.ok, report.problem, report.where) == (False, problem, where), report


@pytest.mark.parametrize("extension", ["", "CREATE EXTENSION amcheck"])
def test_fsck_finds_an_index_that_lost_an_entry(
    postgresql_server: Any, log_tools: SimpleNamespace, extension: str
) -> None:
    url = postgresql_server.new_database()
    with Ledger.create(url, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(300), run="r1")
    if extension:
        postgresql_server.execute(extension, url)
    assert fsck(url, columns_of=log_tools.columns_of).ok
    # the entries of 50 rows leave the index while the rows stay: what a torn page or a disk error does
    for statement in (
        (
            "UPDATE pg_index SET indisready = false, indislive = true, indisvalid = true"
            " WHERE indexrelid = 'ix_leaf_run'::regclass"
        ),
        "UPDATE leaf SET run = NULL WHERE idx < 50",
        "UPDATE leaf SET run = 'r1' WHERE idx < 50",
        "UPDATE pg_index SET indisready = true WHERE indexrelid = 'ix_leaf_run'::regclass",
    ):
        postgresql_server.execute(statement, url)
    report = fsck(url, columns_of=log_tools.columns_of)
    assert (report.ok, report.problem) == (False, "integrity"), report


def test_server_that_is_not_there_is_named(postgresql_server: Any) -> None:
    with pytest.raises(LedgerUnreachableError, match="cannot be reached"):
        Ledger.open("postgresql://nobody@127.0.0.1:1/none?connect_timeout=2")
    with pytest.raises(LedgerMissingError, match="does not exist"):
        Ledger.open(postgresql_server.url("nowhere"))
    with pytest.raises(LedgerMissingError, match="not an Affidavit log"):
        Ledger.open(postgresql_server.url("postgres"))
    report = fsck(postgresql_server.url("nowhere"), columns_of=lambda body: json.loads(body))
    assert (report.ok, report.problem) == (False, "unreadable")


def test_server_that_keeps_nothing_safe_is_refused() -> None:
    from audit._postgresql import prepare

    class Cursor:
        def __enter__(self) -> Cursor:
            return self

        def __exit__(self, *_: object) -> None: ...

        def execute(self, statement: str) -> None: ...

        def fetchall(self) -> list[tuple[str, str]]:
            return [("fsync", "off"), ("full_page_writes", "on"), ("synchronous_commit", "on")]

    session = SimpleNamespace(autocommit=False, closed=False, cursor=Cursor)
    with pytest.raises(LedgerUnsafeError, match="fsync=on"):
        prepare(session)


def test_session_waits_for_the_disk_whatever_the_database_prefers(
    postgresql_server: Any, log_tools: SimpleNamespace
) -> None:
    url = postgresql_server.new_database()
    Ledger.create(url, log_tools.ORIGIN).close()
    name = Location.parse(url).url.database  # type: ignore[union-attr]
    postgresql_server.execute(f"ALTER DATABASE {name} SET synchronous_commit = off")
    with Ledger.open(url) as ledger, ledger._engine.connect() as connection:
        assert connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on"
        assert connection.exec_driver_sql("SHOW statement_timeout").scalar() == "20s"


# places


@pytest.mark.parametrize(
    "place", ["mysql://a/b", "postgresql://host", "sqlite://", "sqlite:///x?mode=ro", "postgresql+pg8000://h/d",
              "nonsense://"]
)  # fmt: skip
def test_place_of_an_unknown_kind_is_refused(place: str) -> None:
    with pytest.raises(LocationError):
        Ledger.open(place)


def test_path_and_sqlite_url_name_the_same_log(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    Ledger.create(f"sqlite:///{tmp_path}/log.db", log_tools.ORIGIN).close()
    with Ledger.open(tmp_path / "log.db") as ledger:
        assert ledger.origin == log_tools.ORIGIN


def test_password_never_stands_in_the_home_nor_in_an_error(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("origin: a.example/log\ndatabase: postgresql://u:hunter2@db/log\n")
    with pytest.raises(LocationError, match="holds a password") as caught:
        log_location(tmp_path, {})
    assert "hunter2" not in str(caught.value)
    config.write_text("origin: a.example/log\ndatabase: postgresql://u@db/log\n")
    secret = tmp_path / "secret"
    secret.write_text("hunter2\n")
    found = log_location(tmp_path, {"AFFIDAVIT_DATABASE_PASSWORD_FILE": str(secret)})
    assert found.url is not None
    assert found.url.password == "hunter2"
    assert "hunter2" not in str(found)


def test_environment_goes_before_the_file_and_the_file_before_the_default(tmp_path: Path) -> None:
    assert log_location(tmp_path, {}).path == tmp_path / "log.db"
    (tmp_path / "config.yaml").write_text("database: other.db\n")
    assert log_location(tmp_path, {}).path == tmp_path / "other.db"
    assert log_location(tmp_path, {"AFFIDAVIT_DATABASE": "sqlite:////srv/a.db"}).path == Path("/srv/a.db")


@pytest.mark.parametrize("text", ["database: 7\n", "database: ''\n", "{", "database: [a]\n"])
def test_configuration_that_names_no_database_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(LocationError, match=r"config\.yaml"):
        log_location(tmp_path, {})


def test_secret_given_twice_or_from_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    for environ in (
        {"S": "a", "S_FILE": "b"},
        {"S_FILE": str(tmp_path / "missing")},
        {"S_FILE": str(tmp_path / "empty")},
    ):
        with pytest.raises(LocationError):
            read_secret("S", environ)
    assert read_secret("S", {}) is None

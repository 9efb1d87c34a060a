from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit import merkle
from audit.checkpoints import Checkpoint, cosign, sign_checkpoint
from audit.entries import LogCreated, columns_of, encode_entry, new_entry
from audit.errors import AuditError
from audit.fsck import FsckReport, fsck
from audit.keys import SigningKey
from audit.ledger import Ledger
from audit.notes import KeyType, NoteSigner

SIZE = 300


@pytest.fixture(scope="module")
def original(
    tmp_path_factory: pytest.TempPathFactory, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> Path:
    path = Path(tmp_path_factory.mktemp("fsck")) / "log.db"
    with Ledger.create(path, log_tools.ORIGIN) as ledger:
        log_tools.fill(ledger, range(SIZE - 10), run="run-1", round=3)
        site = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
        note = sign_checkpoint(Checkpoint(log_tools.ORIGIN, SIZE - 10, ledger.root_hash), log_signer)
        ledger.store_checkpoint(note + cosign(note, site, 100))
        log_tools.fill(ledger, range(SIZE - 10, SIZE))
    return path


def examine(path: Path, log_tools: SimpleNamespace) -> FsckReport:
    return fsck(path, columns_of=log_tools.columns_of, origin=log_tools.ORIGIN)


def answers(path: Path) -> object:
    """Everything a reader can ask of the log, or the error it gets."""
    try:
        with Ledger.open(path) as ledger:
            size = ledger.tree_size
            return (
                size,
                ledger.origin,
                ledger.root_hash,
                ledger.root_at(size),
                ledger.search(limit=1000),
                ledger.search(run="run-1", newest_first=True, limit=100),
                ledger.search(actor="tester", since="2026-01-01", after=200, limit=100),
                ledger.find_event(f"{SIZE // 2:032x}"),
                ledger.inclusion_proof(SIZE // 3, SIZE),
                ledger.consistency_proof(7, SIZE),
                ledger.checkpoints(),
                ledger.latest_checkpoint(),
                ledger.checkpoint_at(SIZE - 10),
            )
    except AuditError as error:
        return error.code


def test_honest_log_is_found_good(original: Path, log_tools: SimpleNamespace, log_signer: NoteSigner) -> None:
    assert examine(original, log_tools) == FsckReport(True, "", "", "", SIZE)
    assert fsck(original, columns_of=log_tools.columns_of, log=log_signer.verifier).ok


@pytest.mark.parametrize(
    ("statement", "problem", "where"),
    [
        ("UPDATE leaf SET body = replace(body, 'tester', 'taster') WHERE idx = 7", "leaf_hash", "leaf 7"),
        ("UPDATE leaf SET leaf_hash = zeroblob(32) WHERE idx = 7", "leaf_hash", "leaf 7"),
        ("UPDATE leaf SET leaf_hash = CAST(leaf_hash AS TEXT) WHERE idx = 7", "leaf_hash", "leaf 7"),
        ("UPDATE leaf SET body = CAST(body AS TEXT) WHERE idx = 7", "leaf_hash", "leaf 7"),
        ("UPDATE leaf SET actor = CAST(actor AS BLOB) WHERE idx = 7", "columns", "leaf 7.actor"),
        ("UPDATE leaf SET event_id = CAST(event_id AS BLOB) WHERE idx = 7", "event_id", "leaf 7"),
        ("UPDATE node SET hash = CAST(hash AS TEXT)", "node", "node 8/0"),
        ("UPDATE head SET edge = CAST(edge AS TEXT)", "head", "head"),
        ("UPDATE head SET origin = CAST(origin AS BLOB)", "head", "head"),
        ("UPDATE checkpoint SET note = CAST(note AS TEXT)", "checkpoint", "checkpoint 290"),
        ("UPDATE leaf SET event_id = 'x' WHERE idx = 7", "event_id", "leaf 7"),
        ("UPDATE leaf SET type = 'other' WHERE idx = 7", "columns", "leaf 7.type"),
        ("UPDATE leaf SET run = NULL WHERE idx = 7", "columns", "leaf 7.run"),
        ("UPDATE leaf SET site = 'a' WHERE idx = 7", "columns", "leaf 7.site"),
        ("UPDATE leaf SET round = 4 WHERE idx = 7", "columns", "leaf 7.round"),
        ("UPDATE leaf SET round = '3' || '' WHERE idx = 7", "", ""),  # the column's affinity restores the 3
        ("DELETE FROM leaf WHERE idx = 7", "leaf_order", "leaf 8"),
        (f"DELETE FROM leaf WHERE idx = {SIZE - 1}", "head", "head"),
        ("UPDATE leaf SET idx = 9000 WHERE idx = 7", "leaf_order", "leaf 8"),
        ("UPDATE head SET size = 299", "head", "head"),
        ("UPDATE head SET size = 'x'", "head", "head"),
        ("UPDATE head SET edge = zeroblob(128)", "head", "head"),
        ("UPDATE head SET origin = 'other'", "head", "head.origin"),
        ("UPDATE head SET id = 2", "head", "head"),
        ("DELETE FROM head", "head", "head"),
        ("UPDATE node SET hash = zeroblob(32)", "node", "node 8/0"),
        ("DELETE FROM node", "node", "node 8/0"),
        ("INSERT INTO node VALUES (8, 1, zeroblob(32))", "node", "node 8/1"),
        ("UPDATE checkpoint SET note = note || x'0a'", "checkpoint", "checkpoint 290"),
        ("UPDATE checkpoint SET tree_size = 289", "checkpoint", "checkpoint 289"),
        ("DROP INDEX ix_leaf_run", "schema", "ix_leaf_run"),
        ("CREATE TABLE more (x)", "schema", "more"),
        ("CREATE TRIGGER t AFTER INSERT ON leaf BEGIN DELETE FROM node; END", "schema", "t"),
        ("ALTER TABLE leaf ADD COLUMN more", "schema", "leaf"),
        ("PRAGMA application_id = 1", "schema", "file header"),
    ],
)
def test_edited_row_is_named(
    original: Path, tmp_path: Path, log_tools: SimpleNamespace, statement: str, problem: str, where: str
) -> None:
    path = tmp_path / "log.db"
    shutil.copy(original, path)
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()
    report = examine(path, log_tools)
    assert (report.ok, report.problem, report.where) == (not problem, problem, where)


def test_consistent_rewrite_of_a_signed_entry_contradicts_the_checkpoint(
    original: Path, tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    """The operator rewrites body, hash, node and head alike; the stored checkpoint still tells."""
    path = tmp_path / "log.db"
    shutil.copy(original, path)
    connection = sqlite3.connect(path)
    forged = log_tools.make_entry(7, "forged", run="run-1", round=3).body
    leaf = merkle.hash_leaf(forged)
    connection.execute("UPDATE leaf SET body = ?, leaf_hash = ? WHERE idx = 7", (forged, leaf))
    hashes = [row[0] for row in connection.execute("SELECT leaf_hash FROM leaf ORDER BY idx")]
    edge = merkle.CompactRange()
    for item in hashes:
        edge.append(item)
    connection.execute("UPDATE node SET hash = ?", (merkle.root_of(hashes[:256]),))
    connection.execute("UPDATE head SET edge = ?", (b"".join(edge.hashes),))
    connection.commit()
    connection.close()
    assert answers(path) != answers(original)
    report = examine(path, log_tools)
    assert (report.problem, report.where) == ("checkpoint", "checkpoint 290")


def test_checkpoint_by_another_key_is_named(original: Path, log_tools: SimpleNamespace) -> None:
    thief = NoteSigner(log_tools.ORIGIN, SigningKey.generate())
    report = fsck(original, columns_of=log_tools.columns_of, log=thief.verifier)
    assert (report.ok, report.problem) == (False, "checkpoint")


def test_missing_or_foreign_file_is_reported_not_raised(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    assert examine(tmp_path / "none.db", log_tools).problem == "unreadable"
    (tmp_path / "text.db").write_bytes(b"hello " * 1000)
    assert examine(tmp_path / "text.db", log_tools).problem == "unreadable"
    (tmp_path / "empty.db").write_bytes(b"")
    assert examine(tmp_path / "empty.db", log_tools).problem == "schema"


def test_body_that_is_no_entry_is_named(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    made = log_tools.make_entry(1)
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        ledger.append_wait(b'{"a":1,"a":2}', event_id="e", index_columns=made.columns)
    report = examine(tmp_path / "log.db", log_tools)
    assert (report.problem, report.where) == ("columns", "leaf 0")


def test_columns_of_real_entries_are_derived_again(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    created = LogCreated(origin=log_tools.ORIGIN, log_key="ed25519:" + "A" * 43 + "=")
    entry = new_entry(created, actor="coordinator", time=log_tools.TIME)
    body = encode_entry(entry)
    path = tmp_path / "log.db"
    with Ledger.create(path, log_tools.ORIGIN) as ledger:
        ledger.append_wait(body, event_id=entry.event_id, index_columns=columns_of(body))
    assert fsck(path, columns_of=columns_of, origin=log_tools.ORIGIN).ok
    connection = sqlite3.connect(path)
    connection.execute("UPDATE leaf SET actor = 'somebody'")
    connection.commit()
    connection.close()
    assert fsck(path, columns_of=columns_of).where == "leaf 0.actor"


def test_examination_changes_nothing(original: Path, log_tools: SimpleNamespace) -> None:
    before = original.read_bytes()
    examine(original, log_tools)
    assert original.read_bytes() == before

"""A log of the first release opens after `db upgrade`, and what was proved from it stays proved."""

from __future__ import annotations

import hashlib
import sqlite3
from pathlib import Path
from types import SimpleNamespace

import pytest
from sqlalchemy import insert
from sqlalchemy.schema import CreateIndex, CreateTable

from audit import _store, merkle
from audit.checkpoints import Checkpoint, sign_checkpoint
from audit.errors import LedgerMissingError, LedgerSchemaError
from audit.fsck import fsck
from audit.ledger import Ledger
from audit.location import Location
from audit.notes import NoteSigner
from audit.tables import (
    APPLICATION_ID,
    CHECKPOINT,
    HEAD,
    LEAF,
    LEASE,
    MIGRATION,
    NODE,
    SCHEMA_VERSION,
    schema,
)
from audit.tlog_proof import TlogProof
from audit.upgrade import migrate, upgrade

Place = Path | str


def first_release(place: Place, tools: SimpleNamespace, signer: NoteSigner, *, recorded: bool) -> bytes:
    """Write a log of 300 entries through the first migration alone; return a proof that it gave."""
    location = Location.parse(place)
    if location.path is not None:
        with sqlite3.connect(location.path) as raw:
            raw.execute(f"PRAGMA application_id={APPLICATION_ID}")
            raw.execute("PRAGMA journal_mode=WAL")
        raw.close()
    engine = _store.open_engine(location)
    options = {_store._WRITE: True}
    edge, nodes, leaves = merkle.CompactRange(), [], []

    def keep(level: int, index: int, node: bytes) -> None:
        if level == 8:
            nodes.append({"level": level, "idx": index, "hash": node})

    for number in range(300):
        made = tools.make_entry(number)
        leaf_hash = merkle.hash_leaf(made.body)
        edge.append(leaf_hash, keep)
        leaves.append(
            {"idx": number, "event_id": made.event_id, "leaf_hash": leaf_hash, "body": made.body,
             "type": made.columns.type, "actor": made.columns.actor, "time": made.columns.time}
        )  # fmt: skip
    note = sign_checkpoint(Checkpoint(tools.ORIGIN, 300, edge.root()), signer)
    head = {"id": 1, "schema_version": 1, "origin": tools.ORIGIN, "size": 300, "edge": b"".join(edge.hashes)}
    with engine.connect().execution_options(**options) as connection, connection.begin():
        migrate(connection, "0001")
        connection.execute(insert(LEAF), leaves)
        connection.execute(insert(NODE), nodes)
        connection.execute(insert(HEAD), head)
        connection.execute(
            insert(CHECKPOINT),
            {"tree_size": 300, "note": note, "note_hash": hashlib.sha256(note).digest()},
        )
        if not recorded:
            MIGRATION.drop(connection)
    engine.dispose()
    hashes = [leaf["leaf_hash"] for leaf in leaves]
    path = tuple(merkle.inclusion_proof(merkle.source_of(hashes), 17, 300))
    return TlogProof(leaf_index=17, hashes=path, checkpoint_note=note).format()


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "unrecorded"])
def test_first_release_opens_after_the_upgrade_and_its_proofs_verify(
    place: Place, log_tools: SimpleNamespace, log_signer: NoteSigner, recorded: bool
) -> None:
    old = TlogProof.parse(first_release(place, log_tools, log_signer, recorded=recorded))
    with pytest.raises(LedgerSchemaError, match="db upgrade"):
        Ledger.open(place)
    report = upgrade(place)
    assert (report.before, report.after) == (1, SCHEMA_VERSION)
    assert upgrade(place).before == SCHEMA_VERSION
    examined = fsck(place, columns_of=log_tools.columns_of, log=log_signer.verifier)
    assert (examined.ok, examined.entries) == (True, 300), examined
    with Ledger.open(place) as ledger:
        assert ledger.latest_checkpoint() == old.checkpoint_note
        assert ledger.inclusion_proof(17, 300) == list(old.hashes)
        log_tools.fill(ledger, range(300, 310))
        merkle.verify_inclusion(
            leaf_index=17,
            tree_size=300,
            leaf_hash=merkle.hash_leaf(log_tools.make_entry(17).body),
            proof=old.hashes,
            root_hash=ledger.root_at(300),
        )
        merkle.verify_consistency(
            size1=300,
            size2=310,
            root1=ledger.root_at(300),
            root2=ledger.root_hash,
            proof=ledger.consistency_proof(300, 310),
        )
        assert ledger.lease("signer", "me", ttl_s=1).acquire()


def test_migrated_sqlite_schema_is_the_created_one_but_for_white_space(
    tmp_path: Path, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> None:
    first_release(tmp_path / "old.db", log_tools, log_signer, recorded=False)
    upgrade(tmp_path / "old.db")
    Ledger.create(tmp_path / "new.db", log_tools.ORIGIN).close()
    schemas = []
    for name in ("old.db", "new.db"):
        connection = sqlite3.connect(tmp_path / name)
        rows = connection.execute("SELECT name, sql FROM sqlite_master").fetchall()
        schemas.append(sorted((name, (sql or "").split()) for name, sql in rows))
        connection.close()
    assert schemas[0] == schemas[1]


def test_every_table_of_the_schema_is_made_by_a_migration() -> None:
    assert set(schema().tables) == {table.name for table in (LEAF, NODE, HEAD, CHECKPOINT, LEASE, MIGRATION)}
    texts = [str(CreateTable(table)) for table in schema().tables.values()]
    texts += [str(CreateIndex(index)) for index in LEAF.indexes]
    assert len(texts) == 15


def test_examination_accepts_a_file_of_the_first_release_as_it_is(
    tmp_path: Path, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> None:
    first_release(tmp_path / "old.db", log_tools, log_signer, recorded=False)
    report = fsck(tmp_path / "old.db", columns_of=log_tools.columns_of)
    assert (report.ok, report.entries) == (True, 300), report


@pytest.mark.parametrize("revision", ["0002", "0003"])
def test_logs_of_releases_between_are_examined_as_they_are_and_upgraded(
    place: Place, log_tools: SimpleNamespace, log_signer: NoteSigner, revision: str
) -> None:
    first_release(place, log_tools, log_signer, recorded=True)
    engine = _store.open_engine(Location.parse(place))
    with _store.writing(engine) as connection:
        migrate(connection, revision)
    engine.dispose()
    if isinstance(place, Path):  # the examination of a server's log wants the present schema
        assert fsck(place, columns_of=log_tools.columns_of).ok
    assert (upgrade(place).before, upgrade(place).before) == (int(revision), SCHEMA_VERSION)
    assert fsck(place, columns_of=log_tools.columns_of).ok


def test_an_index_that_leaves_entries_out_is_found(place: Place, log_tools: SimpleNamespace) -> None:
    Ledger.create(place, log_tools.ORIGIN).close()
    engine = _store.open_engine(Location.parse(place))
    with engine.connect() as connection, connection.begin():
        connection.exec_driver_sql("DROP INDEX ix_leaf_run")
        connection.exec_driver_sql("CREATE INDEX ix_leaf_run ON leaf (run) WHERE run > 'm'")
    engine.dispose()
    report = fsck(place, columns_of=log_tools.columns_of)
    assert (report.ok, report.problem) == (False, "schema")


def test_failed_migration_leaves_the_old_schema(
    place: Place, log_tools: SimpleNamespace, log_signer: NoteSigner
) -> None:
    first_release(place, log_tools, log_signer, recorded=False)
    engine = _store.open_engine(Location.parse(place))
    with engine.begin() as connection:  # what the migration wants to make is in its way
        LEASE.create(connection)
    with pytest.raises(Exception, match="lease"):
        upgrade(place)
    with engine.begin() as connection:
        LEASE.drop(connection)
    engine.dispose()
    assert upgrade(place).after == SCHEMA_VERSION


def test_upgrade_of_nothing_and_of_the_future_is_refused(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    with pytest.raises(LedgerMissingError):
        upgrade(tmp_path / "none.db")
    with sqlite3.connect(tmp_path / "foreign.db") as raw:
        raw.execute("CREATE TABLE head (id int)")
    raw.close()
    with pytest.raises(LedgerMissingError):
        upgrade(tmp_path / "foreign.db")
    Ledger.create(tmp_path / "log.db", log_tools.ORIGIN).close()
    with sqlite3.connect(tmp_path / "log.db") as raw:
        raw.execute(f"UPDATE head SET schema_version = {SCHEMA_VERSION + 1}")
    raw.close()
    with pytest.raises(LedgerSchemaError, match="newer release"):
        upgrade(tmp_path / "log.db")

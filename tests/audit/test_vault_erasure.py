"""An erasure takes everything of a person, wholly or not at all, and no scan finds a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from audit import _store
from audit._vault_store import VaultMissingError
from audit.fsck import fsck
from audit.vault import Vault
from audit.vault_key import MasterKey, SealBrokenError
from audit.vault_records import (
    RecordMissingError,
    SubjectUnknownError,
    VaultRequestError,
)
from audit.vault_tables import RECORD, SUBJECT
from tests.audit.vaults import ORIGIN, PLAIN, TIME, again, erase, event, put, scan, traces
from tests.soak_report import Report

# erasure


def test_erased_person_is_gone_and_others_stay(vault: Vault) -> None:
    first = put(vault, "MRN-1", 1)
    put(vault, "MRN-1", 2)
    put(vault, "MRN-2", 3)
    erasure = erase(vault, "MRN-1")
    assert (erasure.pseudonym, erasure.records) == (first.pseudonym, 2)
    with pytest.raises(SubjectUnknownError):
        vault.pseudonym("MRN-1")
    with pytest.raises(SubjectUnknownError):
        vault.identify(first.pseudonym)
    with pytest.raises(RecordMissingError):
        vault.parts(event(1), type="prediction")
    assert vault.records(first.pseudonym) == []
    assert vault.parts(event(3), type="prediction")
    assert put(vault, "MRN-1", 4).pseudonym != first.pseudonym, "who comes back is somebody new"


def test_same_request_is_the_same_erasure_and_another_finds_nobody(vault: Vault) -> None:
    put(vault, "MRN-1", 1)
    put(vault, "MRN-2", 2)
    done = erase(vault, "MRN-1", "case-7")
    assert erase(vault, "MRN-1", "case-7") == done
    with pytest.raises(SubjectUnknownError) as erased:
        erase(vault, "MRN-1", "case-8")
    with pytest.raises(SubjectUnknownError) as unknown:
        erase(vault, "MRN-9", "case-9")
    assert str(erased.value) == str(unknown.value), "nobody can tell the one from the other"
    with pytest.raises(VaultRequestError, match="another person"):
        erase(vault, "MRN-2", "case-7")
    assert vault.pseudonym("MRN-2")


@pytest.mark.parametrize("request_id", ["", "-x", "a" * 65, "John Smith", "ü"])
def test_request_id_that_could_be_a_name_is_refused(on_file: Vault, request_id: str) -> None:
    put(on_file, "MRN-1", 1)
    with pytest.raises(VaultRequestError):
        erase(on_file, "MRN-1", request_id)
    assert on_file.pseudonym("MRN-1")


def test_of_two_concurrent_erasures_one_erases_and_one_finds_nobody(vault: Vault, tmp_path: Path) -> None:
    put(vault, "MRN-1", 1)
    other, outcomes = again(vault, tmp_path), []

    def work(which: Vault, request_id: str) -> None:
        try:
            outcomes.append(erase(which, "MRN-1", request_id).records)
        except SubjectUnknownError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=work, args=pair) for pair in ((vault, "a"), (other, "b"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert sorted(map(str, outcomes)) == ["1", "vault.subject_unknown"]
    assert len(vault.pending()) == 1


def test_erasing_while_sealing_leaves_nothing_of_who_was_erased(vault: Vault, tmp_path: Path) -> None:
    other, stop, erased, count = again(vault, tmp_path), threading.Event(), [], [0]
    put(vault, "MRN-1", 0)

    def work() -> None:
        while not stop.is_set():
            count[0] += 1
            put(other, "MRN-1", count[0])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for number in range(5):
            before = count[0]
            while count[0] < before + 3:
                stop.wait(0.002)
            erased.append(erase(vault, "MRN-1", f"r{number}"))
    finally:
        stop.set()
        thread.join()
    other.close()
    with _store.reading(vault._engine) as connection:
        here = {row.pseudonym for row in connection.execute(select(RECORD.c.pseudonym))}
        people = {row.pseudonym for row in connection.execute(select(SUBJECT.c.pseudonym))}
    assert not here & {erasure.pseudonym for erasure in erased}
    assert here <= people, "no record without a person"
    kept = len(vault.records(vault.pseudonym("MRN-1"))) if people else 0
    assert sum(erasure.records for erasure in erased) + kept == count[0] + 1


@pytest.mark.reported
def test_raw_scan_finds_nothing_of_the_erased(on_file: Vault, tmp_path: Path, report: Report) -> None:
    for number in range(400):  # enough for pages to fill, split and be joined again
        put(
            on_file,
            f"person-number-{number % 40}",
            number,
            note=f"{PLAIN}-{number}-" + "x" * (number * 7 % 900),
        )
    names = [f"person-number-{number}" for number in range(0, 40, 2)]
    before = traces(on_file, [*names, "person-number-1"])
    for number, name in enumerate(names):
        erase(on_file, name, f"r{number}")
    assert on_file.scrub()
    files = list(tmp_path.glob("vault.db*"))
    assert {"vault.db", "vault.db-wal", "vault.db-shm"} <= {path.name for path in files}
    assert scan(files, [trace for name in names for trace in before[name]]) == []
    living = [trace for trace in before["person-number-1"] if scan(files, [trace])]
    assert before["person-number-1"][5] in living, "the scan does find what is still there"
    assert not [path for path in files if PLAIN.encode() in path.read_bytes()], "never in the clear"
    assert all(not erasure.leaf_index for erasure in on_file.pending())
    sought = sum(len(before[name]) for name in names)
    report(
        "erasure",
        size=f"{len(names)} of 40 people erased; {sought:,} keys, salts, ciphertexts and values sought",
        result="0 found in the database and its logs; those of who stayed are found",
    )


def test_scrub_says_when_a_reader_stands_in_its_way(on_file: Vault, tmp_path: Path) -> None:
    put(on_file, "MRN-1", 1)
    reader = _store.connect(tmp_path / "vault.db")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM vault_record").fetchall()
    erase(on_file, "MRN-1")
    busy = on_file.scrub(patience_s=0.2)
    assert not busy
    assert not busy.rewritten
    assert "vault scrub" in busy.left
    assert [erasure.scrubbed for erasure in on_file.pending()] == [False]
    reader.close()
    assert on_file.scrub()
    assert [erasure.scrubbed for erasure in on_file.pending()] == [True]


KILLED = """
import os, signal, sys
from pathlib import Path
from audit.vault import Vault
folder = Path(sys.argv[1])
vault = Vault.open(folder / "vault.db", folder / "vault.key", "hospital.example/log")
def leaf(pseudonym, records):
    if sys.argv[2] == "inside":
        os.kill(os.getpid(), signal.SIGKILL)
    return "e" * 32, b"the leaf"
vault.erase("MRN-1", request_id="r1", leaf=leaf)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("moment", "is_erased"), [("inside", False), ("after", True)])
def test_killed_erasure_happened_wholly_or_not_at_all(
    tmp_path: Path, repository: Path, moment: str, is_erased: bool
) -> None:
    with Vault.create(tmp_path / "vault.db", tmp_path / "vault.key", ORIGIN) as vault:
        put(vault, "MRN-1", 1)
        keys = traces(vault, ["MRN-1"])["MRN-1"]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), moment],
        cwd=repository, check=False, timeout=60, env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL
    with Vault.open(tmp_path / "vault.db", tmp_path / "vault.key", ORIGIN) as vault:
        waiting = vault.pending()
        if not is_erased:
            assert waiting == []
            assert vault.parts(event(1), type="prediction")
            return
        assert [(erasure.entry, erasure.leaf_index) for erasure in waiting] == [(b"the leaf", None)]
        with pytest.raises(SubjectUnknownError):
            vault.pseudonym("MRN-1")
        assert vault.scrub()
        assert scan(list(tmp_path.glob("vault.db*")), keys) == []
        vault.settle("r1", 17)
        assert vault.pending() == []


def test_sweep_deletes_only_old_records_without_an_entry(vault: Vault) -> None:
    for number in range(3):
        put(vault, "MRN-1", number)
    asked: list[int] = []

    def logged(event_ids: Sequence[str]) -> set[str]:
        asked.append(len(event_ids))
        return {event(1)} & set(event_ids)

    assert vault.sweep(logged, before=TIME) == 0
    assert vault.sweep(logged, before="2026-11-23T23:00:00Z") == 2
    assert [record.event_id for record in vault.records(vault.pseudonym("MRN-1"))] == [event(1)]
    put(vault, "MRN-1", 7)
    assert vault.sweep(logged, before="2026-11-23T23:00:00Z") == 1
    assert vault.sweep(logged, before="2026-11-23T23:00:00Z") == 0
    assert asked == [3, 2, 1], "what was found is not looked up again, but for the last second"


def test_vault_beside_a_log_in_one_database_disturbs_neither(
    postgresql_server: Any, tmp_path: Path, log_tools: Any
) -> None:
    from audit.ledger import Ledger

    url = postgresql_server.new_schema()
    with (
        Ledger.create(url, ORIGIN) as ledger,
        Vault.create(url, tmp_path / "vault.key", ORIGIN) as vault,
    ):
        log_tools.fill(ledger, range(3))
        put(vault, "MRN-1", 1)
        erase(vault, "MRN-1")
        assert vault.scrub()
        assert fsck(url, columns_of=log_tools.columns_of).ok
        with pytest.raises(VaultMissingError, match="already"):
            Vault.create(url, tmp_path / "vault.key", ORIGIN)


@pytest.mark.reported
@pytest.mark.slow  # hundreds of needles sought in every file of a database server
def test_raw_scan_of_a_postgresql_data_directory_finds_nothing_of_the_erased(
    postgresql_server: Any, tmp_path: Path, report: Report
) -> None:
    server = postgresql_server
    data = server.folder / "data"
    url = server.new_schema()
    with Vault.create(url, tmp_path / "vault.key", ORIGIN) as vault:
        for number in range(60):
            put(vault, f"person-number-{number % 6}", number)
        server.execute("SELECT pg_switch_wal()")
        server.execute("CHECKPOINT")  # so that the rows lie in a segment that waits to be reused, too
        for number in range(60, 120):
            put(vault, f"person-number-{number % 6}", number)
        server.execute("ANALYZE", url)  # as the server itself does now and then
        names = [f"person-number-{number}" for number in range(3)]
        before = traces(vault, [*names, "person-number-5"])
        gone = [trace for name in names for trace in before[name]]
        wal = data / "pg_wal"
        assert scan(files_in(wal), gone[2:3]), "the write-ahead log does keep the wrapped keys until then"
        for number, name in enumerate(names):
            erase(vault, name, f"r{number}")
        assert vault.scrub()
        assert scan(files_in(data), gone) == []
        assert scan(files_in(data), before["person-number-5"][5:6]), "the scan does find what is still there"
    report(
        "erasure",
        size=f"3 of 6 people erased on PostgreSQL; {len(gone):,} keys, salts, ciphertexts and values sought",
        result="0 found in the server's whole data directory, pg_wal among it; those of who stayed are found",
    )


@pytest.mark.parametrize("cut", [1, 29, 30, 31, 59])
def test_raw_scan_finds_what_the_end_of_a_page_cuts_in_two(tmp_path: Path, cut: int) -> None:
    needle, other = os.urandom(60), os.urandom(60)
    file = tmp_path / "segment"
    file.write_bytes(bytes(8192 - cut) + needle[:cut] + b"the next page's header" + needle[cut:])
    assert scan([file], [needle, other]) == [("segment", needle)]


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_statistics_of_an_older_vault_are_forgotten_by_whoever_may(
    postgresql_server: Any, tmp_path: Path
) -> None:
    server = postgresql_server
    url = server.new_schema()
    schema = url.rpartition("%3D")[2]
    server.execute("CREATE ROLE keeper LOGIN")
    server.execute(f'GRANT ALL ON SCHEMA "{schema}" TO keeper')
    server.execute("GRANT pg_checkpoint TO keeper")
    server.execute("GRANT EXECUTE ON FUNCTION pg_switch_wal(), pg_ls_waldir() TO keeper")
    with Vault.create(url.replace("//affidavit@", "//keeper@"), tmp_path / "vault.key", ORIGIN) as vault:
        for column in ("wrapped_key", "lookup", "sealed_id"):  # as before columns had no statistics
            server.execute(f"ALTER TABLE vault_subject ALTER COLUMN {column} SET STATISTICS -1", url)
        for number in range(30):
            put(vault, f"person-{number % 10}", number)
        server.execute("ANALYZE", url)
        wrapped = traces(vault, ["person-1"])["person-1"][2]
        erase(vault, "person-1")
        refused = vault.scrub()
        assert not refused
        assert "database's owner" in refused.left
        assert scan(files_in(server.folder / "data"), [wrapped]), "as it says"
        with Vault.open(url, tmp_path / "vault.key", ORIGIN) as owners:
            assert owners.scrub()
        assert scan(files_in(server.folder / "data"), [wrapped]) == []
        server.execute("ANALYZE", url)
        kept = server.execute("SELECT tablename FROM pg_stats WHERE schemaname = current_schema()", url)
        assert {name for (name,) in kept} <= {"vault_migration"}


def test_scrub_says_what_a_replication_slot_keeps(postgresql_server: Any, tmp_path: Path) -> None:
    server = postgresql_server
    server.execute("SELECT pg_create_physical_replication_slot('standby', true)")
    try:
        with Vault.create(server.new_schema(), tmp_path / "vault.key", ORIGIN) as vault:
            put(vault, "MRN-1", 1)
            wrapped = traces(vault, ["MRN-1"])["MRN-1"][2]
            erase(vault, "MRN-1")
            held = vault.scrub()
            assert held.rewritten
            assert not held
            assert "replication slot" in held.left
            assert "vault scrub" in held.left
            assert scan(files_in(server.folder / "data" / "pg_wal"), [wrapped]), "as it says"
            assert not vault.pending()[0].scrubbed
            vault.settle("r1", 17)
            assert vault.pending() == [], "no start or command rewrites the tables over and over"
            server.execute("SELECT pg_drop_replication_slot('standby')")
            assert vault.scrub()
            assert scan(files_in(server.folder / "data"), [wrapped]) == []
    finally:
        server.execute(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'standby'"
        )


def test_scrub_by_a_role_without_the_rights_names_the_grants(postgresql_server: Any, tmp_path: Path) -> None:
    server = postgresql_server
    url = server.new_schema()
    schema = url.rpartition("%3D")[2]
    server.execute("CREATE ROLE clerk LOGIN")
    server.execute(f'GRANT ALL ON SCHEMA "{schema}" TO clerk')
    with Vault.create(url.replace("//affidavit@", "//clerk@"), tmp_path / "vault.key", ORIGIN) as vault:
        put(vault, "MRN-1", 1)
        wrapped = traces(vault, ["MRN-1"])["MRN-1"][2]
        erase(vault, "MRN-1")
        refused = vault.scrub()
        assert refused.rewritten
        assert not refused
        for grant in ("pg_checkpoint TO clerk", "pg_switch_wal(), pg_ls_waldir() TO clerk"):
            assert grant in refused.left
        server.execute("GRANT pg_checkpoint TO clerk")
        server.execute("GRANT EXECUTE ON FUNCTION pg_switch_wal(), pg_ls_waldir() TO clerk")
        assert vault.scrub()
        assert vault.pending()[0].scrubbed
        assert scan(files_in(server.folder / "data"), [wrapped]) == []


def test_rotated_master_key_closes_what_an_archive_keeps(postgresql_server: Any, tmp_path: Path) -> None:
    with Vault.create(postgresql_server.new_schema(), tmp_path / "vault.key", ORIGIN) as vault:
        put(vault, "MRN-1", 1)
        wrapped = traces(vault, ["MRN-1"])["MRN-1"][2]
        place = vault._places.key(vault.pseudonym("MRN-1"))
        erase(vault, "MRN-1")
        old = MasterKey.load(tmp_path / "vault.key", None)
        vault.rotate_key()
        new = MasterKey.load(tmp_path / "vault.key", None)
    assert old.unwrap(wrapped, place)
    with pytest.raises(SealBrokenError):
        new.unwrap(wrapped, place)

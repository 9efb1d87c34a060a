"""The vault keeps what a person's entries stand for, and forgets it so that no scan finds a trace."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from audit import _store, _vault_store
from audit._vault_store import VaultMissingError
from audit.disclosure import new_part
from audit.errors import EventIdConflictError, LocationError
from audit.fsck import fsck
from audit.location import Location, vault_location
from audit.vault import Vault
from audit.vault_key import MasterKey, SealBrokenError, VaultKeyError
from audit.vault_records import (
    PERSON,
    READER,
    RecordMissingError,
    Sealed,
    SealRequest,
    SubjectUnknownError,
    VaultRequestError,
)
from audit.vault_tables import RECORD, SUBJECT, VAULT_HEAD, VaultTable

ORIGIN = "hospital.example/log"
TIME = "2026-11-23T22:23:12Z"
PLAIN = "plaintext-of-a-row"
Make = Callable[..., Vault]


def event(number: int) -> str:
    return f"{number:032x}"


def put(vault: Vault, name: str, number: int, kind: str = PERSON, **values: str) -> Sealed:
    parts = {"row.0.input": new_part({"age": "51", "note": PLAIN, **values})}
    request = SealRequest(
        kind=kind, name=name, event_id=event(number), type="prediction", time=TIME, parts=parts
    )
    return vault.seal(request).result(20)


def leaf(pseudonym: str, records: int) -> tuple[str, bytes]:
    return "e" + pseudonym[1:], f"{pseudonym} {records}".encode()


def erase(vault: Vault, name: str, request_id: str = "r1") -> Any:
    return vault.erase(name, request_id=request_id, leaf=leaf)


@pytest.fixture
def vault(place: Path | str, tmp_path: Path) -> Iterator[Vault]:
    where = place.with_name("vault.db") if isinstance(place, Path) else place
    with Vault.create(where, tmp_path / "vault.key", ORIGIN) as made:
        yield made


@pytest.fixture
def on_file(tmp_path: Path) -> Iterator[Vault]:
    with Vault.create(tmp_path / "vault.db", tmp_path / "vault.key", ORIGIN) as made:
        yield made


def again(vault: Vault, tmp_path: Path) -> Vault:
    return Vault.open(vault.location, tmp_path / "vault.key", ORIGIN)


# sealing and opening


def test_what_was_sealed_opens_again_for_its_entry(vault: Vault, tmp_path: Path) -> None:
    sealed = put(vault, "MRN-1", 1)
    for opened in (vault, again(vault, tmp_path)):
        parts = opened.parts(event(1), type="prediction", pseudonym=sealed.pseudonym)
        assert parts["row.0.input"].values == {"age": "51", "note": PLAIN}
        assert opened.identify(sealed.pseudonym) == (PERSON, "MRN-1")
    opened.close()
    record = vault.record(event(1))
    assert record is not None
    assert sealed.digest == hashlib.sha256(record.ciphertext).hexdigest()


def test_one_person_has_one_pseudonym_and_another_person_another(vault: Vault) -> None:
    first, second, other = put(vault, "MRN-1", 1), put(vault, "MRN-1", 2), put(vault, "MRN-2", 3)
    assert first.pseudonym == second.pseudonym != other.pseudonym
    assert first.digest != second.digest, "equal values, unlike ciphertexts"
    assert put(vault, "MRN-1", 4, READER).pseudonym not in (first.pseudonym, other.pseudonym)
    assert vault.pseudonym("MRN-1") == first.pseudonym
    assert [record.event_id for record in vault.records(first.pseudonym)] == [event(1), event(2)]


def test_one_event_is_sealed_once(vault: Vault) -> None:
    put(vault, "MRN-1", 1)
    with pytest.raises(EventIdConflictError):
        put(vault, "MRN-1", 1)
    with pytest.raises(EventIdConflictError):
        put(vault, "MRN-2", 1)
    with pytest.raises(SubjectUnknownError):
        vault.pseudonym("MRN-3")


@pytest.mark.parametrize("name", ["", "a" * 513, "nul\0", "\ud800"])
def test_id_that_is_no_text_is_refused_before_anything_is_written(on_file: Vault, name: str) -> None:
    with pytest.raises(VaultRequestError):
        put(on_file, name, 1)
    with pytest.raises(VaultRequestError):
        on_file.pseudonym(name)
    assert on_file.record(event(1)) is None


def test_two_processes_give_one_person_one_pseudonym(vault: Vault, tmp_path: Path) -> None:
    other = again(vault, tmp_path)
    seen: list[Sealed] = []

    def work(which: Vault, start: int) -> None:
        seen.extend(put(which, f"MRN-{number % 5}", start + number) for number in range(20))

    threads = [threading.Thread(target=work, args=pair) for pair in ((vault, 100), (other, 200))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert len(seen) == 40
    assert len({sealed.pseudonym for sealed in seen}) == 5


# hostile hands in the database


def damage(vault: Vault, table: Any, where: Any, **values: Any) -> None:
    with _vault_store.writing(vault._engine) as (connection, _):
        changed = connection.execute(update(table).where(where).values(**values))
        assert changed.rowcount == 1


def test_ciphertext_moved_to_another_event_is_refused(vault: Vault) -> None:
    put(vault, "MRN-1", 1)
    first = vault.record(event(1))
    put(vault, "MRN-1", 2)
    damage(vault, RECORD, RECORD.c.event_id == event(2), ciphertext=first.ciphertext)
    with pytest.raises(SealBrokenError):
        vault.parts(event(2), type="prediction")


def test_ciphertext_moved_to_another_person_is_refused(vault: Vault) -> None:
    first, second = put(vault, "MRN-1", 1), put(vault, "MRN-2", 2)
    damage(vault, RECORD, RECORD.c.event_id == event(1), pseudonym=second.pseudonym)
    for pseudonym in (first.pseudonym, second.pseudonym, None):
        with pytest.raises(SealBrokenError):
            vault.parts(event(1), type="prediction", pseudonym=pseudonym)


def test_key_moved_to_another_person_is_refused(vault: Vault) -> None:
    put(vault, "MRN-1", 1)
    second = put(vault, "MRN-2", 2)
    with _store.reading(vault._engine) as connection:
        query = select(SUBJECT.c.wrapped_key).where(SUBJECT.c.pseudonym == second.pseudonym)
        stolen = connection.execute(query).scalar_one()
    damage(vault, SUBJECT, SUBJECT.c.pseudonym != second.pseudonym, wrapped_key=stolen)
    with pytest.raises(SealBrokenError):
        vault.parts(event(1), type="prediction")


def test_ciphertext_of_another_type_is_refused(on_file: Vault) -> None:
    put(on_file, "MRN-1", 1)
    with pytest.raises(SealBrokenError):
        on_file.parts(event(1), type="audit.read")


@pytest.mark.parametrize("length", [0, 1, 11, 12, 27, 28, -1])
def test_truncated_ciphertext_is_refused(on_file: Vault, length: int) -> None:
    put(on_file, "MRN-1", 1)
    whole = on_file.record(event(1)).ciphertext
    damage(on_file, RECORD, RECORD.c.event_id == event(1), ciphertext=whole[:length])
    with pytest.raises(SealBrokenError):
        on_file.parts(event(1), type="prediction")


def test_every_flipped_bit_of_a_ciphertext_is_refused(on_file: Vault) -> None:
    put(on_file, "MRN-1", 1)
    whole = on_file.record(event(1)).ciphertext
    for position in range(0, len(whole), 7):
        bent = bytearray(whole)
        bent[position] ^= 1 << (position % 8)
        damage(on_file, RECORD, RECORD.c.event_id == event(1), ciphertext=bytes(bent))
        with pytest.raises(SealBrokenError):
            on_file.parts(event(1), type="prediction")


# the master key


def test_wrong_master_key_is_refused(on_file: Vault, tmp_path: Path) -> None:
    put(on_file, "MRN-1", 1)
    MasterKey.new().save(tmp_path / "other.key", None)
    with pytest.raises(VaultKeyError, match="not the key of"):
        Vault.open(on_file.location, tmp_path / "other.key", ORIGIN)
    with pytest.raises(VaultKeyError, match="cannot be read"):
        Vault.open(on_file.location, tmp_path / "none.key", ORIGIN)


def test_key_file_that_others_may_read_or_that_is_damaged_is_refused(on_file: Vault, tmp_path: Path) -> None:
    path = tmp_path / "vault.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    with pytest.raises(VaultKeyError, match="chmod"):
        again(on_file, tmp_path)
    path.chmod(0o600)
    good = path.read_bytes()
    for bad in (b"", b"{}", good[:-3], good.replace(b"none", b"nine"), good.replace(b"/1", b"/2")):
        path.write_bytes(bad)
        with pytest.raises(VaultKeyError):
            again(on_file, tmp_path)


def test_passphrase_guards_the_key_file(tmp_path: Path) -> None:
    key, place = tmp_path / "k", tmp_path / "vault.db"
    with Vault.create(place, key, ORIGIN, b"correct horse") as vault:
        put(vault, "MRN-1", 1)
    Vault.open(place, key, ORIGIN, b"correct horse").close()
    with pytest.raises(VaultKeyError, match="passphrase"):
        Vault.open(place, key, ORIGIN, b"wrong")
    with pytest.raises(VaultKeyError, match="AFFIDAVIT_VAULT_PASSPHRASE"):
        Vault.open(place, key, ORIGIN)


def test_vault_of_another_log_and_no_vault_at_all_are_refused(on_file: Vault, tmp_path: Path) -> None:
    with pytest.raises(VaultMissingError, match="vault of"):
        Vault.open(on_file.location, tmp_path / "vault.key", "other.example/log")
    with pytest.raises(VaultMissingError, match="no vault"):
        Vault.open(tmp_path / "none.db", tmp_path / "vault.key", ORIGIN)
    (tmp_path / "foreign.db").write_bytes(b"")
    with pytest.raises(VaultMissingError, match="no vault"):
        Vault.open(tmp_path / "foreign.db", tmp_path / "vault.key", ORIGIN)
    with pytest.raises(VaultMissingError, match="already"):
        Vault.create(on_file.location, tmp_path / "vault.key", ORIGIN)
    assert put(on_file, "MRN-1", 1)


def test_rotated_key_opens_everything_and_the_old_one_nothing(vault: Vault, tmp_path: Path) -> None:
    sealed, other = put(vault, "MRN-1", 1), again(vault, tmp_path)
    old = MasterKey.load(tmp_path / "vault.key", None)
    with _store.reading(vault._engine) as connection:
        wrapped = connection.execute(select(SUBJECT.c.wrapped_key)).scalar_one()
    assert vault.rotate_key() == 1
    for opened in (vault, other):  # the second learns of it by itself
        assert opened.pseudonym("MRN-1") == sealed.pseudonym
        assert opened.parts(event(1), type="prediction")["row.0.input"].values["note"] == PLAIN
        assert put(opened, "MRN-1", 2 if opened is vault else 3).pseudonym == sealed.pseudonym
    other.close()
    new = MasterKey.load(tmp_path / "vault.key", None)
    place = vault._places.key(sealed.pseudonym)
    assert old.unwrap(wrapped, place)
    with pytest.raises(SealBrokenError):
        new.unwrap(wrapped, place)


def test_rotation_cut_off_at_either_side_of_its_transaction_leaves_a_vault_that_opens(
    on_file: Vault, tmp_path: Path
) -> None:
    put(on_file, "MRN-1", 1)
    key = tmp_path / "vault.key"
    MasterKey.new().save(tmp_path / "vault.key.next", None)  # before: the new key wraps nothing yet
    assert again(on_file, tmp_path).pseudonym("MRN-1")
    before = key.read_bytes()
    on_file.rotate_key()
    (tmp_path / "vault.key.next").write_bytes(key.read_bytes())  # after: the file was not renamed yet
    (tmp_path / "vault.key.next").chmod(0o600)
    key.write_bytes(before)
    assert again(on_file, tmp_path).pseudonym("MRN-1")
    assert not (tmp_path / "vault.key.next").exists()


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


def traces(vault: Vault, names: list[str]) -> dict[str, list[bytes]]:
    """Everything of these people that the vault ever wrote, and what it stands for."""
    found: dict[str, list[bytes]] = {}
    for name in names:
        pseudonym = vault.pseudonym(name)
        with _store.reading(vault._engine) as connection:
            head = connection.execute(select(VAULT_HEAD)).one()
            row = connection.execute(select(SUBJECT).where(SUBJECT.c.pseudonym == pseudonym)).one()
        key = vault._key_of(head).unwrap(row.wrapped_key, vault._places.key(pseudonym))
        kept = [name.encode(), key, row.wrapped_key, row.sealed_id, row.lookup.encode()]
        for record in vault.records(pseudonym):
            parts = vault.parts(record.event_id, type=record.type)
            kept += [record.ciphertext, record.ciphertext[20:36], *(part.salt for part in parts.values())]
            kept += [str(value).encode() for part in parts.values() for value in part.values.values()][1:]
        found[name] = kept
    return found


def scan(paths: list[Path], needles: list[bytes]) -> list[tuple[str, bytes]]:
    data = {path: path.read_bytes() for path in paths}
    return [(path.name, needle) for path, text in data.items() for needle in needles if needle in text]


def test_raw_scan_finds_nothing_of_the_erased(on_file: Vault, tmp_path: Path) -> None:
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
    assert {path.name for path in files} == {"vault.db", "vault.db-wal", "vault.db-shm"}
    assert scan(files, [trace for name in names for trace in before[name]]) == []
    living = [trace for trace in before["person-number-1"] if scan(files, [trace])]
    assert before["person-number-1"][5] in living, "the scan does find what is still there"
    assert not [path for path in files if PLAIN.encode() in path.read_bytes()], "never in the clear"
    assert all(not erasure.leaf_index for erasure in on_file.pending())


def test_scrub_says_when_a_reader_stands_in_its_way(on_file: Vault, tmp_path: Path) -> None:
    put(on_file, "MRN-1", 1)
    reader = _store.connect(tmp_path / "vault.db")
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM vault_record").fetchall()
    erase(on_file, "MRN-1")
    assert on_file.scrub(patience_s=0.2) is False
    assert [erasure.scrubbed for erasure in on_file.pending()] == [False]
    reader.close()
    assert on_file.scrub() is True
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


# its database


def test_migration_makes_the_tables_that_the_code_uses(vault: Vault) -> None:
    from sqlalchemy import inspect
    from sqlalchemy.dialects import postgresql, sqlite

    name = vault._engine.dialect.name
    dialect: Any = postgresql.dialect() if name == "postgresql" else sqlite.dialect()
    with _store.reading(vault._engine) as connection:
        inspector = inspect(connection)
        for table in VaultTable.metadata.sorted_tables:
            found = {
                c["name"]: (c["type"].compile(dialect), c["nullable"])
                for c in inspector.get_columns(table.name)
            }
            assert found == {c.name: (c.type.compile(dialect), c.nullable) for c in table.columns}
            indices = {
                (tuple(i["column_names"]), bool(i["unique"])) for i in inspector.get_indexes(table.name)
            }
            unique = {tuple(u["column_names"]) for u in inspector.get_unique_constraints(table.name)}
            assert {(i, False) for i in [(c.name,) for c in table.columns if c.index]} == {
                pair for pair in indices if not pair[1]
            }
            assert unique == {(c.name,) for c in table.columns if c.unique}


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


def test_raw_scan_of_a_postgresql_data_directory_finds_nothing_but_in_its_write_ahead_log(
    postgresql_server: Any, tmp_path: Path
) -> None:
    server = postgresql_server
    data = server.folder / "data"
    with Vault.create(server.new_schema(), tmp_path / "vault.key", ORIGIN) as vault:
        for number in range(60):
            put(vault, f"person-number-{number % 6}", number)
        names = [f"person-number-{number}" for number in range(3)]
        before = traces(vault, [*names, "person-number-5"])
        pseudonyms = {name: vault.pseudonym(name) for name in names}
        for number, name in enumerate(names):
            erase(vault, name, f"r{number}")
        assert vault.scrub()
        gone = [trace for name in names for trace in before[name]]
        files = [path for path in data.rglob("*") if path.is_file()]
        log = [path for path in files if path.parent.name == "pg_wal"]
        assert scan([path for path in files if path not in log], gone) == []
        assert scan([path for path in files if path not in log], before["person-number-5"][5:6])
        closed = [name.encode() for name in names] + [PLAIN.encode()]
        closed += [trace for name in names for trace in before[name][1:2]]
        assert scan(log, closed) == [], "what the write-ahead log keeps is under the master key"
        places = [(before[name][2], vault._places.key(vault_name)) for name, vault_name in pseudonyms.items()]
        old = MasterKey.load(tmp_path / "vault.key", None)
        vault.rotate_key()
        new = MasterKey.load(tmp_path / "vault.key", None)
    for wrapped, place in places:  # as somebody would find it in an archived segment
        assert old.unwrap(wrapped, place)
        with pytest.raises(SealBrokenError):
            new.unwrap(wrapped, place)


def test_vault_is_beside_its_log_unless_the_home_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("origin: o\n")
    assert vault_location(tmp_path, {}) == Location(path=tmp_path / "vault.db")
    (tmp_path / "config.yaml").write_text("database: postgresql://u@h/d\n")
    assert vault_location(tmp_path, {}).url is not None
    (tmp_path / "config.yaml").write_text("database: postgresql://u@h/d\nvault: keys/vault.db\n")
    assert vault_location(tmp_path, {}) == Location(path=tmp_path / "keys" / "vault.db")
    assert vault_location(tmp_path, {"AFFIDAVIT_VAULT": "other.db"}).path == tmp_path / "other.db"
    (tmp_path / "config.yaml").write_text("vault: postgresql://u:secret@h/d\n")
    with pytest.raises(LocationError, match="password"):
        vault_location(tmp_path, {})
    with pytest.raises(LocationError, match="cannot live"):
        vault_location(tmp_path, {"AFFIDAVIT_VAULT": "mysql://h/d"})

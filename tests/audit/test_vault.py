"""The vault gives back what was sealed to its own entry and person, and to nobody's hands in between."""

from __future__ import annotations

import hashlib
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from audit import _store, _vault_store
from audit._vault_store import VaultMissingError
from audit.errors import EventIdConflictError, LocationError
from audit.location import Location, vault_location
from audit.vault import Vault
from audit.vault_key import MasterKey, SealBrokenError, VaultKeyError
from audit.vault_records import (
    PERSON,
    READER,
    Sealed,
    SubjectUnknownError,
    VaultRequestError,
)
from audit.vault_tables import RECORD, SUBJECT, VaultTable
from tests.audit.vaults import ORIGIN, PLAIN, again, event, put

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

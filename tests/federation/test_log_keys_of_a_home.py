"""A coordinator's home on either database: its keys encrypted, changed, and found again after a crash."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from audit.checkpoints import open_checkpoint
from audit.entries import KeyRevoked, KeyRotated, LogCompromised
from audit.errors import KeyFileError, LocationError
from audit.fsck import fsck
from audit.log_keys import read_log_keys
from audit.notes import NoteVerifier, parse_note
from federation.coordinator import Coordinator
from federation.errors import HomeError

ORIGIN = "hospital.example/log"


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


def grow(coordinator: Coordinator, count: int) -> None:
    for number in range(count):
        coordinator.append(KeyRevoked(key_id=str(number)), "server")


def keys_of(coordinator: Coordinator) -> Any:
    return read_log_keys((stored.leaf_index, entry.body) for stored, entry in coordinator.entries())


def signers_of(note: bytes, *vkeys: str) -> list[str]:
    opened = open_checkpoint(note, log=[NoteVerifier.parse(vkey) for vkey in vkeys], now=0)
    return [key.vkey for key in opened.log_keys]


def test_home_changes_its_key_with_an_overlap(tmp_path: Path) -> None:
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN) as home:
        old = home.log_key
        home.publish()
        home.rotate_log_key(2)
        new = home.log_key
        assert set(signers_of(home.publish(), old, new)) == {old, new}
        grow(home, 3)
        assert signers_of(home.publish(), old, new) == [new]
        keys = keys_of(home)
        assert keys.keys[old].last_size == 3
        assert [body.new_key for _, body in home.bodies(KeyRotated)] == [new]
    with Coordinator.open(tmp_path / "c") as again:
        assert again.log_key == new
        grow(again, 1)
        assert signers_of(again.publish(), old, new) == [new]


def test_crash_between_the_new_key_and_its_entry_is_mended_by_the_next_call(tmp_path: Path) -> None:
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN) as home:
        home.signer.rotate(50)  # and then the power failed
        made = home.log_key
    with Coordinator.open(tmp_path / "c") as again:
        first = again.rotate_log_key(7)
        assert [body.new_key for _, body in again.bodies(KeyRotated)] == [made] == [again.log_key]
        assert keys_of(again).keys[made].last_size is None
        with pytest.raises(Exception, match="under way"):
            again.rotate_log_key(7)
        assert again.ledger.tree_size == first.leaf_index + 1


def test_stolen_key_is_replaced_at_once(tmp_path: Path) -> None:
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN) as home:
        stolen = home.log_key
        home.publish()
        home.declare_compromised("a laptop was lost")
        assert signers_of(home.publish(), stolen, home.log_key) == [home.log_key]
        assert keys_of(home).keys[stolen].last_size == 1
        home.signer.replace_compromised()  # a second theft, and a crash before its entry
        second = home.declare_compromised("again")
        assert [body.reason for _, body in home.bodies(LogCompromised)] == ["a laptop was lost", "again"]
        assert home.ledger.tree_size == second.leaf_index + 1
        assert len(keys_of(home).keys) == 3


def test_two_processes_publish_through_one_home(tmp_path: Path) -> None:
    with (
        Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN) as first,
        Coordinator.open(tmp_path / "c") as second,
    ):
        for number in range(4):
            home = (first, second)[number % 2]
            grow(home, 1)
            assert home.checkpoint_size(home.publish()) == number + 2
        assert first.publisher.step() is None
        grow(second, 1)
        with pytest.raises(Exception, match="another process"):
            second.publisher.publish(timeout_s=0.1)


def test_key_is_encrypted_at_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse\n")
    monkeypatch.setenv("AFFIDAVIT_SIGNER_PASSPHRASE_FILE", str(secret))
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN) as home:
        home.rotate_log_key(0)
        files = sorted((tmp_path / "s").glob("*.pem"))
        assert len(files) == 2
        assert all(b"ENCRYPTED" in file.read_bytes() for file in files)
    monkeypatch.delenv("AFFIDAVIT_SIGNER_PASSPHRASE_FILE")
    with pytest.raises(KeyFileError, match="passphrase"):
        Coordinator.open(tmp_path / "c")
    monkeypatch.setenv("AFFIDAVIT_SIGNER_PASSPHRASE", "wrong")
    with pytest.raises(KeyFileError):
        Coordinator.open(tmp_path / "c")


def test_home_keeps_its_log_in_postgresql(server: Any, tmp_path: Path) -> None:
    url = server.new_schema()
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN, database=url) as home:
        grow(home, 3)
        note = home.publish()
    assert not (tmp_path / "c" / "log.db").exists()
    assert yaml.safe_load((tmp_path / "c" / "config.yaml").read_text())["database"] == url
    with Coordinator.open(tmp_path / "c") as again:
        assert again.ledger.tree_size == 4
        assert again.ledger.latest_checkpoint() == note
        assert len(parse_note(note).signatures) == 1
    from audit.entries import columns_of

    assert fsck(url, columns_of=columns_of, origin=ORIGIN).ok
    with pytest.raises(HomeError, match="already"):
        Coordinator.create(tmp_path / "c", tmp_path / "s2", ORIGIN, database=url)


def test_home_keeps_no_password(tmp_path: Path) -> None:
    with pytest.raises((HomeError, LocationError), match="password"):
        Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN, database="postgresql://u:hunter2@h/d")
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "c" / "config.yaml").exists()

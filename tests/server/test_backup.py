"""A restore never takes the log behind, or beside, what its signer signed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import random
import shutil
import tarfile

import pytest

from audit.entries import KeyRevoked, columns_of
from audit.errors import SignerMissingError
from audit.fsck import fsck
from audit.ledger import Ledger
from audit.signer import Signer
from federation.coordinator import Coordinator
from server import metric_files
from server.backup import BackupError, RestoreBehindSignerError, RestoreForkError, backup, restore


@pytest.fixture
def home(lab):
    lab.coordinator.publish()
    return lab.folder / "coordinator"


def append(lab, text):
    lab.coordinator.append(KeyRevoked(key_id=text), "operator")


def test_backup_restores_to_the_same_log(lab, home, tmp_path):
    report = backup(home, tmp_path / "b.tar.gz")
    moved = lab.folder / "moved"
    restored = restore(tmp_path / "b.tar.gz", moved, lab.folder / "signer")
    assert restored.tree_size == report.tree_size == lab.coordinator.ledger.tree_size
    assert fsck(moved / "log.db", columns_of=columns_of).ok
    assert (moved / "keys.db").read_bytes()[:6] == b"SQLite"
    with Coordinator.open(moved, lab.folder / "signer") as coordinator:
        assert coordinator.blobs.get(lab.version)
        coordinator.publish()


def test_restored_files_are_read_by_nobody_else(lab, home, tmp_path):
    backup(home, tmp_path / "b.tar.gz")
    restore(tmp_path / "b.tar.gz", lab.folder / "moved", lab.folder / "signer")
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in (lab.folder / "moved").rglob("*") if path.is_file()
    }
    assert {"keys.db", "log.db"} <= set(modes)
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


def test_restore_finds_the_signer_that_the_backup_names(lab, home, tmp_path):
    backup(home, tmp_path / "b.tar.gz")
    assert restore(tmp_path / "b.tar.gz", lab.folder / "moved").tree_size == lab.coordinator.ledger.tree_size
    with pytest.raises(SignerMissingError, match=str(tmp_path / "x" / "signer")):
        restore(tmp_path / "b.tar.gz", tmp_path / "x" / "elsewhere")


def test_backup_leaves_out_the_workers_metrics_which_are_no_databases(lab, home, tmp_path):
    folder = metric_files.prepare(home / metric_files.FOLDER, {}).path
    (folder / "counter_12.db").write_bytes(bytes(1 << 16))  # what `serve --workers` leaves
    backup(home, tmp_path / "b.tar.gz")
    with tarfile.open(tmp_path / "b.tar.gz") as archive:
        assert not [name for name in archive.getnames() if "counter" in name]


def test_backup_never_holds_the_signers_key_nor_is_open_to_others(lab, home, tmp_path):
    backup(home, tmp_path / "b.tar.gz")
    with tarfile.open(tmp_path / "b.tar.gz") as archive:
        names = archive.getnames()
    assert not [name for name in names if name.endswith(".pem") or "state.json" in name]
    assert (tmp_path / "b.tar.gz").stat().st_mode & 0o077 == 0


def test_restore_behind_the_signer_is_refused_with_guidance(lab, home, tmp_path):
    backup(home, tmp_path / "old.tar.gz")
    append(lab, "one more")
    lab.coordinator.publish()
    with pytest.raises(RestoreBehindSignerError, match="new origin") as caught:
        restore(tmp_path / "old.tar.gz", lab.folder / "restored", lab.folder / "signer")
    assert caught.value.code == "restore.behind_signer"
    assert caught.value.signed_size == caught.value.backup_size + 1
    assert not (lab.folder / "restored").exists()


def test_restore_of_an_unsigned_tail_is_allowed(lab, home, tmp_path):
    append(lab, "not yet signed")
    backup(home, tmp_path / "b.tar.gz")
    restored = restore(tmp_path / "b.tar.gz", lab.folder / "restored", lab.folder / "signer")
    assert restored.tree_size == Signer.open(lab.folder / "signer").state().checkpoint.tree_size + 1


def test_restore_of_another_history_of_the_same_length_is_refused(lab, home, tmp_path):
    shutil.copytree(home, tmp_path / "fork")
    append(lab, "what was signed")
    lab.coordinator.publish()
    with Ledger.open(tmp_path / "fork" / "log.db") as ledger:
        fork = Coordinator(tmp_path / "fork", lab.folder / "signer", ledger, lab.coordinator.signer)
        fork.append(KeyRevoked(key_id="what was not"), "operator")
    backup(tmp_path / "fork", tmp_path / "fork.tar.gz")
    with pytest.raises(RestoreForkError):
        restore(tmp_path / "fork.tar.gz", lab.folder / "restored", lab.folder / "signer")


def test_restore_with_another_logs_signer_is_refused(lab, home, tmp_path):
    backup(home, tmp_path / "b.tar.gz")
    Signer.create(tmp_path / "other", "other.example/log")
    with pytest.raises(RestoreForkError, match=r"other\.example"):
        restore(tmp_path / "b.tar.gz", lab.folder / "restored", tmp_path / "other")


def test_restore_never_overwrites_a_log(lab, home, tmp_path):
    backup(home, tmp_path / "b.tar.gz")
    with pytest.raises(BackupError, match="holds a log already"):
        restore(tmp_path / "b.tar.gz", home, lab.folder / "signer")


def test_backup_never_overwrites(lab, home, tmp_path):
    (tmp_path / "b.tar.gz").write_bytes(b"precious")
    with pytest.raises(BackupError, match="exists"):
        backup(home, tmp_path / "b.tar.gz")
    assert (tmp_path / "b.tar.gz").read_bytes() == b"precious"


def test_backup_of_nothing_is_refused(tmp_path):
    with pytest.raises(BackupError, match="--home"):
        backup(tmp_path, tmp_path / "b.tar.gz")


def hostile(path, members, files=()):
    with tarfile.open(path, "w:gz") as archive:
        digests = dict.fromkeys(files, hashlib.sha256(b"x").hexdigest())
        manifest = json.dumps({"format": "affidavit-backup/1", "files": digests}).encode()
        for name, data, kind in [("backup.json", manifest, tarfile.REGTYPE), *members]:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("members", "files"),
    [
        ([("../escape", b"x", tarfile.REGTYPE)], ["../escape"]),
        ([("home/../../escape", b"x", tarfile.REGTYPE)], ["../../escape"]),
        ([("/escape", b"x", tarfile.REGTYPE)], ["log.db"]),
        ([("home/log.db", b"", tarfile.SYMTYPE)], ["log.db"]),
        ([("home/extra", b"x", tarfile.REGTYPE)], ["log.db"]),
        ([], ["log.db"]),
        ([], []),
    ],
)
def test_hostile_backup_is_refused_and_writes_nothing(lab, home, tmp_path, members, files):
    hostile(tmp_path / "bad.tar.gz", members, files)
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(Exception, match=r"backup|log") as caught:
        restore(tmp_path / "bad.tar.gz", lab.folder / "restored", lab.folder / "signer")
    assert hasattr(caught.value, "code")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not (lab.folder / "restored").exists()


@pytest.mark.parametrize("end", [1000, -500, -1])
def test_backup_that_is_cut_short_is_refused(lab, home, tmp_path, end):
    backup(home, tmp_path / "b.tar.gz")
    (tmp_path / "b.tar.gz").write_bytes((tmp_path / "b.tar.gz").read_bytes()[:end])
    with pytest.raises(BackupError):
        restore(tmp_path / "b.tar.gz", lab.folder / "restored", lab.folder / "signer")
    assert not (lab.folder / "restored").exists()


def test_backup_whose_bytes_a_flipped_bit_changes_is_refused_wherever_it_is(lab, home, tmp_path):
    """Those that no digest covers too, as a member's mode. Some bits of a compressed file mean nothing."""
    backup(home, tmp_path / "b.tar.gz")
    data, dice = (tmp_path / "b.tar.gz").read_bytes(), random.Random(1)
    whole, refused = gzip.decompress(data), 0
    for at in [*dice.sample(range(len(data)), 200), *range(len(data) - 20, len(data))]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << dice.randrange(8)
        (tmp_path / "bad.tar.gz").write_bytes(flipped)
        try:
            restore(tmp_path / "bad.tar.gz", lab.folder / "restored", lab.folder / "signer")
        except BackupError:
            refused += 1
            assert not (lab.folder / "restored").exists()
        else:
            assert gzip.decompress(bytes(flipped)) == whole
            shutil.rmtree(lab.folder / "restored")
    assert refused > 150


def test_backup_that_goes_on_after_its_last_file_is_refused(lab, home, tmp_path):
    backup(home, tmp_path / "b.tar.gz")
    with (tmp_path / "b.tar.gz").open("ab") as file:
        file.write(gzip.compress(bytes(2**20)))
    with pytest.raises(BackupError, match="goes on"):
        restore(tmp_path / "b.tar.gz", lab.folder / "restored", lab.folder / "signer")

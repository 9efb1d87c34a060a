"""Backup and restore of a coordinator's home, so that a restore can never make the log say two things.

A backup is one tar file: consistent copies of the SQLite databases, then every other file. The vault and its
key are never in it, because erasure must reach every copy (`affidavit vault backup`), nor is the signer's
home: its state is what tells an old backup from the present. A backup whose log is shorter than the last
signed checkpoint, or differs under it, is refused: signing on from there would be a second history.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import sqlite3
import tarfile
import tempfile
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from audit.errors import SignerElsewhereError, SignerRollbackError, SignerSplitError
from audit.ledger import Ledger
from audit.location import CONFIG, Location, log_location, vault_location
from audit.signer import Signer
from audit.signing_home import signer_home_of, signer_passphrase
from audit.vault_home import KEY_FILE
from server import metric_files
from server.errors import ServerError

FORMAT: Final = "affidavit-backup/1"
_MANIFEST: Final = "backup.json"
_MAX_BYTES: Final = 64 * 2**30
_MAX_TAIL: Final = 2**20  # tar fills its last record, 10 KiB
_UNREADABLE: Final = (
    tarfile.TarError, zlib.error, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError,
)  # fmt: skip
_SKIPPED: Final = ("-wal", "-shm", "-journal", ".lock")


class BackupError(ServerError):
    """The file is no backup, or a home is in the way; the message names the path and the fix."""

    code = "backup.unusable"


class RestoreBehindSignerError(ServerError):
    """The backup's log is not what the signer has signed."""

    code = "restore.behind_signer"

    def __init__(self, *, backup_size: int, signed_size: int) -> None:
        super().__init__(
            f"the backup's log has {backup_size} entries, but the signer has signed {signed_size}: "
            "signing on would be a second history. Use a newer backup, or the database's replica. If none "
            "holds those entries, start a new origin with `affidavit init` in an empty folder and sign a "
            "public statement of what was lost; never give the old origin a shorter log"
        )
        self.backup_size, self.signed_size = backup_size, signed_size


class RestoreForkError(ServerError):
    """The backup's log is long enough, but says something else than what was signed."""

    code = "restore.fork"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackupReport:
    path: str
    files: int
    tree_size: int
    origin: str


def backup(home: Path, target: Path) -> BackupReport:
    """Write a backup of `home` to `target`; safe while a server runs.

    Raises:
        BackupError: there is no coordinator's home, or the target exists.
    """
    place = log_location(home)
    if place.path is None:
        raise BackupError(
            f"{home}: its log is in {place}, which has tools of its own. One copy: pg_dump --format=custom "
            f"--file=log.dump --dbname={_without_options(place)}   and the folder {home} by any means. Every "
            "entry until a failure: pg_basebackup and an archive of the write-ahead log, or a synchronous "
            "replica. Never in either: the signer's home, nor the vault, which `affidavit vault backup` "
            "copies apart. Restored with pg_restore, the log is checked against the signer's state when the "
            "home is next opened: an old copy is refused"
        )
    if place.path != home / "log.db" or not place.path.is_file():
        raise BackupError(f"{home}: is no coordinator's home with its log in it; give --home")
    if target.exists():
        raise BackupError(f"{target}: exists; a backup never overwrites, choose another name")
    with tempfile.TemporaryDirectory() as scratch:
        copied = Path(scratch) / "home"
        files = _copy(home, copied)
        with Ledger.open(copied / "log.db") as ledger:
            size, origin = ledger.tree_size, ledger.origin
        _drop_journals(copied)
        report = BackupReport(path=str(target), files=len(files), tree_size=size, origin=origin)
        manifest = {
            "format": FORMAT,
            "origin": origin,
            "tree_size": size,
            "files": {name: _digest(copied / name) for name in sorted(files)},
        }
        partial = target.with_name(target.name + ".partial")
        with tarfile.open(partial, "x:gz") as archive:
            data = json.dumps(manifest).encode()
            info = tarfile.TarInfo(_MANIFEST)
            info.size, info.mode = len(data), 0o600
            archive.addfile(info, io.BytesIO(data))
            for name in sorted(files):
                archive.add(copied / name, arcname=f"home/{name}", recursive=False)
        os.chmod(partial, 0o600)
        partial.rename(target)
    return report


def restore(source: Path, home: Path, signer_home: Path | None = None) -> BackupReport:
    """Put a backup back into `home`, after checking it against the signer's own state.

    Without `signer_home` it is the one that the backup's own `config.yaml` names, as seen from `home`.

    Raises:
        BackupError: the file is no backup, or `home` holds a log already.
        RestoreBehindSignerError: the signer has signed more than the backup holds.
        RestoreForkError: the backup contradicts what the signer has signed.
    """
    if (home / "log.db").exists():
        raise BackupError(f"{home}: holds a log already; move that folder away first, do not delete it")
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        files = _unpack(source, Path(scratch))
        unpacked = Path(scratch) / "home"
        with Ledger.open(unpacked / "log.db") as ledger:
            size, origin = ledger.tree_size, ledger.origin
            _check_against_signer(ledger, signer_home or _signer_of(home, unpacked))
        _drop_journals(unpacked)
        if home.exists():
            if any(home.iterdir()):
                raise BackupError(f"{home}: is not empty; move it away first")
            home.rmdir()
        shutil.move(str(unpacked), str(home))
    return BackupReport(path=str(home), files=len(files), tree_size=size, origin=origin)


def _without_options(place: Location) -> str:
    """A URL that PostgreSQL's own programs read, without a password."""
    assert place.url is not None  # noqa: S101 - asked of PostgreSQL only
    return place.url.set(drivername="postgresql", password=None).render_as_string(hide_password=True)


def _signer_of(home: Path, unpacked: Path) -> Path:
    try:
        return signer_home_of(home, config=unpacked / CONFIG)
    except SignerElsewhereError as error:  # restored beside the original, with a signer put beside it too
        if error.beside is None:
            raise
        return error.beside


def _check_against_signer(ledger: Ledger, signer_home: Path) -> None:
    signer = Signer.open(signer_home, signer_passphrase())
    if signer.origin != ledger.origin:
        raise RestoreForkError(f"the backup is of {ledger.origin}, the signer's log is {signer.origin}")
    try:
        signer.check_extended_by(ledger)
    except SignerRollbackError as error:
        raise RestoreBehindSignerError(
            backup_size=error.offered_size, signed_size=error.signed_size
        ) from error
    except SignerSplitError as error:
        raise RestoreForkError(
            f"the backup's root of {error.tree_size} entries is not the one that was signed; use another"
        ) from error


def _copy(home: Path, target: Path) -> list[str]:
    names, vault = [], vault_location(home).path
    for path in sorted(home.rglob("*")):
        name = path.relative_to(home).as_posix()
        if path.is_symlink() or not path.is_file() or name.endswith(_SKIPPED):
            continue
        if path == vault or name.startswith((KEY_FILE, f"{metric_files.FOLDER}/")):
            continue
        destination = target / name
        destination.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".db":
            with (
                closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as origin,
                closing(sqlite3.connect(destination)) as copy,
            ):
                origin.backup(copy)
        else:
            shutil.copy2(path, destination)
        names.append(name)
    return names


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _drop_journals(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and path.name.endswith(_SKIPPED):
            path.unlink()


def _unpack(source: Path, target: Path) -> list[str]:
    try:
        with gzip.open(source) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            first = archive.next()
            listed = archive.extractfile(first) if first is not None and first.name == _MANIFEST else None
            manifest = json.loads(listed.read(2**20)) if listed is not None else None
            if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
                raise BackupError(f"{source}: is no backup of this release")
            digests = {f"home/{name}": str(digest) for name, digest in manifest["files"].items()}
            names = set(digests)
            total = 0
            for member in archive:
                if member.name == _MANIFEST:
                    continue
                total += member.size
                parts = PurePosixPath(member.name).parts
                if member.name not in names or not member.isreg() or ".." in parts or total > _MAX_BYTES:
                    raise BackupError(f"{source}: holds {member.name!r}, which no backup of ours does")
                _extract(archive, member, target)
                if _digest(target / member.name) != digests[member.name]:
                    raise BackupError(f"{source}: {member.name} is altered; use another backup")
                names.discard(member.name)
            if len(stream.read(_MAX_TAIL + 1)) > _MAX_TAIL:  # at its end gzip compares its sum of the whole
                raise BackupError(f"{source}: goes on after its last file, which no backup of ours does")
            if names or not digests:
                raise BackupError(
                    f"{source}: lacks {min(names, default='everything')}; the file is cut short"
                )
            return list(manifest["files"])
    except _UNREADABLE as error:
        raise BackupError(f"{source}: cannot be read as a backup ({error})") from error


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write a checked member, for nobody but us to read; `filter="data"` needs Python 3.11.4."""
    path = target / member.name
    path.parent.mkdir(parents=True, exist_ok=True)
    source = archive.extractfile(member)
    if source is None:
        raise BackupError(f"{member.name}: is no file")
    mode = 0o600 | (member.mode & 0o100)
    with source, os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        shutil.copyfileobj(source, file)

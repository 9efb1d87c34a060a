"""A backup of the vault, apart from the home's: ciphertexts and wrapped keys, never the master key.

Whoever is erased after a backup was made is still in it, so a restore applies every erasure that the log
records before the vault is in place. What a backup kept elsewhere can tell ends with the master key:
`Vault.rotate_key` closes every earlier backup for good.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
from pathlib import Path

from audit import _store
from audit._files import sync_folder
from audit._vault_store import VaultMissingError
from audit.location import Location
from audit.subjects import Reconciled, SubjectLog, reconcile
from audit.vault import Vault


def backup_vault(location: Location, target: Path) -> int:
    """Copy the vault as it is now to a new file of mode 0600; return its size in bytes.

    Raises:
        VaultMissingError: there is none, it is in PostgreSQL, or the target exists.
    """
    if location.path is None:
        raise VaultMissingError(
            str(location), "is in PostgreSQL; back up its vault_* tables with pg_dump, apart from the log's"
        )
    if not location.path.is_file():
        raise VaultMissingError(str(location.path), "no vault here")
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError as error:
        raise VaultMissingError(
            str(target), "exists; choose another name, a backup never overwrites"
        ) from error
    with (
        _store.translated(),
        contextlib.closing(_store.connect(location.path)) as origin,
        contextlib.closing(sqlite3.connect(target)) as copy,
    ):
        origin.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")
    return target.stat().st_size


def restore_vault(
    source: Path,
    location: Location,
    key_path: Path,
    passphrase: bytes | None,
    ledger: SubjectLog,
    *,
    origin: str,
    before: str,
) -> Reconciled:
    """Put a backup in place, once everybody whom the log says was erased is erased in it too.

    Raises:
        VaultMissingError: a vault is in the way, it belongs in PostgreSQL, or the file is none.
        VaultKeyError: the master key was rotated since; what the backup holds is closed for good.
    """
    if location.path is None:
        raise VaultMissingError(
            str(location), "is in PostgreSQL; restore its tables with pg_restore, then start the server"
        )
    if location.path.exists():
        raise VaultMissingError(str(location.path), "a vault is there already; move it away first")
    draft = location.path.with_name(f".{location.path.name}.{secrets.token_hex(6)}")
    try:
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        draft.write_bytes(source.read_bytes())
        with Vault.open(draft, key_path, origin, passphrase) as vault:
            done = reconcile(ledger, vault, before=before)
            vault.scrub()
        with contextlib.closing(_store.connect(draft)) as raw:
            raw.execute("PRAGMA journal_mode=WAL")
            raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        os.link(draft, location.path)
        sync_folder(location.path.parent)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal", _store.QUEUE_SUFFIX):
            Path(f"{draft}{suffix}").unlink(missing_ok=True)
    return done

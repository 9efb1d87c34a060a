"""The vault of a coordinator's home: where it is, its key file, and when it may be made anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from audit import _vault_store
from audit._vault_store import VaultMissingError
from audit.location import read_secret, vault_location
from audit.vault import Vault

KEY_FILE: Final = "vault.key"
PASSPHRASE: Final = "AFFIDAVIT_VAULT_PASSPHRASE"  # noqa: S105 - the name of a variable


def open_vault(home: Path, origin: str, environ: Mapping[str, str] | None = None) -> Vault:
    """Open the home's vault; a home that has neither vault nor key gets an empty one.

    Raises:
        VaultMissingError: there is a key but no vault: it was lost, and an empty one would hide that.
        VaultKeyError: the key is missing or of another vault.
        LocationError: the configuration cannot be read.
    """
    location, key_path = vault_location(home, environ), home / KEY_FILE
    secret = vault_passphrase(environ)
    if not _vault_store.exists(location):
        if key_path.exists():
            raise VaultMissingError(
                str(location),
                f"the vault is gone, its key {key_path} is there; put a backup back with `affidavit vault "
                "restore`, or move the key away: an empty vault is made, and what was sealed stays closed",
            )
        return Vault.create(location, key_path, origin, secret)
    return Vault.open(location, key_path, origin, secret)


def vault_passphrase(environ: Mapping[str, str] | None = None) -> bytes | None:
    """Return what encrypts the key file, from the environment or the file that it names."""
    text = read_secret(PASSPHRASE, environ)
    return None if text is None else text.encode()

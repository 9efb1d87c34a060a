"""A vault to attack: what is put into it, and what a raw scan must not find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import select

from audit import _store
from audit.disclosure import new_part
from audit.vault import Vault
from audit.vault_records import (
    PERSON,
    Sealed,
    SealRequest,
)
from audit.vault_tables import SUBJECT, VAULT_HEAD
from tests.raw_scan import halves

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


def again(vault: Vault, tmp_path: Path) -> Vault:
    return Vault.open(vault.location, tmp_path / "vault.key", ORIGIN)


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
    """Return which file holds which needle, or a half of it."""
    data = {path: path.read_bytes() for path in paths}
    return [
        (path.name, needle)
        for path, text in data.items()
        for needle in needles
        if any(half in text for half in halves(needle))
    ]

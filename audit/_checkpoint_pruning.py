"""Which stored checkpoints another one makes superfluous.

A note goes when one of a larger tree bears all of its signers, cosigned within the same hour. What a quorum
accepts in the one it accepts in the other, with more leaves; so the largest note that any policy accepts
stays, and the one with most cosignatures for any leaf. What is lost is witnessed time within the hour. A note
that nobody cosigned says no time: there any hour will do.
"""

from __future__ import annotations

from collections.abc import Iterable

from audit.errors import AuditError
from audit.keys import SIGNATURE_SIZE
from audit.notes import parse_note

HOUR_S = 3600

_Signer = tuple[str, bytes]  # name and key id


def superseded(notes: Iterable[tuple[int, bytes]]) -> list[int]:
    """Return the sizes of notes that go; `notes` are (tree size, note), largest first.

    A note that does not parse stays, for the examination to find.
    """
    kept: dict[int | None, list[frozenset[_Signer]]] = {}
    gone: list[int] = []
    for size, note in notes:
        try:
            signers, hour = _signed(note)
        except AuditError:
            continue
        groups = kept.values() if hour is None else [kept.get(hour, [])]
        if any(signers <= rival for group in groups for rival in group):
            gone.append(size)
        else:
            kept.setdefault(hour, []).append(signers)
    return gone


def _signed(note: bytes) -> tuple[frozenset[_Signer], int | None]:
    """The signers, and the hour of the first cosignature; a plain signature says no time."""
    lines = parse_note(note).signatures
    times = [int.from_bytes(line.payload[:8], "big") for line in lines if len(line.payload) != SIGNATURE_SIZE]
    return frozenset((line.name, line.key_id) for line in lines), min(times) // HOUR_S if times else None

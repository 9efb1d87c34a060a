"""How long each of a log's keys is valid: told by entries, counted in leaves.

`log.created` names the first key. `key.rotated`, signed by both, lets a second key take over: the first
one's signatures count on trees of at most `retire_at` entries. `log.compromise`, signed by the successor,
ends a key's validity at `valid_size` entries, and what the key signed before counts only where witnesses
cosigned it. All this only takes trust away: which keys are believed at all is the reader's policy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from audit.entries import KeyRotated, LogCompromised, LogCreated, decode_signature, signing_payload
from audit.errors import AuditError, LogKeyError
from audit.notes import KeyType, NoteVerifier


@dataclass(slots=True)
class KeyValidity:
    """One key's last tree, as the entries say; None: no end is known."""

    verifier: NoteVerifier
    last_size: int | None = None
    compromised_at: int | None = None  # the leaf that says so
    ended_at: int | None = None  # the leaf that set `last_size`

    def end(self, size: int, leaf: int) -> None:
        if self.last_size is None or size < self.last_size:
            self.last_size, self.ended_at = size, leaf


@dataclass(frozen=True, slots=True)
class LogKeys:
    """Every key that a log's entries name, by vkey."""

    keys: dict[str, KeyValidity]
    changed: bool  # whether any entry changes or ends a key

    def check(self, vkey: str, tree_size: int, *, witnessed: bool) -> None:
        """Return if a signature by this key counts on a tree of this size.

        While no entry changes a key, every key that the caller believes counts.

        Raises:
            LogKeyError: it does not; `leaf_index` is the entry that ended the key.
        """
        if not self.changed:
            return
        key = self.keys.get(vkey)
        if key is None:
            raise LogKeyError("log.key_unknown", f"no entry of the log names key {vkey}", 0)
        if key.last_size is not None and tree_size > key.last_size:
            code = "log.key_retired" if key.compromised_at is None else "log.key_compromised"
            raise LogKeyError(
                code,
                f"the key is valid up to size {key.last_size}, the tree has {tree_size} entries",
                key.ended_at or 0,
            )
        if key.compromised_at is not None and not witnessed:
            raise LogKeyError(
                "log.key_compromised",
                "the key is compromised: without a quorum of witnesses what it signed counts for nothing",
                key.compromised_at,
            )


def read_log_keys(bodies: Iterable[tuple[int, Any]]) -> LogKeys:
    """Read the entries about keys, given as (leaf index, body) in index order; others are skipped.

    Raises:
        LogKeyError: one of them is not signed as it must be, or names a key that the log did not have.
    """
    keys: dict[str, KeyValidity] = {}
    origin, changed = "", False
    for index, body in bodies:
        changed = changed or isinstance(body, (KeyRotated, LogCompromised))
        if isinstance(body, LogCreated):
            if index != 0:
                raise LogKeyError("log.key_entry", f"leaf {index} creates the log a second time", index)
            origin = body.origin
            keys[body.log_key] = KeyValidity(_parse(body.log_key, origin, index))
        elif isinstance(body, KeyRotated):
            old, new = _known(keys, body.log_key, index), _parse(body.new_key, origin, index)
            _prove(body, "signature", old.verifier, index)
            _prove(body, "successor_proof", new, index)
            if body.new_key in keys:
                raise LogKeyError("log.key_entry", f"leaf {index} brings back a key that the log had", index)
            if old.last_size is not None:
                raise LogKeyError("log.key_entry", f"leaf {index} rotates a key that ended already", index)
            old.end(body.retire_at, index)
            keys[body.new_key] = KeyValidity(new)
        elif isinstance(body, LogCompromised):
            lost, new = _known(keys, body.log_key, index), _parse(body.successor, origin, index)
            _prove(body, "signature", new, index)
            if not 0 <= body.valid_size <= index:
                raise LogKeyError("log.key_entry", f"leaf {index}: valid_size lies beyond the entry", index)
            lost.end(body.valid_size, index)
            lost.compromised_at = index
            keys.setdefault(body.successor, KeyValidity(new))
    return LogKeys(keys, changed)


def _known(keys: dict[str, KeyValidity], vkey: str, index: int) -> KeyValidity:
    if vkey not in keys:
        raise LogKeyError("log.key_entry", f"leaf {index} names a key that the log never had", index)
    return keys[vkey]


def _parse(vkey: str, origin: str, index: int) -> NoteVerifier:
    try:
        verifier = NoteVerifier.parse(vkey)
    except AuditError as error:
        raise LogKeyError("log.key_entry", f"leaf {index}: {error}", index) from error
    if verifier.name != origin or verifier.kind is not KeyType.ED25519:
        raise LogKeyError("log.key_entry", f"leaf {index}: {vkey} is no key of log {origin!r}", index)
    return verifier


def _prove(body: Any, field: str, verifier: NoteVerifier, index: int) -> None:
    domain, payload = signing_payload(body)
    try:
        verifier.key.verify(domain, payload, decode_signature(getattr(body, field), field=field))
    except AuditError as error:
        raise LogKeyError("log.key_entry", f"leaf {index}: {field}: {error}", index) from error

"""A log's keys as its own entries name them, and whether every stored checkpoint bears one that counts."""

from __future__ import annotations

from typing import Final

from audit.checkpoints import open_checkpoint, parse_checkpoint_note
from audit.entries import decode_entry
from audit.errors import AuditError
from audit.ledger import MAX_SEARCH, Ledger
from audit.log_keys import LogKeys, read_log_keys

KEY_TYPES: Final = ("log.created", "key.rotated", "log.compromise")


class UnsignedCheckpointError(AuditError):
    """A stored checkpoint bears no signature of the log that counts on its tree."""

    code = "audit.unsigned_checkpoint"

    def __init__(self, tree_size: int, reason: str) -> None:
        super().__init__(f"checkpoint {tree_size}: {reason}")
        self.tree_size, self.reason = tree_size, reason


def keys_of(ledger: Ledger) -> LogKeys:
    """Return the log's keys and how long each is valid.

    Raises:
        LogKeyError: an entry about a key is not signed as it must be.
    """
    rows = ledger.search(type=KEY_TYPES, limit=MAX_SEARCH)
    return read_log_keys((row.leaf_index, decode_entry(row.body).body) for row in rows)


class KnownKeys:
    """`keys_of` for whoever asks at every turn: entries are read again when one about a key was added."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: tuple[int, LogKeys] | None = None  # the last entry about a key, and what they say

    def now(self) -> LogKeys:
        """Raises `LogKeyError` as `keys_of`."""
        known = self._known
        after = known[0] if known is not None else -1
        if known is None or self._ledger.has_since(KEY_TYPES, after):
            newest = self._ledger.search(type=KEY_TYPES, limit=1, newest_first=True)
            known = self._known = (newest[0].leaf_index if newest else -1, keys_of(self._ledger))
        return known[1]


def check_notes(ledger: Ledger) -> int:
    """Return how many checkpoints are stored, each signed by a key that counts on a tree of its size.

    What a stolen key signed before it was ended counts here: its witnesses are the reader's business.

    Raises:
        UnsignedCheckpointError: one is not.
        LogKeyError: as `keys_of`.
    """
    keys = keys_of(ledger)
    verifiers = tuple(key.verifier for key in keys.keys.values())
    notes = ledger.checkpoints()
    for note in notes:
        size = parse_checkpoint_note(note).tree_size
        if not verifiers:
            raise UnsignedCheckpointError(size, "no entry names a key of the log")
        try:
            signed = open_checkpoint(note, log=verifiers, now=0).log_keys
        except AuditError as error:
            raise UnsignedCheckpointError(size, str(error)) from error
        refused = [reason for key in signed if (reason := _why_not(keys, key.vkey, size))]
        if len(refused) == len(signed):
            raise UnsignedCheckpointError(size, refused[0])
    return len(notes)


def _why_not(keys: LogKeys, vkey: str, size: int) -> str:
    try:
        keys.check(vkey, size, witnessed=True)
    except AuditError as error:
        return str(error)
    return ""

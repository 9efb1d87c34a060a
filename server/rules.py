"""The rules that the log puts in force, and the alarms that it leaves open: followed by every worker.

A `policy.changed` entry counts when an officer of every charter that has a live version signed it, it
continues the chain of changes (so that nobody logs an old signature a second time), its text is what its
digest says and the text holds together. What does not count changes nothing: the rules in force stay. Who was
an officer is judged by the log up to the entry, so that every worker, and one that starts a year later,
judges alike.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from audit.entries import ZERO_DIGEST, KeyRevoked, decode_entry, decode_signature, signing_payload
from audit.errors import AuditError
from audit.keys import VerifyKey, parse_public_key
from audit.ledger import Ledger, StoredEntry
from audit.merkle import hash_leaf
from audit.serving_bodies import AlarmClosed, AlarmRaised, PolicyChanged
from server.access import CedarAuthorizer, with_shipped_schema
from server.errors import PolicyLoadError
from server.live import LiveModels

_logger = logging.getLogger(__name__)

_PAGE: Final = 500
_OF_MODELS: Final = ("charter.published", "version.registered", "version.transition")
_TYPES: Final = (*_OF_MODELS, "policy.changed", "alarm.raised", "alarm.closed", "key.revoked")
MAX_OPEN_ALARMS: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One change of rules that counts."""

    leaf_index: int
    leaf_hash: str
    time: str
    body: PolicyChanged


class RulesInForce:
    """What one worker knows of the log's rules and alarms."""

    def __init__(
        self,
        ledger: Ledger,
        authorizer: CedarAuthorizer | None = None,
        revoked: Callable[[str], None] | None = None,
    ) -> None:
        """Follow `ledger`: `authorizer` gets the rules found, `revoked` hears of each key that ended."""
        self._ledger, self._authorizer, self._revoked = ledger, authorizer, revoked
        self.models = LiveModels(ledger)  # of its own: it stands where this reader does in the log
        self._read_to = 0
        self._change: Change | None = None
        self._alarms: dict[str, AlarmRaised] = {}
        self._drifting: dict[str, int] = {}  # model -> open alarms of kind drift
        self._lock = threading.Lock()

    def refresh(self) -> bool:
        """Read the entries that came since the last call; say whether other rules decide now."""
        with self._lock:
            size, before = self._ledger.tree_size, self._change
            if size == self._read_to:
                return False
            last = self._read_to - 1
            for row in self.events(after=last):
                self.take(row)
                last = row.leaf_index
            self._read_to = max(size, last + 1)
            changed = self._change is not before
            if changed and self._change is not None and self._authorizer is not None:
                self._put_in_force(self._authorizer, self._change)
            return changed

    def events(self, *, after: int = -1) -> Iterator[StoredEntry]:
        """The entries that rules and alarms rest on, in order."""
        while page := self._ledger.search(type=_TYPES, after=after, limit=_PAGE):
            yield from page
            if len(page) < _PAGE:
                return
            after = page[-1].leaf_index

    def take(self, row: StoredEntry) -> None:
        """Take one of `events`, each once and in order."""
        self._take(row.leaf_index, row.columns.type, row.body)

    @property
    def change(self) -> Change | None:
        """The change in force; None while nobody made one."""
        return self._change

    def open_alarms(self, *, model: str | None = None, kind: str | None = None) -> tuple[AlarmRaised, ...]:
        """The alarms that nobody closed, oldest first."""
        with self._lock:
            return tuple(
                found
                for found in self._alarms.values()
                if model in (None, found.model) and kind in (None, found.kind)
            )

    def alarm(self, alarm: str) -> AlarmRaised | None:
        """The open alarm of that id."""
        return self._alarms.get(alarm)

    def drift_alarms(self, model: str) -> int:
        """How many are open; counted when one comes or goes, because every answer asks."""
        return self._drifting.get(model, 0)

    def fault(self, body: PolicyChanged) -> str:
        """Return why a change would not count after what was read, or an empty text."""
        previous = ZERO_DIGEST if self._change is None else self._change.leaf_hash
        if hashlib.sha256(body.text.encode()).hexdigest() != body.policy_set:
            return "its digest is not its text's"
        if body.previous_change != previous:
            return "it does not continue the chain of changes"
        charters = self.models.charters_in_force()
        if not charters:
            return "no charter names an officer yet"
        for charter in charters:
            if body.officer not in [officer["key"] for officer in charter["officers"]]:
                return f"its signer is no officer of charter {charter['name']}"
        try:
            domain, payload = signing_payload(body)
            key = VerifyKey(parse_public_key(body.officer))
            key.verify(domain, payload, decode_signature(body.signature))
        except AuditError as error:
            return str(error)
        return _load_fault(body)

    @staticmethod
    def _put_in_force(authorizer: CedarAuthorizer, change: Change) -> None:
        try:
            authorizer.replace(with_shipped_schema(change.body.text))
        except PolicyLoadError as error:  # made under another release's schema: nobody is let in by guess
            _logger.critical(
                "entry %d does not fit this release; all is refused: %s", change.leaf_index, error
            )
            authorizer.replace(with_shipped_schema(""))

    def _take(self, index: int, kind: str, data: bytes) -> None:
        if kind in _OF_MODELS:
            self.models.take(index, data)
            return
        try:
            entry = decode_entry(data)
        except AuditError as error:
            _logger.error("entry %d is not readable and does not count: %s", index, error)
            return
        match entry.body:
            case PolicyChanged() as body:
                reason = self.fault(body)
                if reason:
                    _logger.error("entry %d changes no rule: %s", index, reason)
                    return
                self._change = Change(
                    leaf_index=index, leaf_hash=hash_leaf(data).hex(), time=entry.time, body=body
                )
            case AlarmRaised() as alarm:
                has_room = (
                    alarm.kind == "drift" or len(self._alarms) < MAX_OPEN_ALARMS
                )  # a flood hides no drift
                if has_room and alarm.alarm not in self._alarms:
                    self._alarms[alarm.alarm] = alarm
                    self._count(alarm, 1)
            case AlarmClosed() as closed:
                gone = self._alarms.pop(closed.alarm, None)
                if gone is not None:
                    self._count(gone, -1)
            case KeyRevoked() as ended if self._revoked is not None:
                self._revoked(ended.key_id)
            case _:
                return

    def _count(self, alarm: AlarmRaised, more: int) -> None:
        if alarm.kind == "drift":
            self._drifting[alarm.model] = self._drifting.get(alarm.model, 0) + more


def _load_fault(body: PolicyChanged) -> str:
    """Why a text under this release's schema does not load. Of another schema nothing is judged here."""
    text = with_shipped_schema(body.text)
    if hashlib.sha256(text.schema.encode()).hexdigest() != body.schema_digest:
        return ""
    try:
        CedarAuthorizer(text)
    except PolicyLoadError as error:
        return str(error)
    return ""

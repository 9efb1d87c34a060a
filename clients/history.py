"""Whether the past that a coordinator shows is the one everybody saw: in a witnessed checkpoint."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from audit.entries import (
    Body,
    Entry,
    RoundAbandoned,
    RoundCompleted,
    RunCompleted,
    RunFailed,
    SiteStatement,
    SiteUndelivered,
    decode_entry,
    decode_signature,
    signing_payload,
)
from audit.errors import AuditError
from audit.keys import VerifyKey
from audit.known_leaf import decode_entry_of
from audit.merkle import hash_leaf
from audit.tlog_policy import AcceptedCheckpoint, Policy
from audit.tlog_proof import verify_tlog_proof
from clients.errors import RefusedError
from clients.requests import LoggedEntry

Clock = Callable[[], datetime]

_KEPT_NOTES: Final = 4


@dataclass(frozen=True, slots=True)
class WitnessedEntry:
    """An entry that the log's key and the site's own quorum of witnesses stand behind."""

    body: Body
    leaf_hash: str
    leaf_index: int


class OpenedNotes:
    """The last few checkpoints that a policy accepted, so that one which comes again is not verified again.

    What a policy accepted stays accepted: time only adds cosignatures that were from the future. Thread-safe.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._accepted: OrderedDict[bytes, AcceptedCheckpoint] = OrderedDict()
        self._lock = threading.Lock()
        self.shown: tuple[LoggedEntry, WitnessedEntry] | None = None  # proved under this policy, last of all

    def open(self, note: bytes, *, now: int) -> AcceptedCheckpoint:
        """As `Policy.open`; only what has its quorum is remembered."""
        with self._lock:
            accepted = self._accepted.get(note)
        if accepted is None:
            accepted = self._policy.open(note, now=now)
            if accepted.quorum.satisfied:
                with self._lock:
                    self._accepted[note] = accepted
                    while len(self._accepted) > _KEPT_NOTES:
                        self._accepted.popitem(last=False)
        return accepted


@lru_cache(maxsize=4)
def _decoded(leaf: bytes) -> Entry:
    """Read a leaf once for all sites of this process: each is shown the same entry of a round."""
    return decode_entry(leaf)


class History:
    """Reads logged entries by the site's own policy; what it returns is believed, all else is refused."""

    def __init__(self, notes: OpenedNotes, statement_keys: Sequence[VerifyKey], clock: Clock) -> None:
        """`statement_keys`: this site's present one and those before it."""
        self._notes, self._statement_keys, self._clock = notes, tuple(statement_keys), clock
        self._proved: SiteStatement | None = None  # the last one: it is asked about twice

    def witnessed(self, logged: LoggedEntry, kept: Body | None = None) -> WitnessedEntry:
        """Prove an entry; `kept` is a body that it may be about, which is then not read again.

        Raises:
            RefusedError: unwitnessed_history; bad proof, another log, or fewer witnesses than the quorum.
        """
        shown = self._notes.shown
        if shown is not None and shown[0].leaf is logged.leaf and shown[0].proof is logged.proof:
            return shown[1]
        leaf_hash = hash_leaf(logged.leaf)
        try:
            accepted = verify_tlog_proof(
                logged.proof, leaf_hash=leaf_hash, policy=self._notes, now=int(self._clock().timestamp())
            )
            entry = None if kept is None else decode_entry_of(logged.leaf, kept)
            entry = entry or _decoded(logged.leaf)
        except AuditError as error:
            raise RefusedError("unwitnessed_history", f"{error.code}: {error}") from error
        if not accepted.quorum.satisfied:
            quorum = accepted.quorum
            raise RefusedError(
                "unwitnessed_history",
                f"{quorum.have} of {quorum.need} witnesses cosigned; missing {', '.join(quorum.missing)}",
            )
        found = WitnessedEntry(entry.body, leaf_hash.hex(), logged.proof.leaf_index)
        if kept is None:  # else it is one site's own
            self._notes.shown = (logged, found)
        return found

    def round_ended(
        self, logged: LoggedEntry | None, *, run: str, numbers: range
    ) -> tuple[RoundCompleted | RoundAbandoned, str]:
        """Return the witnessed entry of a round's end, with a number in `numbers`, and its leaf hash.

        Raises:
            RefusedError: unwitnessed_history, or round_out_of_order when it is another round's entry.
        """
        if logged is None:
            raise RefusedError("unwitnessed_history", f"nothing shows how round {numbers[-1]} ended")
        found = self.witnessed(logged)
        if not isinstance(found.body, (RoundCompleted, RoundAbandoned)):
            raise RefusedError(
                "unwitnessed_history", f"the entry shown for round {numbers[-1]} is no end of a round"
            )
        if found.body.run != run or found.body.round not in numbers:
            raise RefusedError(
                "round_out_of_order",
                f"the entry is round {found.body.round} of run {found.body.run}, not {numbers[-1]} of {run}",
            )
        return found.body, found.leaf_hash

    def run_ended(self, logged: LoggedEntry) -> str:
        """Return the run that a witnessed entry says is over.

        Raises:
            RefusedError: unwitnessed_history; it is no end of a run.
        """
        found = self.witnessed(logged)
        if not isinstance(found.body, (RunCompleted, RunFailed)):
            raise RefusedError("unwitnessed_history", "the entry shown as the end of a run is none")
        return found.body.run

    def own_statement(
        self, logged: LoggedEntry, kept: SiteStatement | None = None
    ) -> tuple[SiteStatement, str, bool]:
        """Return a witnessed statement of this site, its leaf hash, and whether it is in a round.

        `kept` is one from the site's own ledger: where it is the same, signature and all, it was signed here.

        Raises:
            RefusedError: unwitnessed_history; it is no statement, or this site never signed it.
        """
        found = self.witnessed(logged, kept)
        if isinstance(found.body, SiteStatement):
            statement, in_round = found.body, True
        elif isinstance(found.body, SiteUndelivered):
            statement, in_round = found.body.statement, False
        else:
            raise RefusedError("unwitnessed_history", "the entry shown as this site's statement is none")
        if statement == kept:
            self._proved = statement = kept
        self.verify_own(statement)
        return statement, found.leaf_hash, in_round

    def verify_own(self, statement: SiteStatement) -> None:
        """Prove that this site signed the statement.

        Raises:
            RefusedError: unwitnessed_history; it did not.
        """
        if statement is self._proved:
            return
        domain, payload = signing_payload(statement)
        problem: AuditError | None = None
        for key in self._statement_keys:
            try:
                key.verify(domain, payload, decode_signature(statement.signature))
            except AuditError as error:
                problem = error
            else:
                self._proved = statement
                return
        raise RefusedError("unwitnessed_history", f"a statement this site never signed: {problem}")

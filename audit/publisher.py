"""The one process that publishes a log's checkpoints, and its fail-over.

`Publisher.step` is one turn: take or prolong the lease, and when the log grew, or has been idle for
`republish_s`, sign and store its checkpoint. Who takes the lease over from somebody else first adopts the
largest tree that this log has published, from the database and from wherever witnesses show what they
cosigned: a signer that slept, with an old state, cannot fork the log. A lost lease refuses what the old
holder still wants to store.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Final

from audit.checkpoints import parse_checkpoint_note
from audit.errors import AuditError, LogKeyError, SignerBusyError, SignerError
from audit.lease import Lease
from audit.ledger import Ledger
from audit.notes import open_note
from audit.signer import Signer, publish
from audit.tlog_policy import Policy

LEASE: Final = "signer"
LEASE_TTL_S: Final = 5.0
REPUBLISH_S: Final = 600.0
_POLL_S: Final = 0.02

Notes = Callable[[], Iterable[bytes]]


class Publisher:
    """Publishes for one ledger with one signer. Safe to use from several threads."""

    def __init__(
        self,
        ledger: Ledger,
        signer: Signer,
        *,
        ttl_s: float = LEASE_TTL_S,
        republish_s: float = REPUBLISH_S,
        policy: Policy | None = None,
        views: Iterable[Notes] = (),
        announce: Callable[[bytes], None] | None = None,
        counts: Callable[[str, int], None] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Prepare; nothing is taken yet.

        Args:
            ttl_s: how long a silent holder keeps the lease. policy: with it, fail-over looks for the largest
            checkpoint that its witnesses cosigned, not only for the largest that the log signed.
            views: notes from outside the database, such as what witnesses last cosigned; one that raises
            stops the fail-over.
            announce: told of every checkpoint that is published or republished.
            counts: raises `LogKeyError` for a key (vkey) that does not count on a tree of this size: what a
            thief signed with an ended key is not ours.
        """
        self.ledger, self.signer = ledger, signer
        self._ttl_s, self._republish_s = ttl_s, republish_s
        self._policy, self._views, self._announce = policy, tuple(views), announce
        self._clock, self._counts = clock, counts
        self._turn = threading.Lock()
        self._lease: tuple[int, Lease] | None = None
        self._keeps = self._held = False
        self._alone = 0  # how many are in `keeping`

    @property
    def lease(self) -> Lease:
        """This process's view of the lease; a forked child has one of its own."""
        if self._lease is None or self._lease[0] != os.getpid():
            owner = f"{os.getpid()}-{secrets.token_hex(8)}"
            self._lease = (os.getpid(), self.ledger.lease(LEASE, owner, ttl_s=self._ttl_s))
        return self._lease[1]

    def step(self) -> bytes | None:
        """Take one turn and keep the lease; return the checkpoint that was published, if one was.

        Raises:
            SignerError: the log does not extend what was signed.
            LeaseLostError: another process took over in the middle.
            AuditError: as the ledger and the key.
        """
        with self._turn:
            self._keeps = True
            if not self._lead():
                return None
            try:
                return self._publish(idle_too=True)
            except SignerError:  # who may not sign keeps nobody from it who may
                self.lease.release()
                raise

    def publish(self, timeout_s: float = 10.0) -> bytes:
        """Return a checkpoint of at least the present tree: our own, or that of whoever holds the lease.

        Raises:
            SignerBusyError: another process holds the lease and publishes nothing.
            AuditError: as `step`.
        """
        wanted = self.ledger.tree_size
        deadline = time.monotonic() + timeout_s
        while True:
            with self._turn:
                if self._lead():
                    try:
                        return self._publish() or self.ledger.latest_checkpoint() or b""
                    except SignerError:  # who may not sign keeps nobody from it who may
                        if self._alone:
                            self.lease.release()
                        raise
                    finally:
                        self._let_go()
            note = self.ledger.latest_checkpoint()
            if note is not None and parse_checkpoint_note(note).tree_size >= wanted:
                return note
            if time.monotonic() >= deadline:
                raise SignerBusyError(f"another process signs for the log, but not within {timeout_s} s")
            time.sleep(_POLL_S)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Keep the lease from one `publish` to the next: for whoever is alone with a log and publishes often.

        Nobody else takes over in between, and so there is nothing to adopt. One that publishes no more for as
        long as the lease lasts has lost it, as any other holder has.
        """
        with self._turn:
            self._alone += 1
        try:
            yield
        finally:
            with self._turn:
                self._alone -= 1
                if self._is_mine():
                    self._let_go()

    @property
    def leads(self) -> bool:
        """Whether this process held the lease at its last turn."""
        return self._keeps and self._is_mine() and self._held

    def close(self) -> None:
        """Give the lease back, so that the next process need not wait for its end."""
        with self._turn:
            self._keeps = False
            if self._is_mine() and self.lease.token:
                self.lease.release()

    def _is_mine(self) -> bool:
        """Whether this process ever asked for the lease: a forked child never did."""
        return self._lease is not None and self._lease[0] == os.getpid()

    def _let_go(self) -> None:
        """Give the lease back, unless `step` or `keeping` keeps it."""
        if not self._keeps and not self._alone:
            self.lease.release()

    def _lead(self) -> bool:
        before = self.lease.token
        self._held = self.lease.acquire()
        if not self._held:
            return False
        if self.lease.token != before:
            try:
                self._take_over()
            except BaseException:
                self.lease.release()
                self.lease.token, self._held = 0, False
                raise
        return True

    def _take_over(self) -> None:
        for note in self._largest():
            self.signer.adopt(note, self.ledger)

    def _largest(self) -> list[bytes]:
        """Return the largest published tree's note of each source."""
        found = [self.ledger.latest_checkpoint(self._is_ours)]
        if self._policy is not None:
            found.append(self.ledger.latest_checkpoint(self._is_witnessed))
        for view in self._views:
            ours = [note for note in view() if self._is_ours(note)]
            found.append(max(ours, key=lambda note: parse_checkpoint_note(note).tree_size, default=None))
        return [note for note in found if note is not None]

    def _is_ours(self, note: bytes) -> bool:
        try:
            opened = open_note(note, self.signer.verifiers)
            checkpoint = parse_checkpoint_note(note)
        except AuditError:
            return False
        if checkpoint.origin != self.ledger.origin:
            return False
        return any(self._does_count(line.verifier.vkey, checkpoint.tree_size) for line in opened.signatures)

    def _does_count(self, vkey: str, tree_size: int) -> bool:
        try:
            if self._counts is not None:
                self._counts(vkey, tree_size)
        except LogKeyError as error:
            return error.code == "log.key_unknown"  # its entry is not written yet
        return True

    def _is_witnessed(self, note: bytes) -> bool:
        assert self._policy is not None  # noqa: S101 - asked for only with one
        try:
            quorum = self._policy.open(note, now=int(self._clock())).quorum
        except AuditError:
            return False
        return quorum.satisfied and quorum.need > 0

    def _publish(self, *, idle_too: bool = False) -> bytes | None:
        last, size = self.ledger.latest_checkpoint(self._is_ours), self.ledger.tree_size
        grew = last is None or parse_checkpoint_note(last).tree_size < size
        if not grew and not (idle_too and self._is_due()):
            return None
        if grew:
            self.ledger.warm(size)  # what the proof is made of, in one look
        note = publish(self.ledger, self.signer, self.lease)
        if self._announce is not None:
            self._announce(note)
        return note

    def _is_due(self) -> bool:
        state = self.lease.state()
        if state is None:
            return True
        age_ms = state.now_ms - state.published_ms  # below zero once the clock was set back
        return not 0 <= age_ms < self._republish_s * 1000

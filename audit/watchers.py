"""The witnesses that a log's own policy file names with an address: what they saw, and what they are offered.

Before a process signs for a log that somebody else signed for until now, it asks them what they cosigned
last (`seen`): neither an old database nor an old signer's state can hide a tree from them. Every new
checkpoint is offered to them in C2SP `add-checkpoint` (`offer`). Nothing that a witness answers is believed
for who sent it: notes and lines are judged by their signatures.
"""

from __future__ import annotations

import logging
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Final

from audit.checkpoints import parse_checkpoint_note
from audit.errors import AuditError, WitnessesUnreachableError
from audit.notes import MAX_NOTE_BYTES, SignatureLine, open_note, parse_note
from audit.tlog_policy import NO_QUORUM, Policy, PolicyWitness
from audit.witness_request import AddCheckpoint, monitoring_name

_logger = logging.getLogger(__name__)

TIMEOUT_S: Final = 5.0
_MAX_THREADS: Final = 16
_CHUNK: Final = 1 << 14

Prover = Callable[[int, int], Sequence[bytes]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What a witness answered; the body is at most one note long."""

    status: int
    body: bytes


class Watchers:
    """The reachable witnesses of one policy. Safe to use from several threads."""

    def __init__(self, policy: Policy, origin: str, *, timeout_s: float = TIMEOUT_S) -> None:
        self.policy, self.origin, self.timeout_s = policy, origin, timeout_s
        self.reachable = tuple(w for w in policy.witnesses if w.url.startswith(("http://", "https://")))
        self._sizes: dict[str, int] = {}  # where each one's next proof starts, as far as we know

    def seen(self) -> list[bytes]:
        """Return the notes that the witnesses cosigned last.

        Raises:
            WitnessesUnreachableError: those that did not answer could be a quorum by themselves, so a tree
                may be witnessed that nobody told us of.
        """
        answered: list[str] = []
        notes: list[bytes] = []
        for witness, reply in self._ask_all(self._last_cosigned):
            if reply is None or reply.status not in (200, 404):
                continue
            answered.append(witness.name)
            if reply.status == 200:
                notes.append(reply.body)
        self._check_answered(answered)
        return notes

    def offer(self, note: bytes, prove: Prover) -> list[bytes]:
        """Offer one checkpoint to every witness; return the good signature lines that came back.

        `prove(old, new)` is the log's consistency proof. Who does not answer is asked again with the next
        checkpoint; who refuses is logged.
        """
        size = parse_checkpoint_note(note).tree_size
        lines: list[bytes] = []

        def ask(witness: PolicyWitness) -> Reply | None:
            return self._add_checkpoint(witness, note, size, prove)

        for witness, reply in self._ask_all(ask):
            if reply is None:
                continue
            found = _lines_of(witness, note, reply.body) if reply.status == 200 else []
            if found:
                self._sizes[witness.name] = size
                lines += found
            else:
                said = reply.body[:200].decode("utf-8", "replace").strip()
                _logger.warning(
                    "witness %s does not cosign size %d: %d %s", witness.name, size, reply.status, said
                )
        return lines

    def _check_answered(self, answered: Sequence[str]) -> None:
        policy = self.policy
        if policy.quorum == NO_QUORUM:
            return
        silent = [witness.name for witness in policy.witnesses if witness.name not in answered]
        if not policy.evaluate(silent).satisfied:
            return
        missing = tuple(w.name for w in self.reachable if w.name not in answered)
        if missing:
            raise WitnessesUnreachableError(missing)
        if self.reachable:
            _logger.warning(
                "the witnesses without an address are a quorum by themselves: what they cosigned is not asked"
            )

    def _ask_all(
        self, ask: Callable[[PolicyWitness], Reply | None]
    ) -> list[tuple[PolicyWitness, Reply | None]]:
        if not self.reachable:
            return []
        with ThreadPoolExecutor(min(len(self.reachable), _MAX_THREADS), "witness") as pool:
            return list(zip(self.reachable, pool.map(ask, self.reachable), strict=True))

    def _last_cosigned(self, witness: PolicyWitness) -> Reply | None:
        return self._call(f"{witness.url.rstrip('/')}/{monitoring_name(self.origin)}/checkpoint", None)

    def _add_checkpoint(self, witness: PolicyWitness, note: bytes, size: int, prove: Prover) -> Reply | None:
        url = f"{witness.url.rstrip('/')}/add-checkpoint"
        old = self._sizes.get(witness.name, 0)
        reply: Reply | None = None
        for _ in range(2):  # once more from the size that a conflict tells
            if old > size:
                return reply
            proof = tuple(prove(old, size)) if 0 < old < size else ()
            reply = self._call(url, AddCheckpoint(old_size=old, proof=proof, note=note).format())
            if reply is None or reply.status != 409:
                return reply
            told = reply.body.strip()
            if not told.isdigit() or len(told) > 19:
                return reply
            old = int(told)
        return reply

    def _call(self, url: str, body: bytes | None) -> Reply | None:
        """One request within the time limit; None when nobody answers, or at too great length."""
        try:
            request = urllib.request.Request(url, data=body)  # noqa: S310 - `reachable` are http(s)
            request.add_header("Content-Type", "text/plain; charset=utf-8")
            until = time.monotonic() + self.timeout_s
            try:
                answer = _opener.open(request, timeout=self.timeout_s)
            except urllib.error.HTTPError as error:
                answer = error
            with answer:
                parts: list[bytes] = []
                while part := answer.read1(_CHUNK):
                    parts.append(part)
                    if sum(map(len, parts)) > MAX_NOTE_BYTES or time.monotonic() > until:
                        raise OSError("the answer is too long or too slow")
                return Reply(int(answer.status or 0), b"".join(parts))
        except (OSError, ValueError, HTTPException) as error:
            _logger.warning("%s does not answer: %s", url, error)
            return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A witness stands at its address; whoever redirects is not asked further."""

    def redirect_request(self, *_: object, **__: object) -> None:
        return None


_opener: Final = urllib.request.build_opener(_NoRedirect)


def _lines_of(witness: PolicyWitness, note: bytes, body: bytes) -> list[bytes]:
    """The lines of an answer that are this witness's good signatures over the note."""
    text = parse_note(note).text
    found = []
    for line in body.splitlines(keepends=True):
        try:
            SignatureLine.parse(line)
            open_note(text + b"\n" + line, [witness.verifier])
        except AuditError:
            continue
        found.append(line)
    return found

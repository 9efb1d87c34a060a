"""What the agent enters into the site's own log, each thing once, before its answer leaves."""

from __future__ import annotations

from audit.canonical import parse_canonical
from audit.entries import (
    CharterSigned,
    RunAccepted,
    SiteEnrolled,
    SiteStatement,
    body_document,
    event_hash,
    parse_body,
)
from clients.errors import LedgerBehindError
from clients.ledger import Odometers, Release, Reservation
from clients.site_log import Diary, event_id


class SiteStory:
    """Writes one site's side of the story."""

    def __init__(self, log: Diary, ledger: Odometers) -> None:
        self._log, self._ledger = log, ledger
        self._enrolled: SiteEnrolled | None = log.latest(SiteEnrolled)

    def catch_up(self, population: str) -> None:
        """Enter the releases that a crash kept out of the log; the ledger is written first.

        Raises:
            LedgerBehindError: the log holds a release that the ledger lacks: an old copy was put back.
        """
        entered, held = self._log.count(SiteStatement), self._ledger.head(population).sequence
        if entered > held:
            raise LedgerBehindError(
                population=population, ledger=held, seen=entered, witness="the site's own log"
            )
        if entered < held:
            for release in self._ledger.releases(population)[entered:]:
                self.released(release)

    def enrolled(self, body: SiteEnrolled) -> None:
        if self._enrolled is None or body_document(body) != body_document(self._enrolled):
            self._log.append(body)
            self._enrolled = body

    def signed(self, body: CharterSigned) -> None:
        self._log.append(body, event_id=event_id("charter.signed", body.digest, body.author))

    def accepted(self, reservation: Reservation) -> None:
        body = parse_body(RunAccepted, parse_canonical(reservation.acceptance))
        self._log.append(body, event_id=event_id("run.accepted", body.run, body.start))

    def released(self, release: Release) -> None:
        self._log.append(
            release.statement, event_id=event_id("site.statement", event_hash(release.statement))
        )

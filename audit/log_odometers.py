"""The odometers of a whole log: every release of every population, whatever any evidence file leaves out.

An operator who lets a site's odometer start over can show each file one of its histories. Not the log: here
all statements are walked, under the keys that the log's own enrolments give.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from audit.entries import Body, RunAccepted, SiteEnrolled, SiteStatement, SiteUndelivered
from audit.errors import AuditError
from audit.verify.chain import FailError, Leaf, Outcome
from audit.verify.members import check_enrolment
from audit.verify.odometer import walk
from audit.verify.report import Word

WALKED: Final = ("run.accepted", "site.enrolled", "site.statement", "site.undelivered")


def check_log_odometers(entries: Iterable[tuple[int, str, Body]], origin: str) -> Outcome:
    """Walk all entries of the `WALKED` types, in index order, each as (index, leaf hash, body).

    Raises:
        FailError: an event is missing, repeated or out of its chain, one population is counted by two
        sites, or an identity key moved to another population; names the entry.
    """
    populations = _Populations(origin)
    for index, leaf_hash, body in entries:
        if isinstance(body, SiteEnrolled):
            populations.enrol(Leaf(index, leaf_hash, body))
        elif isinstance(body, RunAccepted):
            populations.claim(body.site, body.population, index)
        elif isinstance(body, SiteStatement):
            populations.release(Leaf(index, leaf_hash, body))
        elif isinstance(body, SiteUndelivered):
            populations.release(Leaf(index, leaf_hash, body.statement))
    counted = populations.count()
    return Outcome(
        word=Word.PROVED,
        detail=f"{sum(counted.values())} releases of {len(counted)} populations, each counted once, signed "
        "under the keys that the log enrols, chained by hash from each population's first",
    )


class _Populations:
    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._enrolments: dict[str, list[Leaf[SiteEnrolled]]] = {}
        self._holders: dict[str, str] = {}
        self._of_identity: dict[str, str] = {}
        self._releases: dict[str, list[Leaf[SiteStatement]]] = {}

    def enrol(self, leaf: Leaf[SiteEnrolled]) -> None:
        body = leaf.body
        check_enrolment(leaf, self._origin)
        if self._of_identity.setdefault(body.identity_key, body.population) != body.population:
            raise FailError(
                "site.population_changed",
                f"site {body.site} enrolled the same identity key for another population, whose odometer "
                "starts over",
                leaf.index,
            )
        self.claim(body.site, body.population, leaf.index)
        self._enrolments.setdefault(body.site, []).append(leaf)

    def claim(self, site: str, population: str, entry: int) -> None:
        holder = self._holders.setdefault(population, site)
        if holder != site:
            raise FailError(
                "odometer.population_shared",
                f"sites {site} and {holder} each count releases of one population as their own",
                entry,
            )

    def release(self, leaf: Leaf[SiteStatement]) -> None:
        body = leaf.body
        self.claim(body.site, body.population, leaf.index)
        if self._enrolment_at(leaf).population != body.population:
            raise FailError(
                "site.population_changed",
                f"site {body.site} counts for another population than it enrolled",
                leaf.index,
            )
        self._releases.setdefault(body.population, []).append(leaf)

    def count(self) -> dict[str, int]:
        """Return the number of releases by population, once all chains are walked."""
        return {
            population: len(
                walk(
                    self._holders[population],
                    events,
                    key_of=lambda leaf: self._enrolment_at(leaf).statement_key,
                    gap=_gap,
                )
            )
            for population, events in self._releases.items()
        }

    def _enrolment_at(self, leaf: Leaf[SiteStatement]) -> SiteEnrolled:
        before = [
            found.body for found in self._enrolments.get(leaf.body.site, ()) if found.index < leaf.index
        ]
        if not before:
            raise FailError(
                "site.not_enrolled", f"no enrolment of site {leaf.body.site} before this release", leaf.index
            )
        return before[-1]


def _gap(wanted: int, leaf: Leaf[SiteStatement]) -> AuditError:
    what = f"site {leaf.body.site}: event {wanted} is nowhere in the log, the next is {leaf.body.sequence}"
    return FailError("odometer.gap", what, leaf.index)

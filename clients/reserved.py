"""What open runs may still release: the part of their reservations that is not used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from audit.entries import MechanismEvent

if TYPE_CHECKING:
    from clients.ledger import Odometers, Reservation  # which ask this module


def committed_events(ledger: Odometers, population: str) -> tuple[MechanismEvent, ...]:
    """Return the events that any new plan comes on top of; see `SiteLedger.committed_events`."""
    spent = ledger.spent(population)
    events = [release.event for release in spent]
    for reservation in ledger.open_reservations(population):
        events += unused(reservation, [release.event for release in spent if release.run == reservation.run])
    return tuple(events)


def unused(reservation: Reservation, used: Sequence[MechanismEvent]) -> list[MechanismEvent]:
    """Return what of a run's reservation is not used, in order.

    Each release takes away the first event of its kind: a site may have missed a round that was abandoned.
    """
    left = list(reservation.planned)
    for release in used:
        if release in left:
            left.remove(release)
    return left

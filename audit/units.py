"""One release, counted for whom it concerns: for a row or a subject, or for a site as a whole.

An event's `unit` says whose contribution its sensitivity bounds. Where that is the site, nothing bounds one
row by itself: the row is covered as a part of its site and by no more. With another row in its place the
site sends another update of at most the same length, so the two are up to two lengths apart, which is the
distance of `replace_one` whatever the charter's relation is. Where the unit is a row or a subject, a site is
bounded only by an event that says so (`site_sensitivity_grid`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from audit.bodies import MechanismEvent
from audit.shared_noise import site_level

SITE = "site"


def row_level(event: MechanismEvent, unit: str = "row") -> MechanismEvent:
    """Return the event as it counts for one row or subject; one that counts them already is left alone."""
    if event.unit != SITE:
        return event
    lengths = 1 if event.relation == "replace_one" else 2
    return replace(
        event, unit=unit, relation="replace_one", sensitivity_grid=lengths * event.sensitivity_grid
    )


def counted_for(events: Sequence[MechanismEvent], unit: str) -> list[MechanismEvent] | None:
    """Return the events as they count for one `unit`; None where one of them bounds nothing of it."""
    if unit != SITE:
        return [row_level(event, unit) for event in events]
    if any(event.unit != SITE and event.site_sensitivity_grid < 1 for event in events):
        return None
    return [event if event.unit == SITE else site_level(event) for event in events]


def of_people(events: Sequence[MechanismEvent]) -> list[MechanismEvent]:
    """Return the events as they count for the people behind a population: in the unit of a row or subject,
    whichever the other events have.
    """
    units = {event.unit for event in events} - {SITE}
    unit = units.pop() if len(units) == 1 else "row"
    return [row_level(event, unit) for event in events]


def runs_of(events: Sequence[MechanismEvent]) -> list[tuple[MechanismEvent, int]]:
    """Return events with how often each comes, one after the other: those of a plan are mostly alike."""
    runs: list[tuple[MechanismEvent, int]] = []
    for event in events:
        if runs and (runs[-1][0] is event or runs[-1][0] == event):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((event, 1))
    return runs


def runs_of_people(events: Sequence[MechanismEvent]) -> tuple[tuple[MechanismEvent, int], ...]:
    """Return the runs of events as they count for the people behind a population."""
    runs = runs_of(events)
    people = of_people([event for event, _ in runs])
    return tuple([(event, count) for event, (_, count) in zip(people, runs, strict=True)])

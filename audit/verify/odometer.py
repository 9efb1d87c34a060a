"""One population's odometer: events 1 to n, each naming the one before by hash, each release counted once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from audit.entries import ZERO_DIGEST, SiteStatement, event_hash
from audit.errors import AuditError
from audit.verify.chain import FailError, Leaf, expect, verify_body


def walk(
    site: str,
    events: Sequence[Leaf[SiteStatement]],
    *,
    key_of: Callable[[Leaf[SiteStatement]], str],
    gap: Callable[[int, Leaf[SiteStatement]], AuditError],
) -> tuple[SiteStatement, ...]:
    """Return the population's releases in order, each once and signed by the site.

    Args:
        events: its statements, delivered or not; a release reported as undelivered may stand there twice.
        key_of: the statement key that was in force at a leaf. gap: what to raise where an event is missing,
        from the number wanted and the leaf found instead.

    Raises:
        FailError: `odometer.sequence`, `odometer.chain`, `odometer.round_twice` or `statement.signature`.
    """
    history: list[SiteStatement] = []
    previous, rounds = ZERO_DIGEST, set[tuple[str, int]]()
    for leaf in sorted(events, key=lambda leaf: (leaf.body.sequence, leaf.index)):
        body, wanted = leaf.body, len(history) + 1
        if history and body == history[-1]:
            continue  # reported as undelivered, and delivered after all
        if body.sequence > wanted:
            raise gap(wanted, leaf)
        expect(body.sequence, wanted, code="odometer.sequence", field="event.sequence", entry=leaf.index)
        expect(body.previous_event, previous, code="odometer.chain", field="previous_event", entry=leaf.index)
        if (body.run, body.round) in rounds:
            raise FailError(
                "odometer.round_twice",
                f"site {site} released run {body.run} round {body.round} twice",
                leaf.index,
            )
        verify_body(body, key_of(leaf), code="statement.signature", who=f"site {site}", entry=leaf.index)
        rounds.add((body.run, body.round))
        history.append(body)
        previous = event_hash(body)
    return tuple(history)

"""Part of the steps on the run: rounds that were abandoned, so that nothing hides behind that word.

A coordinator might abandon a round to have another try at the same one, or after it saw the sum. The first is
impossible: the next round has another number and debits of its own, and both stand in the odometers. The
second is found where the log holds that the sum was opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from audit.entries import RoundAbandoned, RoundCompleted, SiteStatement, SiteUndelivered
from audit.secure_bodies import RoundOpened
from audit.secure_round import SecureTerms
from audit.verify.chain import Chain, FailError, Leaf, Lost, expect


def abandoned_round(chain: Chain, run: str, number: int, leaf: Leaf[RoundAbandoned]) -> Lost:
    """Return the round that an entry says was abandoned, with the releases that sites made for it.

    Raises:
        FailError: it is another round's entry, its sum was opened or its model exists, or a site released for
        it on another model or another history.
    """
    body = leaf.body
    expect(body.run, run, code="round.chain", field="run", entry=leaf.index)
    expect(body.round, number, code="round.chain", field="round", entry=leaf.index)
    others: list[Leaf[Any]] = [*chain.leaves(RoundOpened), *chain.leaves(RoundCompleted)]
    for other in others:
        if (other.body.run, other.body.round) == (run, number):
            what = "its masked sum was opened" if isinstance(other.body, RoundOpened) else "it was completed"
            problem = f"round {number} is said to be abandoned, and {what}"
            raise FailError("round.abandoned", problem, other.index)
    releases = tuple(_releases(chain, run, number))
    for release in releases:
        for field in ("base_model", "previous_round"):
            wanted = getattr(body, field)
            expect(
                getattr(release.body, field), wanted, code="round.abandoned", field=field, entry=release.index
            )
    return Lost(leaf, releases)


def lost_text(lost: Sequence[Lost]) -> str:
    """Say which rounds were abandoned."""
    if not lost:
        return ""
    named = ", ".join(f"{found.leaf.body.round} ({found.leaf.body.reason})" for found in lost[:8])
    return f"; abandoned, and counted in every odometer that has a release for it: round {named}"


def fewest_in_a_round(chain: Chain, secure: SecureTerms) -> int:
    """Return how few sites' shares may make the noise of any sum that the coordinator can have opened.

    Of an abandoned round nobody can tell whether its sum was opened unseen, by the least that suffice.
    """
    fewest = min(len(found.statements) for found in chain.rounds)
    return min(fewest, secure.least) if chain.lost else fewest


def _releases(chain: Chain, run: str, number: int) -> Iterable[Leaf[SiteStatement]]:
    for leaf in chain.leaves(SiteStatement):
        if (leaf.body.run, leaf.body.round) == (run, number):
            yield leaf
    for reported in chain.leaves(SiteUndelivered):
        statement = reported.body.statement
        if (statement.run, statement.round) == (run, number):
            yield Leaf(reported.index, reported.leaf_hash, statement)

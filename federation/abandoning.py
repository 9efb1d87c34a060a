"""A round that gave no model: what is entered of it, and what is asked before another takes its place.

What sites released for it stays debited, and is named in the log (`site.undelivered`), never given back. The
next round has a new number, new keys, new noise and debits of its own, and is built on the same model; the
charter's `spare_rounds` say how many such rounds the plan has paid for.

Order of calls: `abandon` when a round ends without a model, `regather` before the next one is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from audit.entries import RoundAbandoned, SiteEnrolled, SiteStatement, SiteUndelivered, event_hash
from federation.coordinator import Coordinator, stable_event_id
from federation.errors import StatementError
from federation.exchange import Answer, Exchange, Request
from federation.preparation import ACTOR, Prepared
from federation.run_state import Lost, RunState
from federation.statements import AcceptedUpdate, OdometerHead, RoundTerms, verify_past_statement
from federation.strategies import Strategy


def abandon(
    coordinator: Coordinator,
    terms: RoundTerms,
    accepted: Mapping[str, AcceptedUpdate],
    missing: tuple[str, ...],
    strategy: Strategy,
    prepared: Prepared,
    state: RunState,
) -> Lost:
    """Enter that the round gave no model, and put `state` before the next one, which asks the same sites."""
    rejected, not_opened = strategy.rejected, strategy.not_opened
    reason = "not_enough_sites" if not_opened is None else "not_opened"
    for site, update in accepted.items():
        state.own_leaf[site] = _write_off(coordinator, update.statement)
    for site, update in {**accepted, **strategy.too_long}.items():
        prepared.heads[site] = prepared.heads[site].after(update.statement)
    body = RoundAbandoned(
        run=terms.run,
        round=terms.round,
        reason=reason,
        missing=missing,
        base_model=terms.base_model,
        previous_round=terms.previous_round,
    )
    event_id = stable_event_id("round.abandoned", terms.run, str(terms.round))
    entered = coordinator.append(body, ACTOR, event_id)
    state.previous_round, state.round_leaf = entered.leaf_hash.hex(), entered.leaf_index
    state.logged, state.silent, state.opened = {}, set(), None
    silent = [f"site {site}: no answer in time" for site in missing if site not in rejected]
    lost = [] if not_opened is None else [str(not_opened)]
    detail = "; ".join([*lost, *(str(error) for error in rejected.values()), *silent])
    return Lost(round=terms.round, reason=reason, detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered:
    """Who is there for another round, and what was wrong with the others."""

    there: tuple[str, ...]
    problems: tuple[StatementError, ...]


def regather(
    coordinator: Coordinator,
    exchange: Exchange,
    run: str,
    number: int,
    prepared: Prepared,
    state: RunState,
    *,
    timeout_s: float,
) -> Gathered:
    """Ask the participants what they released before round `number` that never arrived, and enter it.

    A site whose release is not in the log would refuse the next round, and whoever does not answer here would
    not answer there: so a round that too few could hold need not be opened, and costs nobody anything.
    """
    asked = Request(kind="run.undelivered", header={"run": run})
    answers = exchange.ask(dict.fromkeys(state.participants, asked), timeout_s=timeout_s)
    there, problems = [], []
    for site in state.participants:
        try:
            enrolment, head = prepared.enrolments[site], prepared.heads[site]
            found = late_releases(run, number, enrolment, head, answers[site][0])
        except StatementError as error:
            problems.append(error)
            continue
        there.append(site)
        for statement in found:
            state.own_leaf[site] = _write_off(coordinator, statement)
            prepared.heads[site] = prepared.heads[site].after(statement)
    return Gathered(there=tuple(there), problems=tuple(problems))


def late_releases(
    run: str, before: int, enrolment: SiteEnrolled, head: OdometerHead, answer: Answer
) -> tuple[SiteStatement, ...]:
    """Return what a site says that it released for the run before round `before` and behind `head`, in order.

    Raises:
        StatementError: it did not say, or what it said does not hold.
    """
    site, named = enrolment.site, answer.header.get("undelivered")
    if answer.failure or not isinstance(named, list):
        raise StatementError(site, "undelivered", answer.failure or "is no list")
    said = [verify_past_statement(site, enrolment, document) for document in named]
    found = []
    for statement in sorted(said, key=lambda one: one.sequence):
        if statement.run != run or statement.round >= before or statement.sequence <= head.sequence:
            continue  # of another run, of the round that comes, or known already
        if (statement.sequence, statement.previous_event) != (head.sequence + 1, head.event_hash):
            problem = f"event {statement.sequence} does not follow {head.sequence}"
            raise StatementError(site, "undelivered", problem)
        head = head.after(statement)
        found.append(statement)
    return tuple(found)


def _write_off(coordinator: Coordinator, statement: SiteStatement) -> int:
    body = SiteUndelivered(statement=statement)
    event_id = stable_event_id("site.undelivered", event_hash(statement))
    return coordinator.append(body, f"site:{statement.site}", event_id).leaf_index

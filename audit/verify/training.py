"""Steps on the run: how it began, what each site signed in each round, and that the rounds form one chain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from audit.charter_view import CharterView
from audit.entries import (
    ZERO_DIGEST,
    RoundAbandoned,
    RoundCompleted,
    RunAccepted,
    RunStarted,
    SiteStatement,
    run_digest,
)
from audit.models import initial_weights, model_file
from audit.round_bodies import RunResumed
from audit.verify.chain import (
    Chain,
    FailError,
    GapError,
    Leaf,
    Lost,
    Outcome,
    Round,
    expect,
    need,
    verify_body,
)
from audit.verify.history import CHECKPOINT, LINKS
from audit.verify.lost_rounds import abandoned_round, fewest_in_a_round, lost_text
from audit.verify.masked import check_rosters
from audit.verify.members import CHARTER, SITES
from audit.verify.report import Word

RUN, ROUNDS, NOISE = "The training run", "The rounds and their statements", "The noise and the data"


def check_run(chain: Chain) -> Outcome:
    """The run's author signed it, it starts from the charter's weights, and its sites accepted it."""
    charter, started = need(chain.charter, CHARTER), need(chain.started, LINKS)
    completed = need(chain.completed, LINKS)
    if not chain.enrolments:
        need(None, SITES)
    body, at = started.body, started.index
    verify_body(body, body.author, code="run.signature", who="the run's author", entry=at)
    expect(body.rounds, charter.rounds, code="run.rounds", field="rounds", entry=at)
    expect(completed.body.rounds, charter.rounds, code="run.rounds", field="rounds", entry=completed.index)
    first = hashlib.sha256(_initial_model(charter)).hexdigest()
    expect(body.initial_model, first, code="run.initial_model", field="initial_model", entry=at)
    _check_sites(charter, body.sites, at)
    for leaf in chain.leaves(RunAccepted):
        if leaf.body.run == body.run:
            _check_acceptance(chain, charter, started, leaf)
    if len(chain.accepted) < charter.minimum_sites:
        raise GapError(
            "run.acceptance_missing",
            f"acceptances of {len(chain.accepted)} sites; the charter needs {charter.minimum_sites}",
            at,
        )
    return Outcome(
        word=Word.PROVED,
        detail=f"run {body.run} by {body.author}, from the weights the charter gives; accepted by "
        f"{', '.join(sorted(chain.accepted))}",
    )


def check_rounds(chain: Chain) -> Outcome:
    """Backwards by hashes from the run's last round: every round, every statement, nothing besides."""
    charter, started, completed = (
        need(chain.charter, CHARTER),
        need(chain.started, LINKS),
        need(chain.completed, LINKS),
    )
    if not chain.accepted:
        need(None, RUN)
    ends: list[Round | Lost] = []
    named, entry = completed.body.last_round, completed.index
    last = chain.linked(named, RoundCompleted, "the last round's entry", entry=entry).body.round
    if not charter.rounds <= last <= charter.most_rounds:
        problem = f"the last round is {last}; the charter has {charter.rounds} to {charter.most_rounds}"
        raise FailError("run.rounds", problem, entry)
    for number in range(last, 0, -1):
        found = _end(chain, charter, started.body, number, named, entry)
        ends.append(found)
        named, entry = _before(found)
    expect(named, ZERO_DIGEST, code="round.chain", field="previous_round of round 1", entry=entry)
    ends.reverse()
    rounds = [found for found in ends if isinstance(found, Round)]
    lost = [found for found in ends if isinstance(found, Lost)]
    expect(len(rounds), charter.rounds, code="run.rounds", field="completed rounds", entry=completed.index)
    _check_models(started.body.initial_model, ends)
    _check_nothing_besides(chain, started.body.run, ends)
    resumed = _check_resumes(chain, ends)
    chain.rounds, chain.lost = tuple(rounds), tuple(lost)
    count = sum(len(found.statements) for found in rounds)
    return Outcome(
        word=Word.PROVED,
        detail=f"rounds 1 to {last} without a gap, each on the model before it{lost_text(lost)}; {count} "
        "statements signed "
        "by the sites' statement keys, each with the charter's noise, sampling and clipping terms" + resumed,
    )


def check_noise(chain: Chain) -> Outcome:
    """What nobody can prove from outside: say so, and whose word it is."""
    charter = need(chain.charter, CHARTER)
    if not chain.rounds:
        need(None, ROUNDS)
    codes = sorted({leaf.body.agent_code for found in chain.rounds for leaf in found.statements})
    sites = sorted({leaf.body.site for found in chain.rounds for leaf in found.statements})
    clipped = (
        "each site's whole update was clipped" if charter.privacy.unit == "site" else "rows were clipped"
    )
    shared = ""
    if charter.secure is not None:
        fewest = fewest_in_a_round(chain, charter.secure)
        shared = (
            f"; the noise is whole only as the sum of {charter.secure.sharers} honest sites' shares: as long "
            f"as at most {charter.secure.colluders(fewest)} of the {fewest} or more in a round "
            "collude with the coordinator"
        )
    return Outcome(
        word=Word.ATTESTED,
        detail=f"by the statement keys of {', '.join(sites)}: that {clipped} and the noise was "
        f"drawn, and "
        f"what the rows were; agent code {', '.join(code[:16] + '…' for code in codes[:4])}{shared}",
    )


def evaluation_statements(chain: Chain, run: str) -> list[Leaf[SiteStatement]]:
    """Return the run's statements of counts, one release after the last round, where the charter asks."""
    charter = need(chain.charter, CHARTER)
    if charter.evaluation is None:
        return []
    number = charter.most_rounds + 1
    return [leaf for leaf in chain.leaves(SiteStatement) if (leaf.body.run, leaf.body.round) == (run, number)]


def reference_statements(chain: Chain, run: str) -> list[Leaf[SiteStatement]]:
    """Return the run's statements of a sketch, its last release, where the charter asks for one."""
    charter = need(chain.charter, CHARTER)
    if charter.serving.reference is None:
        return []
    wanted = (run, charter.releases)
    return [leaf for leaf in chain.leaves(SiteStatement) if (leaf.body.run, leaf.body.round) == wanted]


def check_statement(chain: Chain, leaf: Leaf[SiteStatement], wanted: Mapping[str, object]) -> None:
    """One statement: signed by the site's key of that time, after its acceptance, and of these fields.

    Raises:
        FailError: names the field.
    """
    body, entry = leaf.body, leaf.index
    enrolment = chain.enrolment_at(body.site, entry).body
    verify_body(
        body, enrolment.statement_key, code="statement.signature", who=f"site {body.site}", entry=entry
    )
    accepted = chain.accepted.get(body.site)
    if accepted is None or accepted.index >= entry:
        raise FailError("statement.not_accepted", f"site {body.site} had not accepted the run", entry)
    for field, value in {"population": accepted.body.population, **wanted}.items():
        expect(getattr(body, field), value, code="statement.field", field=field, entry=entry)


def _initial_model(charter: CharterView) -> bytes:
    return model_file(charter.layers, initial_weights(charter.layers, charter.digest))


def _check_sites(charter: CharterView, sites: Sequence[str], entry: int) -> None:
    if list(sites) != sorted(set(sites)) or not set(sites) <= set(charter.site_names):
        raise FailError(
            "run.sites", f"sites {', '.join(sites)[:80]} are not sites of the charter, in order", entry
        )
    if len(sites) < charter.minimum_sites:
        raise FailError("run.sites", f"{len(sites)} sites; the charter needs {charter.minimum_sites}", entry)


def _check_acceptance(
    chain: Chain, charter: CharterView, started: Leaf[RunStarted], leaf: Leaf[RunAccepted]
) -> None:
    body = leaf.body
    if leaf.index <= started.index:
        raise FailError(
            "verify.order", f"site {body.site} accepted the run before this start of it", leaf.index
        )
    if body.site not in started.body.sites or body.site in chain.accepted:
        raise FailError("run.acceptance", f"site {body.site} was not asked, or accepted twice", leaf.index)
    enrolment = chain.enrolment_at(body.site, leaf.index).body
    wanted = {
        "charter": charter.digest,
        "start": run_digest(started.body),
        "origin": need(chain.checkpoint, CHECKPOINT).origin,
        "population": enrolment.population,
        "planned_events": charter.releases,
    }
    for field, value in wanted.items():
        expect(getattr(body, field), value, code="run.acceptance", field=field, entry=leaf.index)
    key = enrolment.statement_key
    verify_body(body, key, code="run.acceptance", who=f"site {body.site}", entry=leaf.index)
    chain.accepted[body.site] = leaf


def _end(
    chain: Chain, charter: CharterView, run: RunStarted, number: int, leaf_hash: str, entry: int
) -> Round | Lost:
    located = chain.by_hash.get(leaf_hash)
    if located is not None and isinstance(located.body, RoundAbandoned):
        leaf = chain.linked(leaf_hash, RoundAbandoned, f"round {number}'s entry", entry=entry)
        return abandoned_round(chain, run.run, number, leaf)
    return _round(chain, charter, run, number, leaf_hash, entry)


def _before(found: Round | Lost) -> tuple[str, int]:
    """Return the leaf hash of the entry of the round before, and the leaf that names it."""
    if isinstance(found, Lost):
        return found.leaf.body.previous_round, found.leaf.index
    return found.statements[0].body.previous_round, found.statements[0].index


def _round(
    chain: Chain, charter: CharterView, run: RunStarted, number: int, leaf_hash: str, entry: int
) -> Round:
    leaf = chain.linked(leaf_hash, RoundCompleted, f"round {number}'s entry", entry=entry)
    body = leaf.body
    expect(body.run, run.run, code="round.chain", field="run", entry=leaf.index)
    expect(body.round, number, code="round.chain", field="round", entry=leaf.index)
    statements = tuple(
        chain.linked(name, SiteStatement, f"a statement of round {number}", entry=leaf.index)
        for name in body.leaves
    )
    sites = [statement.body.site for statement in statements]
    if sites != sorted(set(sites)):
        raise FailError("round.sites", f"round {number} counts a site twice, or out of order", leaf.index)
    if len(sites) < charter.minimum_sites:
        raise FailError(
            "round.sites",
            f"round {number} has {len(sites)} statements, not {charter.minimum_sites}",
            leaf.index,
        )
    participants = statements[0].body.participants
    if not set(participants) <= set(chain.accepted):
        raise FailError(
            "round.sites", f"round {number} asked a site that had not accepted the run", leaf.index
        )
    if sorted([*sites, *body.missing]) != list(participants):
        raise FailError(
            "round.sites",
            f"round {number}: those who answered and those missing are not who took part",
            leaf.index,
        )
    previous = statements[0].body.previous_round
    for statement in statements:
        _check_statement(chain, charter, run, body, statement, participants, previous)
    found = Round(leaf, statements)
    check_rosters(charter.secure, found)
    return found


def _check_statement(
    chain: Chain,
    charter: CharterView,
    run: RunStarted,
    completed: RoundCompleted,
    leaf: Leaf[SiteStatement],
    participants: tuple[str, ...],
    previous: str,
) -> None:
    wanted = {
        "run": run.run,
        "round": completed.round,
        "charter": charter.digest,
        "base_model": completed.base_model,
        "participants": participants,
        "previous_round": previous,
    }
    check_statement(chain, leaf, wanted)
    problem = charter.event_problem(leaf.body.event)
    if problem:
        raise FailError("statement.event", problem, leaf.index)


def _check_models(initial: str, ends: Sequence[Round | Lost]) -> None:
    """Each round is built on the last model there was, by those who gave it; a lost one changes neither."""
    base, participants, before = initial, None, -1
    for found in ends:
        leaf = found.leaf
        expect(leaf.body.base_model, base, code="round.base_model", field="base_model", entry=leaf.index)
        if isinstance(found, Lost):
            before = leaf.index
            continue
        if min(statement.index for statement in found.statements) <= before:
            raise FailError("verify.order", "a statement stands before the round it builds on", leaf.index)
        asked = found.statements[0].body.participants
        if participants is not None and asked != participants:
            raise FailError(
                "round.sites", "those asked are not those who answered the round before", leaf.index
            )
        base, before = found.leaf.body.output_model, leaf.index
        participants = tuple(statement.body.site for statement in found.statements)


def _check_resumes(chain: Chain, ends: Sequence[Round | Lost]) -> str:
    """Each time that the run was taken up again, it went on from where its own rounds had left it.

    Raises:
        FailError: it was taken up outside its life, at another round, or from another model.
    """
    charter = need(chain.charter, CHARTER)
    started, completed = need(chain.started, LINKS), need(chain.completed, LINKS)
    resumes = [leaf for leaf in chain.leaves(RunResumed) if leaf.body.run == started.body.run]
    for leaf in resumes:
        body, entry = leaf.body, leaf.index
        if not started.index < entry < completed.index:
            raise FailError("verify.order", "the run was resumed before it began or after it ended", entry)
        done = [found for found in ends if found.leaf.index < entry]
        models = [found.leaf.body.output_model for found in done if isinstance(found, Round)]
        wanted = {
            "charter": charter.digest,
            "round": len(done) + 1,
            "previous_round": done[-1].leaf.leaf_hash if done else ZERO_DIGEST,
            "base_model": models[-1] if models else started.body.initial_model,
        }
        for field, value in wanted.items():
            expect(getattr(body, field), value, code="run.resumed", field=field, entry=entry)
    if not resumes:
        return ""
    rounds_text = ", ".join(str(leaf.body.round) for leaf in resumes[:8])
    often = "once" if len(resumes) == 1 else f"{len(resumes)} times"
    return f"; taken up again {often}, at round {rounds_text}, each from the model before it"


def _check_nothing_besides(chain: Chain, run: str, ends: Sequence[Round | Lost]) -> None:
    known = {found.leaf.index for found in ends}
    for found in ends:
        counted = found.statements if isinstance(found, Round) else found.releases
        known |= {statement.index for statement in counted}
    known |= {leaf.index for leaf in evaluation_statements(chain, run)}
    known |= {leaf.index for leaf in reference_statements(chain, run)}
    others: list[Leaf[Any]] = [*chain.leaves(RoundCompleted), *chain.leaves(RoundAbandoned)]
    for leaf in others:
        if leaf.body.run == run and leaf.index not in known:
            raise FailError(
                "round.invented", f"another entry for round {leaf.body.round} of the run", leaf.index
            )
    for statement in chain.leaves(SiteStatement):
        if statement.body.run == run and statement.index not in known:
            what = f"site {statement.body.site}'s statement for round {statement.body.round} is in no round"
            raise FailError("round.statement_left_out", what, statement.index)

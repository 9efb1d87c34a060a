"""Before the first round: who is there, who signed the charter, who accepts the run. Everything becomes an
entry.

Entries: site.enrolled, charter.published, charter.signed, run.started, run.accepted, and site.undelivered
for releases that a site debited earlier and that never reached their round. A step already in the log is
not written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from audit.entries import (
    CharterPublished,
    CharterSigned,
    RunAccepted,
    RunStarted,
    SiteEnrolled,
    SiteStatement,
    SiteUndelivered,
    body_document,
    event_hash,
)
from audit.packing import pack_text
from federation.charter import Charter
from federation.coordinator import Addition, Coordinator, stable_event_id
from federation.errors import FederationError, ReplyError, SiteRefusedError, StatementError
from federation.exchange import Answer, Exchange, Request
from federation.mechanism import planned_events
from federation.patience import PATIENCE_S, WAITING, ask_patiently, is_waiting
from federation.statements import (
    OdometerHead,
    refusal_event_id,
    verify_acceptance,
    verify_charter_signature,
    verify_enrolment,
    verify_past_statement,
    verify_refusal,
)
from federation.witnessing import Witnessing

ACTOR = "coordinator"
PREPARE_TIMEOUT_S = 60.0

_SHOWN = 20
_A_SITE_S = 0.5  # many virtual sites share one machine's cores

Waiting = Callable[[tuple[str, ...]], None]


@dataclass(slots=True)
class Prepared:
    """Who takes part, with the keys and odometers that their statements are checked against."""

    sites: tuple[str, ...]
    enrolments: dict[str, SiteEnrolled]
    heads: dict[str, OdometerHead]
    failed: dict[str, FederationError]


def record_charter(coordinator: Coordinator, charter: Charter, author: str) -> str:
    """Publish the charter's canonical bytes, once; return the author that it is published with."""
    for _, published in coordinator.bodies(CharterPublished):
        if published.digest == charter.digest:
            return published.author
    plain, packed = pack_text(charter.canonical().decode())
    body = CharterPublished(digest=charter.digest, canonical=plain, author=author, packed=packed)
    coordinator.append(body, ACTOR, stable_event_id("charter.published", charter.digest))
    return author


def record_charter_signatures(coordinator: Coordinator, bodies: Sequence[CharterSigned]) -> None:
    """Write proved signatures of one charter together, each once a site, in the order given."""
    if bodies:
        known = signed_by(coordinator, bodies[0].digest)
        coordinator.append_all(
            [(body, f"site:{body.site}", None) for body in bodies if body.site not in known]
        )


def signed_by(coordinator: Coordinator, digest: str) -> set[str]:
    """Return the sites whose signature of the charter is in the log."""
    return {body.site for _, body in coordinator.bodies(CharterSigned) if body.digest == digest}


def connect_sites(
    coordinator: Coordinator, exchange: Exchange, charter: Charter, only: tuple[str, ...] = ()
) -> Prepared:
    """Find the members, prove their enrolments and record them; who is not there has failed, and why.

    With `only` nobody else is looked for.
    """
    wanted = only or charter.site_names
    answers = exchange.discover(wanted)
    prepared = Prepared(sites=(), enrolments={}, heads={}, failed={})
    known, fresh = coordinator.enrolments(), list[SiteEnrolled]()
    for name in wanted:
        try:
            if name not in answers:
                raise ReplyError(name, "is not connected; start its agent and relay, or check its name")
            enrolment = answers[name].header.get("enrolment")
            body = verify_enrolment(name, charter.site(name).identity, coordinator.origin, enrolment)
        except FederationError as error:
            prepared.failed[name] = error
            continue
        if name not in known or body_document(known[name]) != body_document(body):
            fresh.append(body)
        prepared.enrolments[name] = body
    coordinator.append_all([(body, f"site:{body.site}", None) for body in fresh])
    return prepared


def gather_signatures(
    coordinator: Coordinator,
    exchange: Exchange,
    charter: Charter,
    author: str,
    prepared: Prepared,
    *,
    patience_s: float = PATIENCE_S,
    waiting: Waiting | None = None,
) -> None:
    """Let every member that has not yet signed the charter sign it, and that `author` drew it up.

    Without all of them there is no charter. A member whose people decide is asked again for `patience_s`.

    Raises:
        SiteRefusedError: a member declined.
        ReplyError, StatementError: a member is not there, or its signature does not verify.
    """
    missing = set(charter.site_names) - signed_by(coordinator, charter.digest)
    for name in sorted(missing & set(prepared.failed)):
        raise prepared.failed[name]
    header = {"charter": charter.canonical().decode(), "author": author}
    request = Request(kind="charter.sign", header=header)
    answers = ask_patiently(
        exchange,
        dict.fromkeys(sorted(missing), request),
        timeout_s=prepare_timeout_s(charter),
        patience_s=patience_s,
        waiting=waiting,
    )
    signed: list[CharterSigned] = []
    try:
        for name in sorted(missing):
            answer = answers[name][0]
            if "signature" not in answer.header:
                raise SiteRefusedError(name, str(answer.header.get("error", answer.failure or "bad reply")))
            signature, identity = answer.header["signature"], charter.site(name).identity
            signed.append(verify_charter_signature(name, identity, charter.digest, author, signature))
    finally:
        record_charter_signatures(coordinator, signed)


def propose_run(
    coordinator: Coordinator,
    exchange: Exchange,
    charter: Charter,
    run_started: RunStarted,
    prepared: Prepared,
    witnessing: Witnessing,
    *,
    accepted: Mapping[str, RunAccepted] | None = None,
    patience_s: float = PATIENCE_S,
    waiting: Waiting | None = None,
) -> None:
    """Ask every connected member to reserve the run's whole plan, those whose people decide again and again.

    Acceptances, refusals and undelivered releases become entries; `prepared.sites` are those that accepted.
    `accepted` are the acceptances of a run that is resumed: they are asked for again, and must be the same.
    """
    coordinator.append(run_started, ACTOR, stable_event_id("run.started", run_started.run))
    before = accepted or {}
    history = SiteHistory.read(coordinator, before_run="" if before else run_started.run)
    ends, requests = last_ends(coordinator), {}
    for name in sorted(prepared.enrolments):
        header: dict[str, Any] = {
            "run_started": body_document(run_started),
            "charter": charter.canonical().decode(),
        }
        last = history.last_leaf.get((name, prepared.enrolments[name].population))
        if last is not None and witnessing.covers(last):
            header["own_statement"] = witnessing.logged(last)
        over = ends.get(name)
        if over is not None and witnessing.covers(over):
            header["ended"] = witnessing.logged(over)
        requests[name] = Request(kind="run.propose", header=header)
    answers = ask_patiently(
        exchange, requests, timeout_s=prepare_timeout_s(charter), patience_s=patience_s, waiting=waiting
    )
    joined: list[str] = []
    entries: list[Addition] = []
    for name in sorted(requests):
        enrolment, answer = prepared.enrolments[name], answers[name][0]
        try:
            prepared.heads[name] = _accept(
                entries, charter, run_started, enrolment, answer, history, before.get(name)
            )
        except FederationError as error:
            prepared.failed[name] = error
            continue
        joined.append(name)
    coordinator.append_all(entries)
    prepared.sites = (*prepared.sites, *joined)


def _accept(
    entries: list[Addition],
    charter: Charter,
    run_started: RunStarted,
    enrolment: SiteEnrolled,
    answer: Answer,
    history: SiteHistory,
    before: RunAccepted | None,
) -> OdometerHead:
    """Prove one answer; put what becomes of it into `entries`, return where the site's odometer stands."""
    site, run = enrolment.site, run_started.run
    if "refusal" in answer.header:
        refusal = verify_refusal(site, enrolment, answer.header["refusal"])
        entries.append((refusal, f"site:{site}", refusal_event_id(run, 0, refusal)))
        raise SiteRefusedError(site, refusal.reason)
    if is_waiting(answer):
        raise SiteRefusedError(site, WAITING)
    if answer.failure or "acceptance" not in answer.header:
        raise ReplyError(site, answer.failure or "sent no acceptance")
    releases = len(planned_events(charter))
    acceptance = verify_acceptance(site, enrolment, run_started, releases, answer.header["acceptance"])
    if before is not None and before != acceptance:
        raise StatementError(site, "acceptance", "is another than the one in the log")
    key = (site, enrolment.population)
    undelivered = answer.header.get("undelivered", [])
    if not isinstance(undelivered, list):
        raise ReplyError(site, "undelivered is no list")
    past = [verify_past_statement(site, enrolment, document) for document in undelivered]
    fresh = sorted(
        (statement for statement in past if event_hash(statement) not in history.known),
        key=lambda s: s.sequence,
    )
    head = history.heads.get(key, OdometerHead())
    for statement in fresh:
        if (statement.sequence, statement.previous_event) != (head.sequence + 1, head.event_hash):
            raise StatementError(
                site, "undelivered", f"event {statement.sequence} does not follow {head.sequence}"
            )
        head = head.after(statement)
    starts = (acceptance.next_sequence, acceptance.previous_event)
    if before is None and starts != (head.sequence + 1, head.event_hash):
        raise StatementError(
            site,
            "next_sequence",
            f"starts at event {acceptance.next_sequence}, log and reported releases end at {head.sequence}",
        )
    if before is None:
        entries.append((acceptance, f"site:{site}", stable_event_id("run.accepted", run, site)))
    for statement in fresh:
        body = SiteUndelivered(statement=statement)
        entries.append((body, f"site:{site}", stable_event_id("site.undelivered", event_hash(statement))))
    return head


def last_ends(coordinator: Coordinator) -> dict[str, int]:
    """Return, by site, the leaf that says how the last run ended that it accepted; none while that is open.

    A site that was away then holds its population for that run until it is shown this.
    """
    last, over = dict[str, str](), dict[str, int]()
    for stored, entry in coordinator.entries(type=["run.accepted", "run.completed", "run.failed"]):
        body: Any = entry.body
        if isinstance(body, RunAccepted):
            last[body.site] = body.run
        else:
            over[body.run] = stored.leaf_index
    return {site: over[run] for site, run in last.items() if run in over}


@dataclass(slots=True)
class SiteHistory:
    """Every statement in the log, by population: where its odometer stands and which leaf says so."""

    heads: dict[tuple[str, str], OdometerHead]
    last_leaf: dict[tuple[str, str], int]
    known: set[str]

    @classmethod
    def read(cls, coordinator: Coordinator, *, before_run: str) -> SiteHistory:
        """Read the log without the statements of `before_run`, which is "" to leave none out."""
        history = cls({}, {}, set())
        for stored, entry in coordinator.entries(type=["site.statement", "site.undelivered"]):
            body: Any = entry.body
            statement: SiteStatement = body.statement if isinstance(body, SiteUndelivered) else body
            key = (statement.site, statement.population)
            if statement.run == before_run:
                continue
            history.known.add(event_hash(statement))
            head = history.heads.get(key, OdometerHead())
            if statement.sequence > head.sequence:
                history.heads[key] = head.after(statement)
                history.last_leaf[key] = stored.leaf_index
        return history


def failures_text(failed: Mapping[str, FederationError]) -> str:
    """Return one line that names every site that is not there, and why; of very many the first ones."""
    shown = [str(failed[name]) for name in sorted(failed)[:_SHOWN]]
    return "; ".join([*shown, *([f"and {len(failed) - _SHOWN} more"] if len(failed) > _SHOWN else [])])


def prepare_timeout_s(charter: Charter) -> float:
    """Return how long the members may take to answer before the first round."""
    return max(PREPARE_TIMEOUT_S, _A_SITE_S * len(charter.site_names))


def names(sites: Iterable[str]) -> str:
    return ", ".join(sorted(sites))

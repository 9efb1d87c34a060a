"""What log and files say of a run that was begun: everything that going on with it needs.

The log is the checkpoint. `RunPast.read` collects the run's entries; `replay` makes every completed round's
step again from the kept updates and compares the result, bit for bit, with what the log says came out; so
weights, optimiser and average stand where they stood. Of the round that was broken off, releases that are in
the log are taken from there, and the sites whose are not are asked again: they answer with the same bytes.
A release that was written off as undelivered stays out, and stays debited. A round that was abandoned is
over: its number is not opened again.

Order of calls: `RunPast.read`, `replay`, then the round loop from `next_round` on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from audit.checkpoints import parse_checkpoint_note
from audit.entries import (
    ZERO_DIGEST,
    RoundAbandoned,
    RoundCompleted,
    RunAccepted,
    RunCompleted,
    RunFailed,
    RunStarted,
    SiteStatement,
    SiteUndelivered,
    decode_entry,
    event_hash,
    parse_body,
)
from audit.errors import AuditError
from audit.ledger import Ledger, StoredEntry
from audit.round_bodies import RoundExamined, RunEvaluated, RunReferenced, RunResumed, UpdateRefused
from audit.secure_bodies import RoundOpened
from audit.weights import decode_update
from federation import registry
from federation.anomaly import record_view
from federation.blobs import BlobStore
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.errors import BlobAlteredError, BlobMissingError, NotFoundError, ResumeError
from federation.flat import Vector, model_bytes, update_vector
from federation.preparation import Prepared, SiteHistory
from federation.run_state import LoggedRelease, Lost, RunState
from federation.statements import AcceptedUpdate, OdometerHead
from federation.strategies import Strategy

RESTORE = "restore the coordinator's home from a backup that is not older than the log"


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """What a run was prepared with."""

    charter: Charter
    charter_author: str
    started: RunStarted


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRound:
    """A completed round and the releases that it counted, by site, in the order of the sites' names."""

    completed: RoundCompleted
    leaf_index: int
    leaf_hash: str
    releases: Mapping[str, LoggedRelease]


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonedRound:
    """A round that gave no model; the next one has another number, and is built on the same model."""

    body: RoundAbandoned
    leaf_index: int
    leaf_hash: str


@dataclass(slots=True)
class RunPast:
    """One run's entries, in order; `started` is None where the log knows no such run."""

    run: str
    started: RunStarted | None = None
    accepted: dict[str, RunAccepted] = field(default_factory=dict)
    rounds: list[PastRound] = field(default_factory=list)
    statements: dict[tuple[int, str], LoggedRelease] = field(default_factory=dict)
    written_off: dict[tuple[int, str], LoggedRelease] = field(default_factory=dict)
    refused: dict[tuple[int, str], UpdateRefused] = field(default_factory=dict)
    examined: set[int] = field(default_factory=set)
    opened: dict[int, RoundOpened] = field(default_factory=dict)  # masked rounds
    abandoned: dict[int, AbandonedRound] = field(default_factory=dict)
    evaluated: RunEvaluated | None = None
    referenced: RunReferenced | None = None
    resumed: list[RunResumed] = field(default_factory=list)
    ended: RunCompleted | RunFailed | None = None
    accepted_leaf: int = -1  # of the last acceptance
    published_size: int = 0  # of the log's last checkpoint

    @classmethod
    def read(cls, ledger: Ledger, run: str) -> RunPast:
        """Read the log.

        Raises:
            ResumeError: it tells two stories of the run.
        """
        note = ledger.latest_checkpoint()
        past, after = cls(run), -1
        past.published_size = 0 if note is None else parse_checkpoint_note(note).tree_size
        while page := ledger.search(run=run, after=after, limit=1000):
            for row in page:
                after = row.leaf_index
                past._take(row, decode_entry(row.body).body)
        return past

    @property
    def next_round(self) -> int:
        return len(self.rounds) + len(self.abandoned) + 1

    @property
    def last_end(self) -> PastRound | AbandonedRound | None:
        """How the last round ended; None before the first one did."""
        ends: list[PastRound | AbandonedRound] = [*self.rounds[-1:], *list(self.abandoned.values())[-1:]]
        return max(ends, key=lambda end: end.leaf_index, default=None)

    @property
    def last_leaf_hash(self) -> str:
        return ZERO_DIGEST if self.last_end is None else self.last_end.leaf_hash

    def participants(self, minimum_sites: int) -> tuple[str, ...]:
        """Return who the next round asks; () where the run has yet to find its sites.

        In round 1 that is whoever accepted, once a checkpoint was published behind the last acceptance: from
        then on sites may have released for exactly these names. Before that nobody was asked, and all are.
        """
        if self.rounds:
            return tuple(self.rounds[-1].releases)
        for release in (*self.statements.values(), *self.written_off.values()):
            if release.statement.run == self.run:
                return release.statement.participants
        may_be_asked = self.published_size > self.accepted_leaf
        return tuple(sorted(self.accepted)) if may_be_asked and len(self.accepted) >= minimum_sites else ()

    def open_releases(self, charter: Charter) -> dict[str, LoggedRelease]:
        """Return the releases of the round that was broken off, as far as the log holds them."""
        return self.release_of(self.open_round(charter))

    def release_of(self, number: int) -> dict[str, LoggedRelease]:
        return {site: release for (of, site), release in sorted(self.statements.items()) if of == number}

    def open_written_off(self, charter: Charter) -> dict[str, LoggedRelease]:
        """Return the releases of that round that were written off; their sites are asked no more."""
        number = self.open_round(charter)
        return {site: release for (of, site), release in sorted(self.written_off.items()) if of == number}

    def open_refused(self, charter: Charter) -> dict[str, UpdateRefused]:
        """Return the updates of that round that were refused for their length."""
        opened = self.open_round(charter)
        return {site: body for (number, site), body in self.refused.items() if number == opened}

    def open_round(self, charter: Charter) -> int:
        """The number of the release that was broken off; what follows the rounds has numbers of its own."""
        if len(self.rounds) < charter.plan.rounds:
            return self.next_round
        return charter.most_rounds + 1 + (self.evaluated is not None)

    def _take(self, row: StoredEntry, body: Any) -> None:
        place: dict[str, Any] = {"leaf_index": row.leaf_index, "leaf_hash": row.leaf_hash.hex()}
        if isinstance(body, RunStarted):
            self._once(self.started is None, "it starts twice")
            self.started = body
        elif isinstance(body, RunAccepted):
            self.accepted[body.site], self.accepted_leaf = body, row.leaf_index
        elif isinstance(body, SiteStatement):
            key = (body.round, body.site)
            self._once(key not in self.statements, f"site {body.site} stated round {body.round} twice")
            self.statements[key] = LoggedRelease(statement=body, **place)
        elif isinstance(body, SiteUndelivered):
            statement = body.statement
            self.written_off[statement.round, statement.site] = LoggedRelease(statement=statement, **place)
        elif isinstance(body, UpdateRefused):
            self.refused[body.round, body.site] = body
        elif isinstance(body, RoundCompleted):
            self._once(body.round == self.next_round, f"round {body.round} is not its next one")
            self.rounds.append(PastRound(completed=body, releases=self._counted(body), **place))
        elif isinstance(body, RoundExamined):
            self.examined.add(body.round)
        elif isinstance(body, RoundOpened):
            self.opened[body.round] = body
        elif isinstance(body, RoundAbandoned):
            if body.round not in self.abandoned:  # an older release could say it twice
                self._once(body.round == self.next_round, f"round {body.round} is not its next one")
                self.abandoned[body.round] = AbandonedRound(body=body, **place)
        elif isinstance(body, RunEvaluated):
            self.evaluated = body
        elif isinstance(body, RunReferenced):
            self.referenced = body
        elif isinstance(body, RunResumed):
            self.resumed.append(body)
        elif isinstance(body, (RunCompleted, RunFailed)):
            self.ended = self.ended or body

    def _counted(self, body: RoundCompleted) -> dict[str, LoggedRelease]:
        by_hash = {
            release.leaf_hash: release
            for (number, _), release in self.statements.items()
            if number == body.round
        }
        self._once(set(body.statements) <= set(by_hash), f"round {body.round} counts what is not in it")
        return {by_hash[leaf].statement.site: by_hash[leaf] for leaf in body.statements}

    def _once(self, holds: bool, problem: str) -> None:
        if not holds:
            raise ResumeError(
                self.run, f"the log tells two stories of it: {problem}", "run `affidavit log fsck`"
            )


def prepared_run(coordinator: Coordinator, run: str) -> PreparedRun:
    """Return what a run was prepared with: from the log once it was begun there, else from the home's file.

    Raises:
        HomeError: no run of that id was prepared here.
    """
    ledger = coordinator.ledger
    for _, started in registry.bodies(ledger, RunStarted, run=run):
        try:
            text, author = registry.charter_text(ledger, started.charter)
        except NotFoundError:
            break  # it ended before its charter was published
        return PreparedRun(charter=Charter.from_canonical(text), charter_author=author, started=started)
    kept = coordinator.kept_run(run)
    return PreparedRun(
        charter=Charter.from_canonical(kept["charter"]),
        charter_author=kept["charter_author"],
        started=parse_body(RunStarted, kept["run_started"]),
    )


def recall(blobs: BlobStore, run: str, release: LoggedRelease) -> AcceptedUpdate:
    """Return a logged release with the update that was kept before its statement was logged.

    Raises:
        ResumeError: the update is not here, or not what was signed.
    """
    statement = release.statement
    where = f"site {statement.site}'s update of round {statement.round}"
    try:
        update = blobs.get(statement.update)
        update_vector(update)
        return AcceptedUpdate(statement=statement, read=partial(blobs.get, statement.update), is_kept=True)
    except (BlobMissingError, BlobAlteredError, AuditError) as error:
        raise ResumeError(run, f"{where} cannot be read ({error})", RESTORE) from error


def replay(coordinator: Coordinator, charter: Charter, past: RunPast, strategy: Strategy) -> list[Vector]:
    """Bring a fresh strategy to where the run's completed rounds left it; return each round's weights.

    Raises:
        ResumeError: a round gives other weights than the log says, or an update is missing.
    """
    outputs: list[Vector] = []
    for done in past.rounds:
        number = done.completed.round
        updates = {
            site: recall(coordinator.blobs, past.run, release) for site, release in done.releases.items()
        }
        weights = strategy.repeat(updates, opened_total(coordinator.blobs, past.opened.get(number)))
        model = model_bytes(charter.layers, weights)
        if hashlib.sha256(model).hexdigest() != done.completed.output_model:
            problem = f"round {number} gives other weights than the log says"
            raise ResumeError(past.run, problem, "charter, code or log are not those of the run")
        coordinator.blobs.put(model)
        outputs.append(weights)
    return outputs


def opened_total(blobs: BlobStore, opened: RoundOpened | None) -> tuple[int, ...] | None:
    """Return the sum that a masked round was opened to, as it was kept; None where none was.

    Raises:
        ResumeError: it is not here.
    """
    if opened is None:
        return None
    try:
        return tuple(decode_update(blobs.get(opened.total)))
    except (BlobMissingError, BlobAlteredError, AuditError) as error:
        problem = f"the opened sum of round {opened.round} cannot be read ({error})"
        raise ResumeError(opened.run, problem, RESTORE) from error


def examine_last(coordinator: Coordinator, charter: Charter, past: RunPast) -> None:
    """Write the view of the last completed round's updates, where the coordinator died before it did."""
    shown = charter.aggregation is not None and charter.secure is None
    if not shown or not past.rounds or past.rounds[-1].completed.round in past.examined:
        return
    done = past.rounds[-1]
    number = done.completed.round
    seen = {
        site: recall(coordinator.blobs, past.run, release).values for site, release in done.releases.items()
    }
    for (of, site), release in past.written_off.items():
        if of == number and (of, site) in past.refused:
            seen[site] = recall(coordinator.blobs, past.run, release).values
    record_view(coordinator, charter, done.completed, seen)


def take_up(
    coordinator: Coordinator,
    charter: Charter,
    past: RunPast,
    strategy: Strategy,
    prepared: Prepared,
    connected: Collection[str],
) -> RunState:
    """Put strategy and odometers where the log says that they stood; return the state of the run.

    Raises:
        ResumeError: see `replay`.
    """
    outputs = replay(coordinator, charter, past, strategy)
    examine_last(coordinator, charter, past)
    state = RunState(
        participants=past.participants(charter.minimum_sites) or prepared.sites,
        base_model=model_bytes(charter.layers, strategy.weights),
        outputs=outputs[-charter.average_last :],
        completed=len(past.rounds),
        logged=past.open_releases(charter),
        opened=past.opened.get(past.next_round),
    )
    if past.last_end is not None:
        state.previous_round, state.round_leaf = past.last_end.leaf_hash, past.last_end.leaf_index
    if isinstance(past.last_end, AbandonedRound):
        lost = past.last_end.body
        state.lost = Lost(round=lost.round, reason=lost.reason, detail="before the run was resumed")
    releases = sorted((past.written_off | past.statements).items())
    state.own_leaf = {site: found.leaf_index for (of, site), found in releases if of < past.next_round}
    if past.evaluated is not None:
        counted = past.release_of(charter.most_rounds + 1)
        state.own_leaf |= {site: release.leaf_index for site, release in counted.items()}
    refused = past.open_refused(charter)
    state.silent = set(state.participants) - set(connected)
    for site, release in past.open_written_off(charter).items():
        if site in refused:
            state.logged.setdefault(site, release)  # it is refused again, for the same length
        elif site not in state.logged:
            state.silent.add(site)
    _set_odometers(coordinator, prepared, state)
    return state


def _set_odometers(coordinator: Coordinator, prepared: Prepared, state: RunState) -> None:
    """Give every participant the keys and the odometer that its release of this round must continue."""
    heads = SiteHistory.read(coordinator, before_run="").heads
    for site, enrolment in coordinator.enrolments().items():
        known = prepared.enrolments.setdefault(site, enrolment)
        prepared.heads.setdefault(site, heads.get((site, known.population), OdometerHead()))
    for site, release in state.logged.items():
        statement = release.statement
        prepared.heads[site] = OdometerHead(
            sequence=statement.sequence - 1, event_hash=statement.previous_event
        )


def undelivered(ledger: Ledger, run: str) -> tuple[SiteStatement, ...]:
    """Return the run's releases that were debited and reached no round; they stay debited."""
    past = RunPast.read(ledger, run)
    counted = {
        event_hash(release.statement)
        for (number, _), release in past.statements.items()
        if number not in past.abandoned
    }
    return tuple(
        release.statement
        for _, release in sorted(past.written_off.items())
        if event_hash(release.statement) not in counted
    )


def resumed_body(charter: Charter, past: RunPast, principal: str) -> RunResumed:
    """Return the entry that says where a run goes on."""
    if past.started is None:
        raise ResumeError(past.run, "the log knows no start of it", "start it again")
    return RunResumed(
        run=past.run,
        charter=charter.digest,
        round=past.next_round,
        previous_round=past.last_leaf_hash,
        base_model=past.rounds[-1].completed.output_model if past.rounds else past.started.initial_model,
        principal=principal,
    )

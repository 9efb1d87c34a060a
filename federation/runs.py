"""Runs as people see them: what the log says of each, and what it tells while it goes."""

from __future__ import annotations

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from audit.entries import (
    RoundAbandoned,
    RoundCompleted,
    RunAccepted,
    RunCompleted,
    RunFailed,
    RunStarted,
    SiteRefused,
    SiteStatement,
    SiteUndelivered,
    decode_entry,
    event_hash,
    parse_body,
)
from audit.epsilon import recompute
from audit.errors import AuditError
from audit.ledger import Ledger
from audit.round_bodies import RunResumed
from federation import registry
from federation.charter import Charter
from federation.errors import HomeError, NotFoundError, ResumeError
from federation.progress import RunEvent
from federation.run_hold import is_held

State = Literal["running", "completed", "failed", "stopped"]

_TYPES: Final = (
    "run.started",
    "run.accepted",
    "run.completed",
    "run.failed",
    "run.resumed",
    "round.completed",
    "round.abandoned",
    "site.refused",
    "site.statement",
    "site.undelivered",
)


@dataclass(slots=True)
class RunView:
    """One run. `awaited` is known only while it goes, from its journal.

    `resumable` runs have no end in the log and nobody who carries them out; `needs` says what going on takes,
    or why it cannot be. `undelivered` are releases that reached no round: they stay debited.
    """

    run: str
    model: str
    charter: str
    started: str
    rounds: int
    members: tuple[str, ...]
    state: State = "running"
    reason: str = ""
    round: int = 0  # how many gave a model
    accepted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # site -> reason
    missing: tuple[str, ...] = ()  # in the last round
    abandoned: dict[int, str] = field(default_factory=dict)  # round -> why it gave no model
    awaited: tuple[str, ...] = ()
    epsilon: dict[str, float] = field(default_factory=dict)  # by site, this run's so far
    metrics: dict[str, float] = field(default_factory=dict)  # of the last round
    weights: str = ""
    resumed: int = 0  # how often it was taken up again
    resumable: bool = False
    needs: str = ""
    undelivered: dict[str, int] = field(default_factory=dict)  # by site

    def follow(self, events: Iterable[RunEvent]) -> RunView:
        """Take in what the run's journal tells beyond the log: who is being waited for, and refusals."""
        for event in events:
            if event.kind == "asked":
                self.awaited = event.sites
            elif event.kind == "answered":
                self.awaited = tuple(name for name in self.awaited if name not in event.sites)
            elif event.kind == "refused":
                for name in event.sites:
                    self.refused.setdefault(name, event.detail)
            elif event.kind in ("round", "completed", "failed", "abandoned"):
                self.awaited = ()
        if self.state != "running":
            self.awaited = ()
        return self


@dataclass(slots=True)
class _Released:
    """One site's releases in one run, each debited once, by the hash of the event."""

    statements: dict[str, SiteStatement] = field(default_factory=dict)
    delivered: set[str] = field(default_factory=set)

    def take(self, statement: SiteStatement, *, delivered: bool) -> None:
        name = event_hash(statement)
        self.statements[name] = statement
        if delivered:
            self.delivered.add(name)

    def lost(self, abandoned: Container[int]) -> int:
        """How many reached no round that gave a model."""
        return sum(
            name not in self.delivered or statement.round in abandoned
            for name, statement in self.statements.items()
        )


def list_runs(ledger: Ledger, *, delta: float = 1e-5, run: str | None = None) -> list[RunView]:
    """Return the runs of a log, oldest first; epsilon at `delta`, by the verifier's own arithmetic."""
    found: dict[str, RunView] = {}
    released: dict[tuple[str, str], _Released] = {}
    after = -1
    while page := ledger.search(type=_TYPES, after=after, limit=500, run=run):
        for row in page:
            after = row.leaf_index
            entry = decode_entry(row.body)
            body: Any = entry.body
            if isinstance(body, RunStarted):
                found.setdefault(
                    body.run,
                    RunView(body.run, body.model, body.charter, entry.time, body.rounds, body.sites),
                )
            view = found.get((body.statement if isinstance(body, SiteUndelivered) else body).run)
            if view is not None:
                _take(view, body, released)
    for (name, site), known in released.items():
        events = [statement.event for statement in known.statements.values()]
        found[name].epsilon[site] = recompute(events, delta).value
        if lost := known.lost(found[name].abandoned):
            found[name].undelivered[site] = lost
    for view in found.values():
        if view.state == "running" and not is_held(ledger, view.run):
            _tell_resumable(ledger, view)
    return list(found.values())


def find_run(ledger: Ledger, prefix: str, *, delta: float = 1e-5, home: Path | None = None) -> RunView:
    """Return the one run whose id begins with `prefix`; with `home` also one that is only prepared there.

    A run that was submitted is in the log once its sites were asked, which can take a while.

    Raises:
        HomeError: there is none, or more than one.
    """
    matching = [view for view in list_runs(ledger, delta=delta) if view.run.startswith(prefix)]
    known = {view.run for view in matching}
    matching += [] if home is None else [view for view in prepared(home, prefix) if view.run not in known]
    if len(matching) != 1:
        raise HomeError(
            f"run {prefix}", "is not in the log" if not matching else "names several runs; give more of it"
        )
    return matching[0]


def prepared(home: Path, prefix: str = "") -> list[RunView]:
    """Return the runs that were prepared in a coordinator's home, as they are before the first entry."""
    found = []
    for path in sorted((home / "runs").glob("*.json")):
        if not path.stem.startswith(prefix):
            continue
        try:
            body = parse_body(RunStarted, json.loads(path.read_bytes())["run_started"])
        except (OSError, ValueError, KeyError, TypeError, AuditError):
            continue  # another file, or one that is being written
        found.append(RunView(body.run, body.model, body.charter, "", body.rounds, body.sites))
    return found


def _tell_resumable(ledger: Ledger, view: RunView) -> None:
    """Say what going on with a run takes that nobody carries out."""
    try:
        from federation.resume import RunPast  # brings Flower, which no list of runs needs

        past = RunPast.read(ledger, view.run)
        charter = Charter.from_canonical(registry.charter_text(ledger, view.charter)[0])
    except (ResumeError, NotFoundError) as error:
        view.needs = str(error)
        return
    view.resumable = True
    wanted = past.participants(charter.minimum_sites) or view.members
    view.needs = (
        f"round {min(past.next_round, charter.most_rounds)}: at least {charter.minimum_sites} of the sites "
        f"{', '.join(wanted)}; then `affidavit runs resume {view.run[:12]}`"
    )


def _take(view: RunView, body: Any, released: dict[tuple[str, str], _Released]) -> None:
    if isinstance(body, RunAccepted):
        view.accepted.append(body.site)
    elif isinstance(body, SiteRefused):
        view.refused[body.site] = body.reason
    elif isinstance(body, SiteStatement):
        released.setdefault((body.run, body.site), _Released()).take(body, delivered=True)
    elif isinstance(body, SiteUndelivered):
        said = body.statement
        released.setdefault((said.run, said.site), _Released()).take(said, delivered=False)
    elif isinstance(body, RunResumed):
        view.resumed += 1
    elif isinstance(body, RoundAbandoned):
        view.abandoned[body.round], view.missing = body.reason, body.missing
    elif isinstance(body, RoundCompleted):
        view.round, view.missing = view.round + 1, body.missing
        view.metrics = {metric.name: float(metric.value) for metric in body.metrics}
    elif isinstance(body, RunCompleted):
        view.state, view.weights = "completed", body.weights
    elif isinstance(body, RunFailed):
        view.state = "stopped" if body.reason == "stopped" else "failed"
        view.reason = body.reason

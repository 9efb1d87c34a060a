"""Runs as people see them: what the log says of each, and what it tells while it goes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from audit.entries import (
    RoundCompleted,
    RunAccepted,
    RunCompleted,
    RunFailed,
    RunStarted,
    SiteRefused,
    SiteStatement,
    decode_entry,
)
from audit.epsilon import recompute
from audit.ledger import Ledger
from federation.errors import HomeError
from federation.progress import RunEvent

State = Literal["running", "completed", "failed", "stopped"]

_TYPES: Final = (
    "run.started",
    "run.accepted",
    "run.completed",
    "run.failed",
    "round.completed",
    "round.abandoned",
    "site.refused",
    "site.statement",
)


@dataclass(slots=True)
class RunView:
    """One run. `awaited` is known only while it goes, from its journal."""

    run: str
    model: str
    charter: str
    started: str
    rounds: int
    members: tuple[str, ...]
    state: State = "running"
    reason: str = ""
    round: int = 0
    accepted: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # site -> reason
    missing: tuple[str, ...] = ()  # in the last round
    awaited: tuple[str, ...] = ()
    epsilon: dict[str, float] = field(default_factory=dict)  # by site, this run's so far
    metrics: dict[str, float] = field(default_factory=dict)  # of the last round
    weights: str = ""

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


def list_runs(ledger: Ledger, *, delta: float = 1e-5, run: str | None = None) -> list[RunView]:
    """Return the runs of a log, oldest first; epsilon at `delta`, by the verifier's own arithmetic."""
    found: dict[str, RunView] = {}
    events: dict[tuple[str, str], list[Any]] = {}
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
            view = found.get(body.run)
            if view is not None:
                _take(view, body, events)
    for (name, site), list_of in events.items():
        found[name].epsilon[site] = recompute(list_of, delta).value
    return list(found.values())


def find_run(ledger: Ledger, prefix: str, *, delta: float = 1e-5) -> RunView:
    """Return the one run whose id begins with `prefix`.

    Raises:
        HomeError: there is none, or more than one.
    """
    matching = [view for view in list_runs(ledger, delta=delta) if view.run.startswith(prefix)]
    if len(matching) != 1:
        raise HomeError(
            f"run {prefix}", "is not in the log" if not matching else "names several runs; give more of it"
        )
    return matching[0]


def _take(view: RunView, body: Any, events: dict[tuple[str, str], list[Any]]) -> None:
    if isinstance(body, RunAccepted):
        view.accepted.append(body.site)
    elif isinstance(body, SiteRefused):
        view.refused[body.site] = body.reason
    elif isinstance(body, SiteStatement):
        events.setdefault((body.run, body.site), []).append(body.event)
    elif isinstance(body, RoundCompleted):
        view.round, view.missing = body.round, body.missing
        view.metrics = {metric.name: float(metric.value) for metric in body.metrics}
    elif isinstance(body, RunCompleted):
        view.state, view.weights = "completed", body.weights
    elif isinstance(body, RunFailed):
        view.state = "stopped" if body.reason == "stopped" else "failed"
        view.reason = body.reason

"""Model versions as the log tells them: what was registered, who moved it where, which one is live.

Nothing is stored beside the log: a version is its version.registered entry and the transitions that follow
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from audit.entries import (
    TYPE_OF,
    ZERO_DIGEST,
    CharterPublished,
    RunCompleted,
    RunStarted,
    SiteStatement,
    SiteUndelivered,
    VersionRegistered,
    VersionTransition,
    decode_entry,
    event_hash,
)
from audit.ledger import Ledger, StoredEntry
from audit.round_bodies import RunEvaluated, RunReferenced
from federation.errors import NotFoundError

B = TypeVar("B")

CANDIDATE: Final = "candidate"
APPROVED: Final = "approved"
LIVE: Final = "live"
RETIRED: Final = "retired"
CANARY: Final = "canary"  # answers a share of the requests
SHADOW: Final = "shadow"  # is asked beside the live version; its answers are logged and told to nobody
ANSWERING: Final = frozenset({LIVE, CANARY})
ALLOWED: Final = frozenset(
    {
        (CANDIDATE, APPROVED),
        (APPROVED, LIVE),
        (LIVE, RETIRED),
        (CANDIDATE, RETIRED),
        (APPROVED, RETIRED),
        (RETIRED, LIVE),
        (APPROVED, CANARY),
        (APPROVED, SHADOW),
        (CANARY, APPROVED),
        (CANARY, LIVE),
        (CANARY, RETIRED),
        (SHADOW, APPROVED),
        (SHADOW, CANARY),
        (SHADOW, LIVE),
        (SHADOW, RETIRED),
    }
)
"""Legal moves; retired -> live is a rollback, for a version that was live before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """One move, and the leaf that says so."""

    body: VersionTransition
    leaf_index: int
    leaf_hash: str
    time: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One registered version and its history."""

    registered: VersionRegistered
    leaf_index: int
    leaf_hash: str
    time: str
    transitions: tuple[Transition, ...] = field(default=())

    @property
    def digest(self) -> str:
        return self.registered.version

    @property
    def model(self) -> str:
        return self.registered.model

    @property
    def state(self) -> str:
        return self.transitions[-1].body.to_state if self.transitions else CANDIDATE

    @property
    def was_live(self) -> bool:
        return any(transition.body.to_state == LIVE for transition in self.transitions)

    @property
    def gates_passed(self) -> bool:
        """Whether there are gates and every one passed."""
        return bool(self.registered.gates) and all(gate.passed == 1 for gate in self.registered.gates)

    def _repr_html_(self) -> str:
        from federation.rendering import version_html

        return version_html(self)


def bodies(log: Ledger, kind: type[B], **columns: Any) -> Iterator[tuple[StoredEntry, B]]:
    """Yield (stored entry, body) for every entry of a kind that matches, in index order."""
    after: int | None = None
    while True:
        page = log.search(type=TYPE_OF[kind], after=after, limit=1000, **columns)
        for stored in page:
            body = decode_entry(stored.body).body
            if isinstance(body, kind):
                yield stored, body
        if len(page) < 1000:
            return
        after = page[-1].leaf_index


def versions(log: Ledger, model: str | None = None) -> list[Version]:
    """Return every version, oldest first, of one model or of all."""
    columns = {} if model is None else {"model": model}
    moves: dict[str, list[Transition]] = {}
    for stored, body in bodies(log, VersionTransition, **columns):
        moves.setdefault(body.version, []).append(
            Transition(
                body=body,
                leaf_index=stored.leaf_index,
                leaf_hash=stored.leaf_hash.hex(),
                time=str(stored.columns.time),
            )
        )
    return [
        Version(
            registered=registered,
            leaf_index=stored.leaf_index,
            leaf_hash=stored.leaf_hash.hex(),
            time=str(stored.columns.time),
            transitions=tuple(moves.get(registered.version, ())),
        )
        for stored, registered in bodies(log, VersionRegistered, **columns)
    ]


def find_version(log: Ledger, digest: str) -> Version:
    """Return the version whose digest begins with `digest` (at least eight digits).

    Raises:
        NotFoundError: none does, or several do.
    """
    found = {v.digest: v for v in versions(log) if len(digest) >= 8 and v.digest.startswith(digest)}
    if len(found) != 1:
        raise NotFoundError("version", digest)
    return next(iter(found.values()))


def live_version(log: Ledger, model: str) -> Version | None:
    """Return the version of `model` that became live last, if one is."""
    live = [version for version in versions(log, model) if version.state == LIVE]
    return max(live, key=lambda version: version.transitions[-1].leaf_index, default=None)


def last_transition(log: Ledger, model: str) -> str:
    """Return the leaf hash of the model's latest transition; zeros when there was none."""
    latest = ZERO_DIGEST
    for stored, _ in bodies(log, VersionTransition, model=model):
        latest = stored.leaf_hash.hex()
    return latest


def charter_text(log: Ledger, digest: str) -> tuple[str, str]:
    """Return (canonical text, author's key) of a published charter; NotFoundError when it is not in the
    log.
    """
    for _, body in bodies(log, CharterPublished):
        if body.digest == digest:
            return body.text, body.author
    raise NotFoundError("charter", digest)


def run_started(log: Ledger, run: str) -> RunStarted:
    """Return the entry that began a run; NotFoundError when there is none."""
    for _, body in bodies(log, RunStarted, run=run):
        return body
    raise NotFoundError("run", run)


def run_completed(log: Ledger, run: str) -> RunCompleted:
    """Return the entry that ended a run; NotFoundError when it has not completed."""
    for _, body in bodies(log, RunCompleted, run=run):
        return body
    raise NotFoundError("completed run", run)


def run_evaluated(log: Ledger, run: str) -> RunEvaluated | None:
    """Return what the sites' released counts said of a run's weights, if its charter asked for that."""
    for _, body in bodies(log, RunEvaluated, run=run):
        return body
    return None


def run_referenced(log: Ledger, run: str) -> RunReferenced | None:
    """Return the sketch of a run's training rows, if its charter asked for one."""
    for _, body in bodies(log, RunReferenced, run=run):
        return body
    return None


def statements(log: Ledger, *, site: str | None = None, before: int | None = None) -> list[SiteStatement]:
    """Return every statement in the log once, delivered or not, by log order; of the leaves before one."""
    columns = {} if site is None else {"site": site}
    found = [(stored.leaf_index, body) for stored, body in bodies(log, SiteStatement, **columns)]
    found += [(stored.leaf_index, body.statement) for stored, body in bodies(log, SiteUndelivered, **columns)]
    ordered = [
        statement
        for index, statement in sorted(found, key=lambda pair: pair[0])
        if before is None or index < before
    ]
    return list({event_hash(statement): statement for statement in ordered}.values())

"""What may answer: each model's versions and their states, read from the log and from nowhere else.

The server keeps what it has read (its view) and decides on that. Each answer's entry names the view it rests
on, and the ledger refuses the entry when a transition came after it (`LiveModels.guard`): then the server
reads on and decides again. So an approval or a roll-back by any process counts for every entry behind it in
the log, and no request pays for a look. A transition counts only when an officer of the charter signed it, it
continues the model's chain of transitions, and it starts from the state the version is in: a row that
somebody wrote into the database is not an approval.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from collections.abc import Iterable
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING
from functools import lru_cache
from typing import Any, Final

from audit.canonical import parse_strict
from audit.decimals import parse_decimal
from audit.entries import (
    ZERO_DIGEST,
    CharterPublished,
    VersionRegistered,
    VersionTransition,
    decode_entry,
    decode_signature,
    signing_payload,
)
from audit.errors import AuditError
from audit.keys import VerifyKey, parse_public_key
from audit.ledger import Guard, Ledger
from audit.merkle import hash_leaf
from audit.runtime_bodies import VersionExported
from federation.registry import ALLOWED, ANSWERING, APPROVED, CANARY, CANDIDATE, LIVE, RETIRED, SHADOW
from server.errors import ModelNotFoundError, VersionNotFoundError

_logger = logging.getLogger(__name__)

_PAGE: Final = 500
_TYPES: Final = ("charter.published", "version.exported", "version.registered", "version.transition")
_RELEASES: Final = ("site.statement", "site.undelivered")
_ABOVE_ALL: Final = 2**53  # millionths; a whole number that JSON keeps
ALIASES: Final = ("live", "candidate")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedVersion:
    """One version as the log has it at this moment."""

    model: str
    version: str
    state: str
    registered: VersionRegistered
    registered_index: int
    registered_at: str
    charter: dict[str, Any]  # the canonical charter
    charter_digest: str
    charter_author: str
    transition: str  # leaf hash of the transition that made the present state; zeros for a candidate
    approved_by: tuple[str, ...]
    moved_index: int = -1  # of the last transition; -1: there was none
    share: int = 0  # of a canary: percent of the requests that it answers
    export: VersionExported | None = None  # its file for a runtime, as the log has it
    uncounted: tuple[str, ...]  # sites that released something in the run, and have no figure for it

    @property
    def is_answering(self) -> bool:
        """Whether an officer's signature made it answer requests that name no version."""
        return self.state in ANSWERING

    @property
    def purposes(self) -> tuple[str, ...]:
        return tuple(self.charter["purposes"])

    @property
    def epsilon_micro(self) -> int:
        """The largest epsilon that the run claims for a site, in millionths, rounded up.

        Above every limit where a figure is lacking: for a site that released something, or for so many that
        fewer are left than a round of the charter needs.
        """
        names = {site["name"] for site in self.charter["sites"]}
        costs = self.registered.costs
        counted = names & {cost.site for cost in costs}
        if self.uncounted or len(counted) < max(1, self.charter["plan"]["minimum_sites"]):
            return _ABOVE_ALL
        return max(_micro(cost.run_epsilon) for cost in costs)

    @property
    def epsilon_limit_micro(self) -> int:
        return int(parse_decimal(self.charter["privacy"]["epsilon"]) * 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    """Who answers for one model."""

    first: ServedVersion  # the live version, else the newest
    live: ServedVersion | None
    canary: ServedVersion | None
    candidate: ServedVersion | None  # the newest that is neither live nor retired
    shadows: tuple[ServedVersion, ...]


class LiveModels:
    """The models of one log."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._read_to = 0
        self._charters: dict[str, tuple[dict[str, Any], str]] = {}  # digest -> charter, author
        self._versions: dict[tuple[str, str], ServedVersion] = {}
        self._heads: dict[str, str] = {}  # model -> leaf hash of its last transition
        self._routes: dict[str, _Route] = {}
        self._lock = threading.Lock()

    @property
    def guard(self) -> Guard:
        """The present view, for the append of an entry that rests on it."""
        return Guard(_TYPES, self._read_to - 1)

    def confirm(self, guard: Guard, leaf_index: int) -> None:
        """Take note that the ledger accepted an entry under `guard`: nothing of ours lies before it."""
        with self._lock:
            if guard.after <= self._read_to - 1 < leaf_index:
                self._read_to = leaf_index + 1

    def refresh(self) -> bool:
        """Read the entries that came since the last call; say whether any counts here."""
        with self._lock:
            size, found = self._ledger.tree_size, False
            if size <= self._read_to:
                return False
            cursor = self._read_to - 1
            while True:
                page = self._ledger.search(type=_TYPES, after=cursor, limit=_PAGE)
                for row in page:
                    self.take(row.leaf_index, row.body)
                    cursor, found = row.leaf_index, True
                if len(page) < _PAGE:
                    break
            if found:
                self._routes = _routes(self._versions.values())
            self._read_to = max(size, cursor + 1)
            return found

    def models(self) -> tuple[str, ...]:
        self.refresh()
        return tuple(sorted({model for model, _ in list(self._versions)}))

    def versions(self, model: str) -> tuple[ServedVersion, ...]:
        """Return the model's versions, newest first.

        Raises:
            ModelNotFoundError: the log registers no version of that name.
        """
        self.refresh()
        found = [version for version in list(self._versions.values()) if version.model == model]
        if not found:
            raise ModelNotFoundError(f"no model {model!r} is registered; GET /v1/models lists the names")
        return tuple(sorted(found, key=lambda version: -version.registered_index))

    def version(self, model: str, digest: str) -> ServedVersion:
        for version in self.versions(model):
            if version.version == digest:
                return version
        raise VersionNotFoundError(f"model {model!r} has no version {digest}")

    def answering(self, model: str, version: str | None = None) -> ServedVersion:
        """Return the version that would answer by the log as it is now; errors as `choose`."""
        self.refresh()
        return self.choose(model, version)

    def choose(self, model: str, version: str | None = None, *, draw: bool = False) -> ServedVersion:
        """Return, in the present view, the version that answers.

        Args:
            version: a digest, or an alias: "live", or "candidate" (the newest neither live nor retired).
            draw: whether a canary may take its share. By chance alone: were it by the request's id, which the
                caller may set, then whoever met the canary once could come back to it, or keep away.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is nothing of that name.
        """
        route = self._routes.get(model)
        if route is None:
            self.refresh()
            route = self._routes.get(model)
        if route is None:
            raise ModelNotFoundError(f"no model {model!r} is registered; GET /v1/models lists the names")
        if version is None:
            canary = route.canary
            if canary is not None and draw and secrets.randbelow(100) < canary.share:
                return canary
            return route.first
        if version == "live":
            if route.live is None:
                raise VersionNotFoundError(f"model {model!r} has no live version now")
            return route.live
        if version == "candidate":
            if route.candidate is None:
                raise VersionNotFoundError(f"model {model!r} has no candidate now")
            return route.candidate
        found = self._versions.get((model, version))
        return found if found is not None else self.version(model, version)

    def instead_of(self, canary: ServedVersion) -> ServedVersion | None:
        """Return, in the present view, the live version beside which a canary is tried; None: none."""
        route = self._routes.get(canary.model)
        return route.live if route is not None and canary.state == CANARY else None

    def in_use(self) -> frozenset[tuple[str, str]]:
        """Return (version, charter) of all that answers, a canary, or is asked beside what answers."""
        versions = list(self._versions.values())
        return frozenset(
            (found.version, found.charter_digest)
            for found in versions
            if found.is_answering or found.state == SHADOW
        )

    def shadows(self, model: str) -> tuple[ServedVersion, ...]:
        """Return, in the present view, the versions that are asked beside the one that answers."""
        route = self._routes.get(model)
        return route.shadows if route is not None else ()

    def known(self, model: str, version: str | None) -> ServedVersion | None:
        """The version, or else what would answer, as far as the log was read."""
        if version:
            return self._versions.get((model, version))
        found = [served for served in self._versions.values() if served.model == model]
        found.sort(key=lambda served: (not served.is_answering, -served.registered_index))
        return found[0] if found else None

    def charters_in_force(self) -> tuple[dict[str, Any], ...]:
        """The charters of what is live, as far as the log was read; where nothing is, all of them."""
        live = {found.charter_digest for found in self._versions.values() if found.is_answering}
        return tuple(found for digest, (found, _) in self._charters.items() if digest in live or not live)

    def take(self, index: int, data: bytes) -> None:
        """Take one entry; what is malformed, or no valid transition, does not count."""
        try:
            entry = decode_entry(data)
        except AuditError as error:
            _logger.error("entry %d is not readable and does not count: %s", index, error)
            return
        match entry.body:
            case CharterPublished() as body:
                text = body.text.encode()
                document = parse_strict(text)
                if isinstance(document, dict) and hashlib.sha256(text).hexdigest() == body.digest:
                    self._charters[body.digest] = document, body.author
            case VersionRegistered() as body:
                published = self._charters.get(body.charter)
                if published is None or (body.model, body.version) in self._versions:
                    _logger.error("entry %d registers a version without its charter, or twice", index)
                    return
                self._versions[body.model, body.version] = ServedVersion(
                    model=body.model,
                    version=body.version,
                    state=CANDIDATE,
                    registered=body,
                    registered_index=index,
                    registered_at=entry.time,
                    charter=published[0],
                    charter_digest=body.charter,
                    charter_author=published[1],
                    transition=ZERO_DIGEST,
                    approved_by=(),
                    uncounted=self._uncounted(body, published[0], index),
                )
            case VersionTransition() as body:
                self._move(index, hash_leaf(data).hex(), body)
            case VersionExported() as body:
                found = self._versions.get((body.model, body.version))
                if found is None or found.export is not None or found.charter_digest != body.charter:
                    _logger.error("entry %d exports a version that is not registered, or twice", index)
                    return
                self._versions[body.model, body.version] = replace(found, export=body)
            case _:
                return

    def _uncounted(self, body: VersionRegistered, charter: dict[str, Any], index: int) -> tuple[str, ...]:
        """Return the charter's sites without a figure that made a release in the run before leaf `index`.

        A site that stayed silent has none, and cost nothing.
        """
        silent = {site["name"] for site in charter["sites"]} - {cost.site for cost in body.costs}
        found = []
        for site in sorted(silent):
            first = self._ledger.search(type=_RELEASES, run=body.run, site=site, limit=1)
            if first and first[0].leaf_index < index:
                found.append(site)
        return tuple(found)

    def _move(self, index: int, leaf_hash: str, body: VersionTransition) -> None:
        key = (body.model, body.version)
        version = self._versions.get(key)
        reason = _fault(version, self._heads.get(body.model, ZERO_DIGEST), body)
        if version is None or reason:
            _logger.error("entry %d is no valid transition and does not count: %s", index, reason)
            return
        officers = (
            (*version.approved_by, body.officer) if body.to_state == "approved" else version.approved_by
        )
        self._versions[key] = replace(
            version,
            state=body.to_state,
            transition=leaf_hash,
            moved_index=index,
            approved_by=officers,
            share=body.share,
        )
        self._heads[body.model] = leaf_hash


def _routes(versions: Iterable[ServedVersion]) -> dict[str, _Route]:
    models: dict[str, list[ServedVersion]] = {}
    for version in sorted(versions, key=lambda version: -version.registered_index):
        models.setdefault(version.model, []).append(version)
    return {model: _route(newest_first) for model, newest_first in models.items()}


def _route(newest_first: list[ServedVersion]) -> _Route:
    def find(*states: str) -> ServedVersion | None:
        return next((version for version in newest_first if version.state in states), None)

    # of two, the one that became live last: a swap makes the new one live, then retires the old
    found = [version for version in newest_first if version.state == LIVE]
    live = max(found, key=lambda version: version.moved_index) if found else None
    return _Route(
        first=live or newest_first[0],
        live=live,
        canary=find(CANARY),
        candidate=find(CANDIDATE, APPROVED, SHADOW, CANARY),
        shadows=tuple(version for version in newest_first if version.state == SHADOW),
    )


def _fault(version: ServedVersion | None, head: str, body: VersionTransition) -> str:
    """Return why a transition does not count, or an empty text."""
    if version is None:
        return f"no version {body.version} of {body.model}"
    if body.charter != version.charter_digest:
        return "it names another charter"
    if body.from_state != version.state:
        return f"the version is {version.state}, not {body.from_state}"
    if (body.from_state, body.to_state) not in ALLOWED:
        return f"nothing goes from {body.from_state} to {body.to_state}"
    if not (1 <= body.share <= 99 if body.to_state == CANARY else body.share == 0):
        return f"a share of {body.share} percent fits no {body.to_state} version"
    if body.to_state != RETIRED and not all(gate.passed for gate in version.registered.gates):
        return "a gate did not pass"
    if body.officer in (version.registered.author, version.charter_author):
        return "its signer trained the version or drew up its charter"
    if body.previous_transition != head:
        return "it does not continue the model's chain of transitions"
    if body.officer not in [officer["key"] for officer in version.charter["officers"]]:
        return "its signer is no officer of the charter"
    try:
        domain, payload = signing_payload(body)
        key = VerifyKey(parse_public_key(body.officer))
        key.verify(domain, payload, decode_signature(body.signature))
    except AuditError as error:
        return str(error)
    return ""


@lru_cache(maxsize=1_024)
def _micro(text: str) -> int:
    try:
        return int((parse_decimal(text) * 1_000_000).to_integral_value(ROUND_CEILING))
    except AuditError:
        return _ABOVE_ALL  # a claim that cannot be read

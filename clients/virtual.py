"""Virtual sites: a site's home, ledger, log and witness in memory, for simulations of hundreds of sites.

A virtual site is answered for by the same `clients.agent.Agent` as any other: same checks, same codes, same
mechanism, same signatures. What differs is only where its state lives, and that nothing of it outlives the
process: a debit is not durable, so nothing that people's privacy depends on may ever run here. Its
enrolment says so: the operator of every virtual site is `VIRTUAL_OPERATOR`, and sites of one operator are one
voice in any policy. See docs/adr/0028.
"""

from __future__ import annotations

import dataclasses
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar

from audit.canonical import JsonValue
from audit.checkpoints import Checkpoint
from audit.entries import (
    ZERO_DIGEST,
    Body,
    Entry,
    MechanismEvent,
    SiteStatement,
    event_hash,
    new_entry,
)
from audit.merkle import EMPTY_ROOT
from audit.notes import NoteSigner
from audit.tlog_policy import Policy
from audit.witness import Log, Witness, WitnessState
from clients.agent import Agent
from clients.errors import HomeError, LedgerBehindError, OdometerError, RefusedError
from clients.high_water import Head
from clients.history import OpenedNotes
from clients.home import SiteConfig, SiteHome
from clients.identity import SiteKeys
from clients.ledger import Release, Reservation, Spent
from clients.reserved import committed_events
from clients.rules import Rules
from clients.trainer import Workshop

B = TypeVar("B")

VIRTUAL_OPERATOR: Final = "simulated"
_KEPT_RELEASES: Final = 2  # whose bytes are sent again when the same request comes again


class VirtualLedger:
    """A site's odometer in memory: every rule of `clients.ledger.SiteLedger`, nothing of its durability.

    It keeps the bytes of the last two releases, so that memory does not grow with the rounds.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._heads: dict[str, Head] = {}
        self._spent: dict[str, list[Spent]] = {}
        self._last_round: dict[str, int] = {}  # by run
        self._kept: dict[tuple[str, int], Release] = {}
        self._reservations: dict[str, Reservation] = {}
        self._masked: dict[tuple[str, int], dict[str, Any]] = {}

    def close(self) -> None: ...

    def state(self) -> dict[str, Any]:
        with self._lock:
            return {name: value for name, value in vars(self).items() if name != "_lock"}

    def take(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            vars(self).update(state)

    def head(self, population: str) -> Head:
        return self._heads.get(population, Head(0, ZERO_DIGEST))

    def populations(self) -> frozenset[str]:
        return frozenset([*self._heads, *(made.population for made in self._reservations.values())])

    def release_of(self, run: str, server_round: int) -> Release | None:
        """Return a release.

        Raises:
            RefusedError: already_released; the bytes are no longer kept.
        """
        with self._lock:
            found = self._kept.get((run, server_round))
            if found is None and server_round <= self._last_round.get(run, 0):
                raise RefusedError("already_released", f"the bytes of round {server_round} are not kept")
            return found

    def releases(self, population: str) -> tuple[Release, ...]:
        """Return the releases that are still kept, in order."""
        with self._lock:
            return tuple(kept for kept in self._kept.values() if kept.statement.population == population)

    def spent(self, population: str) -> Sequence[Spent]:
        with self._lock:
            return tuple(self._spent.get(population, ()))

    def committed_events(self, population: str) -> tuple[MechanismEvent, ...]:
        return committed_events(self, population)

    def commit_release(
        self,
        statement: SiteStatement,
        update_file: bytes,
        request_digest: str,
        masked: Mapping[str, JsonValue] | None = None,
    ) -> Release:
        """Debit a release and keep what was sent; raises `OdometerError` as a ledger on disk does."""
        with self._lock:
            head, population = self.head(statement.population), statement.population
            if (statement.sequence, statement.previous_event) != (head.sequence + 1, head.event_hash):
                raise OdometerError(
                    f"release {statement.sequence} after event {statement.previous_event[:8]} does not "
                    f"continue the odometer, which stands at {head.sequence} ({head.event_hash[:8]})"
                )
            if statement.round <= self._last_round.get(statement.run, 0):
                raise OdometerError(f"run {statement.run} round {statement.round} was released before")
            release = Release(statement, update_file, request_digest, False)
            self._heads[population] = Head(statement.sequence, event_hash(statement))
            before = self._spent.setdefault(population, [])
            spent = Spent(statement.run, statement.event)
            before.append(before[-1] if before and before[-1] == spent else spent)
            self._last_round[statement.run] = statement.round
            self._kept[statement.run, statement.round] = release
            if masked is not None:
                self._masked[statement.run, statement.round] = dict(masked)
            self._forget()
            return release

    def masked_round(self, run: str, server_round: int) -> dict[str, Any] | None:
        with self._lock:
            return self._masked.get((run, server_round))

    def put_masked_round(self, run: str, server_round: int, state: Mapping[str, JsonValue]) -> None:
        """Keep what the site knows of a masked round; of a run the last rounds alone, as of releases."""
        with self._lock:
            self._masked[run, server_round] = dict(state)
            newest = max(number for name, number in self._masked if name == run)
            for key in [key for key in self._masked if key[0] == run and key[1] <= newest - _KEPT_RELEASES]:
                del self._masked[key]

    def masked_rounds(self, run: str) -> tuple[int, ...]:
        with self._lock:
            return tuple(sorted(number for name, number in self._masked if name == run))

    def mark_delivered(self, run: str, server_round: int) -> None:
        with self._lock:
            found = self._kept.get((run, server_round))
            if found is not None:
                self._kept[run, server_round] = dataclasses.replace(found, delivered=True)

    def undelivered(self, population: str) -> tuple[SiteStatement, ...]:
        return tuple(kept.statement for kept in self.releases(population) if not kept.delivered)

    def reserve(self, reservation: Reservation) -> None:
        with self._lock:
            if reservation.run in self._reservations:
                raise OdometerError(f"run {reservation.run} was accepted before")
            for busy in self._reservations.values():
                if busy.population == reservation.population and not busy.closed:
                    raise OdometerError(f"run {busy.run} has the population until it ends")
            charter = _shared_text(reservation.charter)
            self._reservations[reservation.run] = dataclasses.replace(reservation, charter=charter)

    def reservation(self, run: str) -> Reservation | None:
        return self._reservations.get(run)

    def open_reservations(self, population: str) -> tuple[Reservation, ...]:
        with self._lock:
            made = [self._reservations[run] for run in sorted(self._reservations)]
        return tuple(one for one in made if one.population == population and not one.closed)

    def close_run(self, run: str) -> None:
        with self._lock:
            found = self._reservations.get(run)
            if found is not None:
                self._reservations[run] = dataclasses.replace(found, closed=True)

    def check_not_behind(self, population: str, seen: Head, *, witness: str) -> None:
        """Compare with an event that the population is known to have released.

        Raises:
            LedgerBehindError: this ledger has not counted that far, or holds another event in its place.
        """
        with self._lock:
            head = self.head(population)
            kept = [
                one.statement
                for one in self._kept.values()
                if (one.statement.population, one.statement.sequence) == (population, seen.sequence)
            ]
        if seen.sequence > head.sequence or any(event_hash(one) != seen.event_hash for one in kept):
            raise LedgerBehindError(
                population=population, ledger=head.sequence, seen=seen.sequence, witness=witness
            )

    def _forget(self) -> None:
        for key in [key for key, kept in self._kept.items() if kept.delivered][:-_KEPT_RELEASES]:
            del self._kept[key]


@lru_cache(maxsize=4)
def _shared_text(text: str) -> str:
    """Return the first of equal texts: a charter of a thousand members is held once, not a thousand times."""
    return text


class VirtualLog:
    """A site's own log in memory: what it decided can be read again; what it released is only counted.

    The statements themselves are in the federation's log. Nothing here is signed or proved to anybody.
    """

    def __init__(self, site: str, clock: Callable[[], datetime]) -> None:
        self.site, self._clock = site, clock
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._known: dict[str, int] = {}
        self._counts: Counter[type[Any]] = Counter()

    @property
    def log_key(self) -> str:
        return ""

    @property
    def tree_size(self) -> int:
        return self._counts.total()

    def append(self, body: Body, *, event_id: str | None = None) -> int:
        with self._lock:
            if event_id in self._known:
                return self._known[event_id]
            index = self._counts.total()
            self._counts[type(body)] += 1
            if isinstance(body, SiteStatement):
                return index
            now = self._clock().strftime("%Y-%m-%dT%H:%M:%SZ")
            entry = new_entry(body, actor=f"site:{self.site}", time=now, event_id=event_id)
            self._entries.append(entry)
            self._known[entry.event_id] = index
            return index

    def state(self) -> dict[str, Any]:
        with self._lock:
            return {name: vars(self)[name] for name in ("_entries", "_known", "_counts")}

    def take(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            vars(self).update(state)

    def publish(self) -> bytes:
        return b""

    def anchor(self) -> tuple[int, str]:
        return 0, ""  # nobody is ever shown this log

    def entries(
        self, kind: type[B], *, run: str | None = None, since: datetime | None = None
    ) -> Iterator[tuple[int, Entry, B]]:
        mark = "" if since is None else since.strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._lock:
            found = list(self._entries)
        for entry in found:
            body: Any = entry.body
            is_wanted = isinstance(body, kind) and entry.time >= mark
            if is_wanted and (run is None or getattr(body, "run", None) == run):
                yield self._known[entry.event_id], entry, body

    def latest(self, kind: type[B], *, run: str | None = None) -> B | None:
        found = [body for _, _, body in self.entries(kind, run=run)]
        return found[-1] if found else None

    def count(self, kind: type[Any]) -> int:
        return self._counts[kind]

    def close(self) -> None: ...


class VirtualWitness(Witness):
    """A witness whose last checkpoint is in memory; it checks what every witness checks."""

    def __init__(self, key: NoteSigner, log: Log, origin: str) -> None:
        self._state = WitnessState(Checkpoint(origin, 0, EMPTY_ROOT), None, 0)
        self._mutex = threading.Lock()
        super().__init__(Path("in memory"), key, log)

    def state(self) -> WitnessState:
        return self._state

    def _keep(self, state: WitnessState) -> None:
        self._state = state

    def take(self, state: WitnessState) -> None:
        with self._mutex:
            self._state = state

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._mutex:
            yield


@dataclass(frozen=True, slots=True)
class VirtualState:
    """What a virtual site knows and has done, to be carried from one process to another."""

    ledger: dict[str, Any]
    log: dict[str, Any]
    witness: WitnessState | None
    rules: Rules | None


@dataclass(slots=True)
class Memory:
    """What stays the same while a `VirtualHome` is replaced by one with other rules."""

    keys: SiteKeys
    ledger: VirtualLedger
    log: VirtualLog
    policy: Policy | None = None
    witness: VirtualWitness | None = None
    rules: Rules | None = None  # with the charters approved since

    def state(self) -> VirtualState:
        """Return what a copy of this process needs to go on for this site."""
        witness = None if self.witness is None else self.witness.state()
        return VirtualState(self.ledger.state(), self.log.state(), witness, self.rules)

    def take(self, state: VirtualState) -> None:
        """Go on where a copy of this process stopped."""
        self.ledger.take(state.ledger)
        self.log.take(state.log)
        if self.witness is not None and state.witness is not None:
            self.witness.take(state.witness)
        self.rules = state.rules


@dataclass(frozen=True, slots=True)
class VirtualHome(SiteHome):
    """A site's home without a folder: its methods are a `SiteHome`'s, its state goes with the process."""

    memory: Memory = field(repr=False, compare=False)

    @classmethod
    def make(
        cls, path: Path, *, name: str, data: Path, lifetime_epsilon: str, lifetime_delta: str
    ) -> VirtualHome:
        """Make a virtual site with new keys; `path` is used only for layers that stay at the site."""
        config = SiteConfig.model_validate(
            {
                "name": name,
                "operator": VIRTUAL_OPERATOR,
                "population": {"name": f"simulated people of {name}", "pseudonym": secrets.token_hex(16)},
                "data": data,
                "lifetime": {"epsilon": lifetime_epsilon, "delta": lifetime_delta},
                "rules": {"auto_approve": True},
            }
        )
        log = VirtualLog(name, lambda: datetime.now(UTC))
        return cls(path, config, Memory(SiteKeys.generate(), VirtualLedger(), log))

    def agent(self, workshop: Workshop, notes: OpenedNotes) -> Agent:
        """Return this site's agent, which goes on where an earlier one of it stopped."""
        memory = self.memory
        return Agent(self.refreshed(), memory.ledger, memory.log, workshop=workshop, notes=notes)

    def keys(self) -> SiteKeys:
        return self.memory.keys

    @property
    def follows_a_log(self) -> bool:
        return self.memory.policy is not None

    def stamp(self) -> tuple[int, int, int]:
        return (0, 0, 0)

    def refreshed(self) -> SiteHome:
        return self if self.memory.rules is None else self._replaced(self.memory.rules)

    def policy(self) -> Policy:
        if self.memory.policy is None:
            raise HomeError(self.path, "follows no log yet", "let it join a policy first")
        return self.memory.policy

    def join(self, policy: Policy, *, new_key: bool = False) -> None:
        if self.memory.policy is not None:
            raise HomeError(self.path, "follows a log already", "make another virtual site")
        keys = self._log_keys(policy)
        self.memory.witness = VirtualWitness(self.keys().witness_signer(self.name), keys, keys[0].name)
        self.memory.policy = policy

    def witness(self) -> Witness:
        if self.memory.witness is None:
            raise HomeError(self.path, "follows no log yet", "let it join a policy first")
        return self.memory.witness

    def _with_rules(self, change: Callable[[Rules], dict[str, Any]]) -> SiteHome:
        before = self.memory.rules or self.config.rules
        self.memory.rules = before.model_copy(update=change(before))
        return self._replaced(self.memory.rules)

    def _replaced(self, rules: Rules) -> SiteHome:
        return dataclasses.replace(self, config=self.config.model_copy(update={"rules": rules}))

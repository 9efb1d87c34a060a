"""Where a run stands between two rounds, and what it came to."""

from __future__ import annotations

from dataclasses import dataclass, field

from audit.entries import ZERO_DIGEST, SiteStatement
from audit.secure_bodies import RoundOpened
from federation.flat import Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRelease:
    """A site's signed release as the log holds it."""

    statement: SiteStatement
    leaf_index: int
    leaf_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """A round that was abandoned, and why."""

    round: int
    reason: str
    detail: str


@dataclass(slots=True)
class RunState:
    """What the next round is built on. `logged` and `silent` are of a round that was broken off."""

    participants: tuple[str, ...]
    base_model: bytes
    previous_round: str = ZERO_DIGEST  # leaf hash of the last round's entry, completed or abandoned
    round_leaf: int | None = None
    completed: int = 0  # rounds that gave a model
    lost: Lost | None = None  # the round before, where it was abandoned
    own_leaf: dict[str, int] = field(default_factory=dict)  # by site, of its last release
    outputs: list[Vector] = field(default_factory=list)  # of the last rounds, to be averaged
    logged: dict[str, LoggedRelease] = field(default_factory=dict)  # releases that need not be asked for
    opened: RoundOpened | None = None  # the masked round's sum, where it was opened already
    silent: set[str] = field(default_factory=set)  # sites that are not asked: written off, or not there


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOutcome:
    """A completed run: the digest of its averaged weights, and what it cost."""

    run: str
    charter: str
    rounds: int
    weights: str
    sites: tuple[str, ...]
    epsilon: float  # this run's, per site, by the accountant of the live table
    elapsed_s: float

"""What a run cost each site, and the form in which many hundreds of costs fit into one entry."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from audit._codec import ODD, reader_of, writer_of
from audit.packing import PackingError, pack_text, unpack_text

UNBOUNDED: Final = "none"  # where a release of a population bounds nothing of the unit


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEpsilon:
    """What a run cost one site's population, and what that population has spent in all."""

    site: str
    population: str
    events: int
    run_epsilon: str
    run_epsilon_rdp: str
    lifetime_epsilon: str  # or UNBOUNDED
    delta: str
    accountant: str
    relation: str
    unit: str


def pack_costs(costs: tuple[SiteEpsilon, ...]) -> tuple[tuple[SiteEpsilon, ...], str]:
    """Return (costs, "") where they are few enough for an entry, else ((), packed)."""
    plain, packed = pack_text(_costs_text(costs))
    return (costs, "") if plain else ((), packed)


def unpack_costs(plain: tuple[SiteEpsilon, ...], packed: str) -> tuple[SiteEpsilon, ...]:
    """Return what `pack_costs` was given.

    Raises:
        PackingError: both are there, or the packed one is not in the one form that packing gives.
    """
    if not packed:
        return plain
    if plain:
        raise PackingError("packed costs stand alone")
    return _read_costs(packed)


@lru_cache(maxsize=4)
def _read_costs(packed: str) -> tuple[SiteEpsilon, ...]:
    text = unpack_text("", packed)
    try:
        found = tuple(reader_of(SiteEpsilon)(item) for item in json.loads(text))
        if _costs_text(found) == text:
            return found
    except (*ODD, RecursionError) as error:
        raise PackingError(f"packed costs cannot be read: {error!r}") from error
    raise PackingError("packed costs are not in canonical form")


def _costs_text(costs: tuple[SiteEpsilon, ...]) -> str:
    return f"[{','.join(map(writer_of(SiteEpsilon, frozenset()), costs))}]"

"""A site's rules: what its agent may decide by itself, and what it must bring before the site's people.

    rules:
      auto_approve: false
      approved_charters: []            # grows with `site accept` and `charter sign`
      approved_bundles: []             # grows with `site bundle approve`
      purposes: [research]             # empty: whatever the approved charters say
      models: [sepsis]                 # names of models a run may be for; empty: any
      epsilon_per_run: "1"             # at the site's lifetime delta
      epsilon_per_year: "4"            # every release of the last 365 days, and what open runs may add
      hours: {from: "08:00", to: "18:00", days: [mon, tue, wed, thu, fri], zone: Europe/Berlin}
      minimum_sites: 4
      ask: [charters, runs]            # these rules ask the site's people; all others refuse

A broken rule refuses, unless `ask` names it: then the run waits. `ask: [runs]` makes every run wait. What
people accept passes their rules, never the lifetime budget. Rules bind the start of a run; a run under way
is not stopped by the clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, time
from decimal import Decimal
from typing import Annotated, Any, Final, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, Field, StringConstraints, field_validator, model_validator

from audit.decimals import decimal_text

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
Rule = Literal[
    "charters", "runs", "purposes", "models", "epsilon_per_run", "epsilon_per_year", "hours", "minimum_sites"
]
ClockTime = Annotated[str, StringConstraints(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
Epsilon = Annotated[Decimal, Field(gt=0, le=1000)]

DAYS: Final[tuple[Day, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def exact(value: Any) -> Any:
    """Return a YAML number as the decimal that was written, for fields of type Decimal."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return Decimal(decimal_text(value))
    return value


class Hours(BaseModel, frozen=True, extra="forbid", populate_by_name=True):
    """When a run may start, on the site's own clock; `to` before `from` runs over midnight."""

    from_: ClockTime = Field(alias="from")
    to: ClockTime
    days: Annotated[tuple[Day, ...], Field(min_length=1)] = DAYS
    zone: str = "UTC"

    @field_validator("from_", "to", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML 1.1 reads 18:00 as a number to the base of sixty
            raise ValueError('is a number; write the time in quotes, as "18:00"')
        return value

    @field_validator("zone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError(f"{value!r} is no time zone; write one such as Europe/Berlin") from error
        return value

    @model_validator(mode="after")
    def _some_time(self) -> Hours:
        if self.from_ == self.to:
            raise ValueError("from and to are the same; leave hours out to allow any time")
        return self

    def include(self, moment: datetime) -> bool:
        """Whether an aware time is within; after midnight a span belongs to the day on which it began."""
        local = moment.astimezone(ZoneInfo(self.zone))
        start, end, now = time.fromisoformat(self.from_), time.fromisoformat(self.to), local.time()
        today, yesterday = DAYS[local.weekday()], DAYS[local.weekday() - 1]
        if start < end:
            return today in self.days and start <= now < end
        return (today in self.days and now >= start) or (yesterday in self.days and now < end)


class Rules(BaseModel, frozen=True, extra="forbid"):
    auto_approve: bool  # sign any charter that names this site: for demos and simulations
    approved_charters: tuple[Digest, ...] = ()
    approved_bundles: tuple[Digest, ...] = ()  # Flower app bundles that the relay may run
    purposes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    epsilon_per_run: Epsilon | None = None
    epsilon_per_year: Epsilon | None = None
    hours: Hours | None = None
    minimum_sites: Annotated[int, Field(ge=1, le=10_000, strict=True)] | None = None
    ask: tuple[Rule, ...] = ()

    @field_validator("epsilon_per_run", "epsilon_per_year", mode="before")
    @classmethod
    def _decimals(cls, value: Any) -> Any:
        return exact(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """What the rules look at: one proposed run, as it would bind this site."""

    purposes: tuple[str, ...]
    model: str
    sites: int
    run_epsilon: float  # at the site's delta
    year_epsilon: float  # after this run, at the site's delta
    moment: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """A rule that a run breaks, the closed code it is refused with, and why, for the site's own console."""

    rule: Rule
    code: str
    detail: str


def breaches(rules: Rules, facts: RunFacts) -> tuple[Breach, ...]:
    """Return every rule that the run breaks, in a fixed order."""
    return tuple(_breaches(rules, facts))


def _breaches(rules: Rules, facts: RunFacts) -> Iterator[Breach]:
    foreign = sorted(set(facts.purposes) - set(rules.purposes)) if rules.purposes else []
    if foreign:
        yield Breach(
            rule="purposes",
            code="purpose_not_allowed",
            detail=f"the charter serves {foreign}, site.yaml allows {list(rules.purposes)}",
        )
    if rules.models and facts.model not in rules.models:
        yield Breach(
            rule="models",
            code="model_not_allowed",
            detail=f"the run is for model {facts.model[:60]!r}, site.yaml allows {list(rules.models)}",
        )
    if rules.minimum_sites is not None and facts.sites < rules.minimum_sites:
        yield Breach(
            rule="minimum_sites",
            code="participants_not_allowed",
            detail=f"{facts.sites} sites take part, site.yaml wants {rules.minimum_sites}",
        )
    limits = (
        ("epsilon_per_run", rules.epsilon_per_run, facts.run_epsilon),
        ("epsilon_per_year", rules.epsilon_per_year, facts.year_epsilon),
    )
    for rule, limit, value in limits:
        if limit is not None and not value <= float(limit):
            yield Breach(
                rule=rule,  # type: ignore[arg-type]
                code="budget_exhausted",
                detail=f"{rule} would be {value:.4f}, site.yaml allows {limit}",
            )
    if rules.hours is not None and not rules.hours.include(facts.moment):
        yield Breach(
            rule="hours",
            code="site_closed",
            detail=f"it is {facts.moment:%a %H:%M} UTC, outside the hours of site.yaml",
        )

"""Noise that several sites make together, and how far one site as a whole can move a sum: whole numbers only.

Each site draws a discrete Gaussian of its own, wide enough that any `sharers` of them add up to the charter's
noise. A sum of discrete Gaussians is no discrete Gaussian, but nearly: for widths s and t and
v = 1 / (1/s**2 + 1/t**2), Poisson summation gives P(X + Y = z) = c exp(-z**2 / (2 (s**2 + t**2))) (1 + r(z))
with |r(z)| <= a = 2 sum over k >= 1 of exp(-2 pi**2 v k**2), so every probability is within a factor
(1 + a) / (1 - a) of that of the discrete Gaussian of width sqrt(s**2 + t**2). Adding share after share, v is
at least half of one share's square. From a share of 8 on, 1000 sites and 10**12 coordinates stay within a
factor exp(10**-250): less than what `audit.epsilon` adds to every result for rounding. Wider noise, of more
sites than needed, is the same noise with something independent added.

Sources: Canonne, Kamath, Steinke 2020; Kairouz, Liu, Steinke 2021, "The Distributed Discrete Gaussian
Mechanism", for the same sum with another constant.
"""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Final

from audit.bodies import MechanismEvent
from audit.errors import AuditError
from audit.update_bounds import GRID_SLACK

MIN_SHARE_GRID: Final = 8


class SharedNoiseError(AuditError):
    """An event's shares do not make its noise."""

    code = "audit.shared_noise"


def share_grid(sigma_grid: int, sharers: int) -> int:
    """Return the least whole width s of one share with sharers * s**2 >= sigma_grid**2."""
    square = -(-(sigma_grid**2) // sharers)
    return math.isqrt(square - 1) + 1


def log_ratio(share: float, shares: int) -> float:
    """Return a bound on how far, in log, a probability of a sum of `shares` draws of width `share` lies from
    the discrete Gaussian's of width share * sqrt(shares).
    """
    total = 0.0
    for count in range(1, shares):
        a = sum(2 * math.exp(-2 * math.pi**2 * share**2 * count / (count + 1) * k**2) for k in range(1, 6))
        if a >= 1:
            return math.inf
        total += math.log1p(a) - math.log1p(-a)
    return total


def check_shares(event: MechanismEvent) -> None:
    """Refuse an event whose shares do not add up to its noise, or are too small to add up smoothly.

    Raises:
        SharedNoiseError: names the field.
    """
    if not event.sharers and not event.share_grid:
        return
    if event.sharers < 2 or event.share_grid < MIN_SHARE_GRID:
        raise SharedNoiseError(
            f"event.share_grid: {event.share_grid} of {event.sharers} sharers; at least {MIN_SHARE_GRID} of 2"
        )
    if event.sharers * event.share_grid**2 < event.sigma_grid**2:
        raise SharedNoiseError(
            f"event.share_grid: {event.sharers} shares of {event.share_grid} make no {event.sigma_grid}"
        )


def alone(event: MechanismEvent) -> MechanismEvent:
    """Return the event as it counts when everybody but this site colludes: its own share of the noise."""
    if not event.sharers:
        return event
    return replace(event, sigma_grid=event.share_grid, share_grid=0, sharers=0)


def site_sensitivity_grid(
    *,
    grid_bits: int,
    max_grad_norm: Decimal | Fraction,
    max_update_norm: Decimal | Fraction,
    dimension: int,
    precision: str,
) -> int:
    """Return the bound, in grid units, on the length of one site's sum before noise.

    A site whose rows are all replaced by nothing sends zeros with noise: that is the neighbouring relation,
    whatever the rows' own is. Participation is visible in the log, so nothing is gained by sampling.
    """
    ratio = Fraction(max_update_norm) / Fraction(max_grad_norm)
    return math.ceil((1 << grid_bits) * ratio * (1 + GRID_SLACK[precision])) + math.isqrt(dimension - 1) + 1


def site_level(event: MechanismEvent) -> MechanismEvent:
    """Return the event as it counts for a whole site whose rows are all replaced by nothing.

    Where the unit is the site already, a replaced site is two bounds away and one that is zeroed out is one.

    Raises:
        SharedNoiseError: it does not bound what a site moves.
    """
    if event.unit == "site":
        bounds = 2 if event.relation == "replace_one" else 1
        return replace(event, relation="zero_out", sensitivity_grid=-(-event.sensitivity_grid // bounds))
    if event.site_sensitivity_grid < 1:
        raise SharedNoiseError("event.site_sensitivity_grid: 0, a site's whole contribution is not bounded")
    return replace(
        event,
        sensitivity_grid=event.site_sensitivity_grid,
        relation="zero_out",
        unit="site",
        sampling="full",
        sample_rate="1",
        site_sensitivity_grid=0,
    )

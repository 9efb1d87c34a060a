"""A charter whose unit is the site alone: what that needs, what it excludes, and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from federation.errors import Problem

if TYPE_CHECKING:
    from federation.charter import Charter, Privacy

_USEFUL: Final = (
    3.0  # noise on a round's mean, in lengths of the longest update: docs/results/site_unit_utility.md
)


def check_norm(privacy: Privacy) -> Iterator[Problem]:
    """Yield what is wrong with the two norms: a unit has exactly the one that bounds it."""
    wanted, other = "max_grad_norm", "max_update_norm"
    if privacy.by_site:
        wanted, other = other, wanted
    if getattr(privacy, wanted) is None:
        what = "a whole site's update" if privacy.by_site else f"the gradient of one {privacy.unit}"
        yield Problem(
            path=f"privacy.{wanted}",
            message="is missing",
            fix=f"write the number that {what} is clipped to",
        )
    if getattr(privacy, other) is not None:
        yield Problem(
            path=f"privacy.{other}",
            message=f"bounds nothing where the unit is a {privacy.unit}",
            fix=f"remove it, and write {wanted}",
        )


def check_site_unit(charter: Charter) -> Iterator[Problem]:
    """Yield what contradicts a unit of one whole site."""
    privacy = charter.privacy
    if not privacy.by_site:
        return
    if privacy.relation == "add_remove":
        yield Problem(
            path="privacy.relation",
            message="would hide whether a site takes part, which the log shows to everybody",
            fix="write zero_out (its rows replaced by nothing) or replace_one (by any others, at twice the "
            "sensitivity)",
        )
    if privacy.sample_rate != 1:
        yield Problem(
            path="privacy.sample_rate",
            message="gains nothing where the log shows which sites took part in which round",
            fix="remove it",
        )
    if charter.site_level is not None:
        yield Problem(
            path="site_level",
            message="bounds a whole site beside its rows, and here the site is the unit itself",
            fix="remove it; privacy.epsilon and privacy.max_update_norm are the site's",
        )
    for name in ("evaluation", "reference"):
        if getattr(charter, name) is not None:
            yield Problem(
                path=name,
                message="releases counts that no norm bounds for a whole site",
                fix="remove it; measure the model on a public set",
            )
    for index, site in enumerate(charter.sites):
        if site.nominal_rows != 1:
            yield Problem(
                path=f"sites[{index}].nominal_rows",
                message="tells how many rows a site has, and every site counts once",
                fix="write nominal_rows: 1",
            )


def noise_on_mean(charter: Charter) -> float:
    """Return how long the noise on a round's mean is, in lengths of the longest update, at the fewest sites.

    One site's update is at most `max_update_norm` long, and so is the mean: above 1 the noise is longer than
    anything the sites can say in one round, and what a run of some rounds averages out is about 3 times that.
    """
    from federation.mechanism import planned_event

    event = planned_event(charter)
    share = event.share_grid or event.sigma_grid
    length = share * math.sqrt(charter.minimum_sites * charter.dimension)
    return length / charter.minimum_sites / float(1 << charter.privacy.grid_bits)


def sites_for(charter: Charter) -> int:
    """Return how many sites would bring the noise on the mean down to what rounds average out."""
    return math.ceil(noise_on_mean(charter) * charter.minimum_sites / _USEFUL)


def site_unit_warnings(charter: Charter) -> list[str]:
    """Return what a unit of one site is worth here, in figures."""
    privacy, count = charter.privacy, len(charter.sites)
    said = []
    if privacy.delta >= Decimal(1) / count:
        said.append(
            f"delta {privacy.delta} is not below 1/{count} (one of the sites): it permits publishing a "
            "whole site now and then; choose a delta well below that"
        )
    if charter.minimum_sites and (found := noise_on_mean(charter)) > _USEFUL:
        said.append(
            f"the noise on a round's mean is {found:.1f} times as long as the longest update, with "
            f"{charter.minimum_sites} sites and {charter.dimension} parameters; about {sites_for(charter)} "
            f"sites bring it to {_USEFUL:g}. Few sites that are each a unit learn little together: consider "
            "unit: row, with site_level beside it"
        )
    if privacy.relation == "zero_out":
        said.append(
            "zero_out compares a site with one that sends nothing; to other rows of its own it is two "
            "lengths away, which is what `a row` below costs"
        )
    return said

"""What masked updates and shared noise exclude, and what they need: said when the charter is checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from audit.masking import coordinate_limit
from audit.shared_noise import MIN_SHARE_GRID
from federation.errors import Problem

if TYPE_CHECKING:
    from audit.secure_round import SecureTerms
    from federation.charter import Charter

_LEAST_SITES = 3
_MAX_ROWS = 1 << 24  # rows that the sites' grid is sure to hold


def check_secure(charter: Charter) -> Iterator[Problem]:
    """Yield what contradicts secure aggregation and site-level terms in a charter of well-formed parts."""
    secure = charter.secure
    if secure is None:
        for path, asked in (
            ("site_level", charter.site_level is not None),
            ("privacy.unit", charter.privacy.by_site),
        ):
            if asked:
                yield Problem(
                    path=path,
                    message="needs noise that the sites share; noise of the coordinator's own would mean "
                    "that everybody trusts the coordinator, and this release does not offer it",
                    fix="add secure_aggregation: {tolerated: …}, or "
                    + ("remove it" if path == "site_level" else "write unit: row"),
                )
        return
    yield from _numbers(secure)
    yield from _excluded(charter)


def check_grid(charter: Charter) -> Iterator[Problem]:
    """Yield what the grid cannot hold; needs the model, so it comes last."""
    from federation.mechanism import planned_event

    secure = charter.secure
    if secure is None:
        return
    event = planned_event(charter)
    room = coordinate_limit(secure.sites, 44 * (event.share_grid + 1))
    if room < _MAX_ROWS << (charter.privacy.grid_bits + 1):
        yield Problem(
            path="privacy.grid_bits",
            message=f"{secure.sites} sites' sums do not fit into 64 bits on so fine a grid",
            fix="write a smaller grid_bits",
        )
    if event.share_grid < MIN_SHARE_GRID:
        yield Problem(
            path="privacy.grid_bits",
            message=f"a site's share of the noise is {event.share_grid} grid units, below {MIN_SHARE_GRID}",
            fix="write a larger grid_bits",
        )


def _numbers(secure: SecureTerms) -> Iterator[Problem]:
    if secure.sites < _LEAST_SITES:
        yield Problem(
            path="secure_aggregation",
            message=f"of {secure.sites} sites hides nothing: each would know the rest of the sum",
            fix=f"have at least {_LEAST_SITES} sites, or remove it",
        )
        return
    if 2 * secure.tolerated >= secure.sites:
        most = (secure.sites - 1) // 2
        yield Problem(
            path="secure_aggregation.tolerated",
            message=f"{secure.tolerated} of {secure.sites} sites: two sets without a common honest site "
            "could both be opened",
            fix=f"write at most {most}, below half of the sites",
        )
        return
    if secure.least < secure.sharers:
        yield Problem(
            path="plan.minimum_sites",
            message=f"{secure.least} sites' shares make less than the noise; {secure.sharers} make it",
            fix=f"write at least {secure.sharers}: all sites but those tolerated",
        )


def _excluded(charter: Charter) -> Iterator[Problem]:
    if charter.noised_steps > 1:
        yield Problem(
            path="plan.local_steps",
            message="moves local weights by sums that carry one site's share of the noise alone",
            fix="write local_steps: 1, or remove `secure_aggregation`",
        )
    if charter.model.local_layers:
        yield Problem(
            path="model.local_layers",
            message="would be moved by sums that carry one site's share of the noise alone",
            fix="share every layer, or remove `secure_aggregation`",
        )
    for name in ("evaluation", "reference"):
        if charter.site_level is not None and getattr(charter, name) is not None:
            yield Problem(
                path=name,
                message="releases counts that no norm bounds for a whole site",
                fix="remove it, or remove `site_level`",
            )
    for index, site in enumerate(charter.sites):
        if site.weight is not None and site.weight != site.nominal_rows:
            yield Problem(
                path=f"sites[{index}].weight",
                message="is not its nominal_rows; of masked updates only the plain sum is known",
                fix="remove it",
            )

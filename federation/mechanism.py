"""What the charter makes each site release, as the event an accountant sees, before anything is released.

The formulas are those of the sites' own mechanism (`clients.dp.grid`, where the slack is derived); they are
written twice because a plan must not import the code beside the data, and tested equal.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Final

from audit.decimals import decimal_text
from audit.entries import MechanismEvent
from audit.private_evaluation import Evaluation
from audit.reference import Reference
from audit.shared_noise import share_grid, site_sensitivity_grid

if TYPE_CHECKING:
    from federation.charter import Charter

SLACK: Final = {"float64": Fraction(1, 10**6), "float32": Fraction(1, 2**8)}


def sensitivity_grid(*, grid_bits: int, dimension: int, relation: str, precision: str) -> int:
    """Return the bound, in grid units, on the L2 distance of two neighbouring rounded sums.

    A subject's rows are each clipped to C / max_rows_per_subject at the site, so a subject moves the sum by
    no more than one row does where the unit is a row. Where the unit is the site, its whole update is what
    is clipped, and zeros are what a site without rows sends.
    """
    gradients = 2 if relation == "replace_one" else 1
    root = math.isqrt(dimension - 1) + 1
    return gradients * (math.ceil((1 << grid_bits) * (1 + SLACK[precision])) + root)


def release_event(
    *,
    noise_multiplier: Decimal | float,
    sample_rate: Decimal | float,
    local_steps: int,
    dimension: int,
    grid_bits: int,
    relation: str,
    unit: str,
    precision: str = "float64",
    sharers: int = 0,
    site_sensitivity: int = 0,
) -> MechanismEvent:
    """Return the event of one release under the given terms; noise_multiplier is relative to the
    sensitivity, `sharers` how many sites' shares make the noise together (0: each makes it alone).
    """
    sensitivity = sensitivity_grid(
        grid_bits=grid_bits, dimension=dimension, relation=relation, precision=precision
    )
    sigma = math.ceil(Fraction(noise_multiplier) * sensitivity)
    return MechanismEvent(
        mechanism="discrete_gaussian",
        sampling="full" if sample_rate == 1 else "poisson",
        sample_rate=decimal_text(sample_rate),
        steps=local_steps,
        sigma_grid=sigma,
        sensitivity_grid=sensitivity,
        dimension=dimension,
        grid_bits=grid_bits,
        relation=relation,
        unit=unit,
        share_grid=share_grid(sigma, sharers) if sharers else 0,
        sharers=sharers,
        site_sensitivity_grid=site_sensitivity,
    )


def planned_events(charter: Charter) -> tuple[MechanismEvent, ...]:
    """Return every event that a run may ask of one site, in order: its rounds with the spare ones, then
    evaluation and sketch if any.
    """
    document = charter.document
    after = (Evaluation.of_charter(document), Reference.of_charter(document))
    rounds = (planned_event(charter),) * charter.most_rounds
    return (*rounds, *(terms.event for terms in after if terms is not None))


def planned_event(charter: Charter) -> MechanismEvent:
    """Return the event that every site's statement must carry, the same in every round."""
    privacy, secure, site = charter.privacy, charter.secure, charter.site_level
    return release_event(
        noise_multiplier=privacy.noise_multiplier,
        sample_rate=privacy.sample_rate,
        local_steps=charter.noised_steps,
        dimension=charter.dimension,
        grid_bits=privacy.grid_bits,
        relation=privacy.relation,
        unit=privacy.unit,
        precision=privacy.precision,
        sharers=0 if secure is None else secure.sharers,
        site_sensitivity=0
        if site is None
        else site_sensitivity_grid(
            grid_bits=privacy.grid_bits,
            max_grad_norm=privacy.norm,
            max_update_norm=site.max_update_norm,
            dimension=charter.dimension,
            precision=privacy.precision,
        ),
    )

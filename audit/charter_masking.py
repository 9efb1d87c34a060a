"""What a charter says of masked updates, shared noise and whole sites, read strictly from its JSON values.

A whole site is protected beside its rows (`site_level`), or it is the unit itself (`privacy.unit: site`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from audit.decimals import parse_decimal
from audit.errors import AuditError
from audit.robust import AggregationRule
from audit.secure_round import SecureTerms
from audit.shared_noise import site_sensitivity_grid


class CharterMaskingError(AuditError):
    """The two blocks are malformed, or contradict the rest of the charter."""

    code = "audit.charter_masking"


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteTerms:
    """What a charter promises of a site as a whole."""

    max_update_norm: Decimal
    epsilon: Decimal  # at privacy.delta
    sensitivity_grid: int


def masked_terms(
    charter: Mapping[str, Any], *, dimension: int
) -> tuple[SecureTerms | None, SiteTerms | None]:
    """Return the terms of `secure_aggregation` and `site_level`, None for each that is absent.

    Raises:
        CharterMaskingError: says which key, and why.
    """
    secure = _secure(charter)
    if charter["privacy"]["unit"] == "site":
        _check_site_unit(charter, secure)
    if "site_level" not in charter:
        return secure, None
    part = _block(charter, "site_level", {"max_update_norm", "epsilon"})
    if secure is None or not {"evaluation", "reference"}.isdisjoint(charter):
        raise CharterMaskingError("site_level needs secure_aggregation, and no release of counts")
    norm, epsilon = parse_decimal(part["max_update_norm"]), parse_decimal(part["epsilon"])
    if norm <= 0 or epsilon <= 0:
        raise CharterMaskingError("site_level: both numbers are above 0")
    privacy = charter["privacy"]
    sensitivity = site_sensitivity_grid(
        grid_bits=privacy["grid_bits"],
        max_grad_norm=parse_decimal(privacy["max_grad_norm"]),
        max_update_norm=norm,
        dimension=dimension,
        precision=privacy["precision"],
    )
    return secure, SiteTerms(max_update_norm=norm, epsilon=epsilon, sensitivity_grid=sensitivity)


def _secure(charter: Mapping[str, Any]) -> SecureTerms | None:
    if "secure_aggregation" not in charter:
        return None
    tolerated = _block(charter, "secure_aggregation", {"tolerated"})["tolerated"]
    if isinstance(tolerated, bool) or not isinstance(tolerated, int) or tolerated < 0:
        raise CharterMaskingError("secure_aggregation.tolerated is not a count")
    terms = SecureTerms.of_charter(charter)
    if terms is None or terms.sites < 3 or 2 * tolerated >= terms.sites or terms.least < terms.sharers:
        raise CharterMaskingError(f"secure_aggregation.tolerated: {tolerated} does not fit the sites")
    plan, model, rule = charter["plan"], charter["model"], AggregationRule.of_charter(charter)
    steps = 1 if charter["privacy"]["unit"] == "site" else plan["local_steps"]  # noised ones
    if steps != 1 or model.get("local_layers") or rule.name != "mean" or rule.norm_bound:
        raise CharterMaskingError("secure_aggregation needs one step, shared layers, a mean without a bound")
    if any(site["weight"] != str(site["nominal_rows"]) for site in charter["sites"]):
        raise CharterMaskingError("secure_aggregation needs every site's weight to be its nominal_rows")
    return terms


def _check_site_unit(charter: Mapping[str, Any], secure: SecureTerms | None) -> None:
    """Hold a charter whose unit is the site to what makes that true.

    Raises:
        CharterMaskingError: an update would be in the clear, participation would count as hidden, something
            besides the update would leave a site, or a site's number of rows would show.
    """
    privacy = charter["privacy"]
    if secure is None:
        raise CharterMaskingError(
            "unit site needs secure_aggregation: the sites' own noise, in the sum alone"
        )
    if privacy["relation"] not in ("zero_out", "replace_one"):
        raise CharterMaskingError("unit site: who takes part is in the log; zero_out or replace_one")
    if privacy["sample_rate"] != "1" or privacy["subject_id"] or privacy["max_rows_per_subject"] != 1:
        raise CharterMaskingError("unit site: sample_rate is 1, and no column names a subject")
    if not {"site_level", "evaluation", "reference"}.isdisjoint(charter):
        raise CharterMaskingError("unit site excludes site_level and every release of counts")
    if any(site["nominal_rows"] != 1 for site in charter["sites"]):
        raise CharterMaskingError("unit site: every site counts once, so its nominal_rows is 1")


def _block(charter: Mapping[str, Any], name: str, fields: set[str]) -> Mapping[str, Any]:
    part = charter[name]
    if not isinstance(part, dict) or set(part) != fields:
        raise CharterMaskingError(f"{name} has exactly the keys {sorted(fields)}")
    return part

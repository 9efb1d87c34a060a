"""What a charter says of masked updates, shared noise and whole sites, read strictly from its JSON values."""

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
    if plan["local_steps"] != 1 or model.get("local_layers") or rule.name != "mean" or rule.norm_bound:
        raise CharterMaskingError("secure_aggregation needs one step, shared layers, a mean without a bound")
    if any(site["weight"] != str(site["nominal_rows"]) for site in charter["sites"]):
        raise CharterMaskingError("secure_aggregation needs every site's weight to be its nominal_rows")
    return terms


def _block(charter: Mapping[str, Any], name: str, fields: set[str]) -> Mapping[str, Any]:
    part = charter[name]
    if not isinstance(part, dict) or set(part) != fields:
        raise CharterMaskingError(f"{name} has exactly the keys {sorted(fields)}")
    return part

"""Where in a text of policies a problem is: Cedar's own messages give neither line nor `@id`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import cedarpy

_ID: Final = re.compile(r'@id\s*\(\s*"([^"\n]*)"')
_GENERATED: Final = re.compile(r"`(policy[0-9]+)`")
_CUT_SHORT: Final = "unexpected end of input"


def located(text: str, problem: str) -> str:
    """Return a syntax error with its line, and the policy that the line is in or after.

    The line is the first at which the text read so far is wrong, and not merely cut short.
    """
    lines = text.splitlines(keepends=True)
    low, high = 0, len(lines)  # the text up to `low` lines may go on; up to `high` it is wrong
    while high - low > 1:
        middle = (low + high) // 2
        if _may_go_on("".join(lines[:middle])):
            low = middle
        else:
            high = middle
    before = _ID.findall("".join(lines[:high]))
    where = f'@id("{before[-1]}")' if before else "before the first @id"
    return f"line {max(high, 1)}, {where}: {problem}"


def by_their_names(problem: str, document: Mapping[str, Any]) -> str:
    """Return a message about generated names (`policy32`) with what the text calls them."""
    policies = document.get("staticPolicies", {})
    return _GENERATED.sub(lambda found: _name(found[1], policies) or found[0], problem)


def place_of(generated: str, document: Mapping[str, Any]) -> str:
    """Say which policy without an `@id` is meant, by the one before it."""
    policies = document.get("staticPolicies", {})
    order = sorted(policies, key=lambda name: int(name.removeprefix("policy") or 0))
    before = {after: first for first, after in pairwise(order)}.get(generated)
    number = f"policy {order.index(generated) + 1} of the text"
    name = _name(before, policies) if before is not None else ""
    return f"{number}, after {name}," if name else f"{number}"


def _name(generated: str, policies: Mapping[str, Any]) -> str:
    name = ((policies.get(generated) or {}).get("annotations") or {}).get("id")
    return f'@id("{name}")' if name else ""


def _may_go_on(text: str) -> bool:
    try:
        cedarpy.policies_to_json_str(text)
    except ValueError as error:
        return str(error) == _CUT_SHORT
    return True

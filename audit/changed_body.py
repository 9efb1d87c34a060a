"""A signed body with some of its fields changed: what stays of it is not written again."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from audit._codec import ODD, members_of
from audit._domains import DOMAINS
from audit.entries import _DIGEST_FIELDS

T = TypeVar("T")


def with_fields(body: T, **changes: Any) -> T:
    """As `dataclasses.replace`, for signed bodies: what stays is not written again when the result is."""
    kind = type(body)
    if kind not in DOMAINS:
        return dataclasses.replace(body, **changes)  # type: ignore[type-var] # every body is a dataclass
    try:
        made: T = members_of(kind, _DIGEST_FIELDS).replace(body, changes)
    except ODD:
        return dataclasses.replace(body, **changes)  # type: ignore[type-var]
    return made

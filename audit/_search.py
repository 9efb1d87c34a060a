"""The ledger's search filters, shared by pages and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select

from audit.tables import LEAF


def matching(
    query: Select[Any],
    *,
    type: str | Sequence[str] | None = None,
    since: str | None = None,
    until: str | None = None,
    **exact: str | int | None,
) -> Select[Any]:
    """Return `query` narrowed to the leaves whose columns match; times are since <= time < until."""
    if type is not None:
        query = query.where(LEAF.c.type.in_([type] if isinstance(type, str) else list(type)))
    for name, value in exact.items():
        if value is not None:
            query = query.where(LEAF.c[name] == value)
    if since is not None:
        query = query.where(LEAF.c.time >= since)
    if until is not None:
        query = query.where(LEAF.c.time < until)
    return query

"""What may be queued for the log: an entry's size, its event id and its columns, checked before it waits."""

from __future__ import annotations

import re
from dataclasses import fields
from operator import attrgetter
from typing import Final

from audit._integrate import AppendRequest, Guard
from audit.entries import MAX_ENTRY_BYTES, IndexColumns
from audit.errors import EntryColumnsError, EntrySizeError, EventIdError
from audit.merkle import hash_leaf

MAX_COLUMN_BYTES: Final = 1024

_EVENT_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_COLUMNS: Final = tuple(field.name for field in fields(IndexColumns))
_column_values: Final = attrgetter(*_COLUMNS)
# characters: no UTF-8 is longer; a surrogate or U+0000 is not printable
_SHORT: Final = MAX_COLUMN_BYTES // 4


def append_request(
    entry_bytes: bytes, event_id: str, columns: IndexColumns, guard: Guard | None = None
) -> AppendRequest:
    if not 0 < len(entry_bytes) <= MAX_ENTRY_BYTES:
        raise EntrySizeError(size_bytes=len(entry_bytes), limit_bytes=MAX_ENTRY_BYTES)
    if not _EVENT_ID.fullmatch(event_id):
        raise EventIdError(f"event_id {event_id[:130]!r} is not 1 to 128 printable ASCII characters")
    values = _column_values(columns)
    for value in values:
        if value is None or (type(value) is str and len(value) <= _SHORT and value.isprintable()):
            continue
        _check_columns(columns)
        break
    body = bytes(entry_bytes)
    return AppendRequest(event_id, hash_leaf(body), body, values, guard)


def _check_columns(columns: IndexColumns) -> None:
    for name in _COLUMNS:
        value = getattr(columns, name)
        if isinstance(value, str):
            try:
                size = len(value.encode())
            except UnicodeEncodeError as error:
                raise EntryColumnsError(name, "is not Unicode text") from error
            if size > MAX_COLUMN_BYTES or "\0" in value:
                raise EntryColumnsError(name, f"is over {MAX_COLUMN_BYTES} bytes or holds U+0000")
        elif value is not None and not -(2**63) <= value < 2**63:
            raise EntryColumnsError(name, f"{value} does not fit in 64 bits")

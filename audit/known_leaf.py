"""Is this the leaf of that body? Who has the body already finds it there and does not read it again."""

from __future__ import annotations

import re

from audit.entries import MAX_ENTRY_BYTES, TYPE_OF, Body, Entry, EntryError, body_bytes

_LEAF_HEAD = re.compile(rb'\{"actor":"([ -!#-\[\]-~]*)","body":')
_LEAF_TAIL = re.compile(
    rb',"event_id":"([0-9a-f]{32})","nonce":"([0-9a-f]{32})","time":"([0-9TZ:-]*)","type":"([a-z_.]+)","v":1\}'
)


def decode_entry_of(data: bytes, body: Body) -> Entry | None:
    """Return what `decode_entry` makes of a leaf that holds exactly `body`; None for any other leaf.

    For whoever has the body already, and asks whether this is its leaf: it is found, not read again.
    """
    head, _, tail = data.partition(body_bytes(body))
    begins, ends = _LEAF_HEAD.fullmatch(head), _LEAF_TAIL.fullmatch(tail)
    if begins is None or ends is None or len(data) > MAX_ENTRY_BYTES:
        return None
    event_id, nonce, time, kind = (part.decode() for part in ends.groups())
    if kind != TYPE_OF[type(body)]:
        return None
    try:
        return Entry(event_id=event_id, nonce=nonce, time=time, actor=begins[1].decode(), body=body)
    except EntryError:
        return None

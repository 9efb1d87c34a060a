"""Entries of predictions that differ in little: the text that they share is written once.

One caller's requests to one version differ in the request's id and in the row's commitments; the rest of each
leaf, four fifths of it, is the same. What a form makes is, byte for byte, what `audit.entries` makes of the
same values, because the form is cut out of an entry that was made there.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from itertools import pairwise

from audit._append_request import append_request
from audit._integrate import AppendRequest, Guard
from audit.chance import TIME, entry_names
from audit.entries import EntryError, Prediction, RowCommitment, encode_entry, index_columns, new_entry
from audit.merkle import hash_leaf

_TIME = "2000-01-01T00:00:00Z"


class PredictionForm:
    """The entry of any prediction of one row that says what `body` says of all else."""

    def __init__(self, body: Prediction, *, actor: str) -> None:
        """Make it of a prediction, whose request id and row stand for any.

        Raises:
            EntryError: a field breaks its rule, or the text cannot be cut.
        """
        request_id = secrets.token_hex(16)
        row = RowCommitment(input=secrets.token_hex(32), output=secrets.token_hex(32))
        entry = new_entry(replace(body, request_id=request_id, rows=(row,)), actor=actor, time=_TIME)
        data = encode_entry(entry)
        known = append_request(data, entry.event_id, index_columns(entry))
        text = data.decode()
        holes = [request_id, row.input, row.output, entry.event_id, entry.nonce, entry.time]
        places = [(text.find(hole), len(hole)) for hole in holes]
        ends = [start + length for start, length in places]
        is_sound = all(text.count(hole) == 1 for hole in holes) and all(
            end < start for end, (start, _) in zip(ends, places[1:], strict=False)
        )
        if not is_sound or len(set(holes)) < len(holes):
            raise EntryError("entry", "its text cannot be cut where requests differ")
        cuts = [0, *[cut for start, length in places for cut in (start, start + length)], len(text)]
        self._parts = tuple(text[start:stop] for start, stop in list(pairwise(cuts))[::2])
        self._columns, self._time = known.columns, _TIME

    def request(
        self, *, time: str, request_id: str, input: str, output: str, guard: Guard | None = None
    ) -> AppendRequest:
        """Return the entry as the ledger takes it: the commitments are hex SHA-256, the id 32 hex digits.

        Raises:
            EntryError: one of them is not, or the time is none that entries have.
        """
        if not (len(request_id) == 32 and len(input) == len(output) == 64) or not _is_hex(
            request_id + input + output
        ):
            raise EntryError("request_id, rows", "are hexadecimal digits, 32 and twice 64")
        if time != self._time:
            if not TIME.fullmatch(time):
                raise EntryError("time", f"{time[:40]!r} is no RFC 3339 time in UTC with whole seconds")
            self._columns, self._time = (*self._columns[:2], time, *self._columns[3:]), time
        event_id, nonce = entry_names(time)
        first, second, third, fourth, fifth, sixth, last = self._parts
        data = (
            f"{first}{request_id}{second}{input}{third}{output}{fourth}{event_id}{fifth}{nonce}{sixth}{time}{last}"
        ).encode()
        return AppendRequest(event_id, hash_leaf(data), data, self._columns, guard)


def _is_hex(text: str) -> bool:
    """Whether these are lower-case hexadecimal digits: what writes them again is a pattern's double."""
    try:
        return bytes.fromhex(text).hex() == text
    except ValueError:
        return False

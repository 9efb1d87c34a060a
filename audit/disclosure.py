"""Fields that can be opened one by one: what a sealed entry's digests stand for.

A sealed entry speaks of its parts (`context`, `row.0.input`, `row.0.output`, `terms`), each by one root:

    salt of a field   HMAC-SHA256(salt of the part, "affidavit/field-salt/v1" 0x00 part 0x00 name)
    commitment        SHA-256("affidavit/field/v1" 0x00 part 0x00 name 0x00 salt of the field || value)
    root of the part  SHA-256("affidavit/fields/v1" 0x00 canonical JSON {name: commitment in hex})

where a value is its canonical JSON. Whoever has a part's salt and values opens all of it; to open one field,
give its salt and value with the other fields' commitments, which say nothing. A part's salt is fresh for each
part of each event and lives in the vault; when it is gone, no value can be guessed from a commitment.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from audit.access_bodies import AuditRead
from audit.bodies import Body, Prediction
from audit.canonical import JsonValue, canonical_bytes, parse_canonical
from audit.commitments import SALT_SIZE, new_salt, parse_salt
from audit.errors import AuditError, CommitmentError
from audit.runtime_bodies import PredictionShadowed

CONTEXT: Final = "context"
TERMS: Final = "terms"
_PART = re.compile(r"context|terms|row\.(?:0|[1-9][0-9]{0,5})\.(?:input|output)")
_HEX64 = re.compile(r"[0-9a-f]{64}")
_MAX_NAME: Final = 256
_SALT_HEAD: Final = b"affidavit/field-salt/v1\x00"
_FIELD_HEAD: Final = b"affidavit/field/v1\x00"


class DisclosureError(AuditError):
    """What is opened is not what the entry commits to, or is no opening; names the part."""

    code = "disclosure.mismatch"

    def __init__(self, part: str, problem: str) -> None:
        super().__init__(f"{part[:80]}: {problem}")
        self.part, self.problem = part, problem


@dataclass(frozen=True, slots=True)
class SealedPart:
    """A part with everything that opens it."""

    salt: bytes
    values: Mapping[str, JsonValue]

    def root(self, part: str) -> str:
        """Return the root of all fields: as `open` and `commitment` make it, with the heads written once."""
        place = part.encode() + b"\x00"
        salt_head, field_head = _SALT_HEAD + place, _FIELD_HEAD + place
        key = hmac.new(self.salt, salt_head, hashlib.sha256)
        commitments = {}
        for name, value in self.values.items():
            text = name.encode()
            salted = key.copy()
            salted.update(text)
            field = b"".join((field_head, text, b"\x00", salted.digest(), canonical_bytes(value)))
            commitments[name] = hashlib.sha256(field).hexdigest()
        return root_of(commitments)

    def open(self, part: str, name: str) -> OpenedField:
        value = canonical_bytes(self.values[name]).decode()
        return OpenedField(salt=field_salt(self.salt, part, name), value=value)

    def disclose(self, part: str, names: Iterable[str]) -> DisclosedPart:
        """Return the part with only `names` opened."""
        chosen = set(names)
        opened = {name: self.open(part, name) for name in self.values if name in chosen}
        closed = {
            name: self.open(part, name).commitment(part, name) for name in self.values if name not in chosen
        }
        return DisclosedPart(opened=opened, closed=closed)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedField:
    """One field's salt and the canonical JSON of its value."""

    salt: bytes
    value: str

    def commitment(self, part: str, name: str) -> str:
        if len(self.salt) != SALT_SIZE:
            raise CommitmentError(f"the salt of {name[:80]!r} has {len(self.salt)} bytes, not {SALT_SIZE}")
        head = _FIELD_HEAD + b"\x00".join((part.encode(), name.encode(), b""))
        return hashlib.sha256(head + self.salt + self.value.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class DisclosedPart:
    """A part of which some fields are opened and the others are commitments."""

    opened: Mapping[str, OpenedField]
    closed: Mapping[str, str]

    def root(self, part: str) -> str:
        """Return the root that these fields make; the entry's must be the same."""
        found = {name: field.commitment(part, name) for name, field in self.opened.items()}
        return root_of({**self.closed, **found})


Disclosed = Mapping[int, Mapping[str, DisclosedPart]]  # by leaf index, then by part


def new_part(values: Mapping[str, JsonValue]) -> SealedPart:
    """Return a part under a fresh random salt.

    Raises:
        DisclosureError: a name that no field may have.
    """
    for name in values:
        if not name or len(name) > _MAX_NAME or "\0" in name:
            raise DisclosureError(name, "is no name of a field")
    return SealedPart(new_salt(), values)


def field_salt(salt: bytes, part: str, name: str) -> bytes:
    """Return the 32-byte salt of one field."""
    label = _SALT_HEAD + b"\x00".join((part.encode(), name.encode()))
    return hmac.digest(salt, label, "sha256")


def root_of(commitments: Mapping[str, str]) -> str:
    """Return the hex root of a part's commitments."""
    return hashlib.sha256(b"affidavit/fields/v1\x00" + canonical_bytes(dict(commitments))).hexdigest()


def roots_of(body: Body) -> dict[str, str]:
    """Return the root of each part of a sealed entry; empty for any other."""
    if isinstance(body, Prediction) and body.sealed:
        roots = {CONTEXT: body.context}
        for number, row in enumerate(body.rows):
            roots[f"row.{number}.input"], roots[f"row.{number}.output"] = row.input, row.output
        return roots
    if isinstance(body, AuditRead) and body.sealed:
        return {TERMS: body.query}
    if isinstance(body, PredictionShadowed):
        return {CONTEXT: body.context}
    return {}


def verify_disclosed(body: Body, parts: Mapping[str, DisclosedPart]) -> None:
    """Prove that every part makes the root that the entry states.

    Raises:
        DisclosureError: one does not, or the entry has no such part.
    """
    roots = roots_of(body)
    for name, part in parts.items():
        if name not in roots:
            raise DisclosureError(name, "the entry has no such part")
        if not hmac.compare_digest(part.root(name), roots[name]):
            raise DisclosureError(name, "salts and values do not open what the entry commits to")


def opened_row(part: str, salt: str, text: str) -> tuple[str, dict[str, Any]]:
    """Return (root, values) of a part opened whole, by its salt in hex and its values as canonical JSON.

    Raises:
        DisclosureError: they are not.
    """
    try:
        raw, values = parse_salt(salt), parse_canonical(text.encode())
    except (AuditError, ValueError) as error:
        raise DisclosureError(part, f"cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DisclosureError(part, "is not an object")
    return SealedPart(raw, values).root(part), values


def context_of_answer(salt: str, text: str) -> DisclosedPart:
    """Return the context that a caller was told, open as far as it says what the answer was for.

    Raises:
        DisclosureError: salt and text are none.
    """
    _, values = opened_row(CONTEXT, salt, text)
    return SealedPart(parse_salt(salt), values).disclose(CONTEXT, ("purpose", "legal_basis"))


def choose(parts: Mapping[str, SealedPart], fields: Iterable[str]) -> dict[str, DisclosedPart]:
    """Open the fields that are named: `age` in every part, or one by its path, `row.0.input.age`.

    Raises:
        DisclosureError: no part has such a field; the message names those that there are.
    """
    wanted = list(fields)
    paths = {f"{part}.{name}": (part, name) for part, sealed in parts.items() for name in sealed.values}
    chosen: dict[str, set[str]] = {part: set() for part in parts}
    for field in wanted:
        found = [paths[field]] if field in paths else [pair for pair in paths.values() if pair[1] == field]
        if not found:
            raise DisclosureError(field, f"no such field; there are {', '.join(sorted(paths))}")
        for part, name in found:
            chosen[part].add(name)
    return {part: parts[part].disclose(part, names) for part, names in chosen.items() if names}


def whole(parts: Mapping[str, SealedPart]) -> dict[str, DisclosedPart]:
    """Open everything."""
    return {part: sealed.disclose(part, sealed.values) for part, sealed in parts.items()}


def values_of(part: DisclosedPart) -> dict[str, Any]:
    """Return the opened values.

    Raises:
        AuditError: a value is not canonical JSON.
    """
    return {name: parse_canonical(field.value.encode()) for name, field in part.opened.items()}


def disclosed_document(disclosed: Disclosed) -> dict[str, Any]:
    """Return the member `disclosed.json` of an evidence file."""
    return {
        str(index): {
            part: {
                "closed": dict(found.closed),
                "opened": {
                    name: {"salt": field.salt.hex(), "value": field.value}
                    for name, field in found.opened.items()
                },
            }
            for part, found in parts.items()
        }
        for index, parts in disclosed.items()
    }


def parse_disclosed(document: Any) -> dict[int, dict[str, DisclosedPart]]:
    """Read what `disclosed_document` wrote.

    Raises:
        DisclosureError: anything else.
    """
    found: dict[int, dict[str, DisclosedPart]] = {}
    for index, parts in _object(document, "disclosed").items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,15}", index):
            raise DisclosureError(index, "is not a leaf index")
        found[int(index)] = {name: _part(name, value) for name, value in _object(parts, index).items()}
    return found


def _part(name: str, value: Any) -> DisclosedPart:
    document = _object(value, name)
    if not _PART.fullmatch(name) or set(document) != {"closed", "opened"}:
        raise DisclosureError(name, "is not a part of closed and opened fields")
    closed, opened = _object(document["closed"], name), {}
    for field, commitment in closed.items():
        if not isinstance(commitment, str) or not _HEX64.fullmatch(commitment):
            raise DisclosureError(name, f"the commitment of {field[:80]!r} is not a hex SHA-256")
    for field, given in _object(document["opened"], name).items():
        if field in closed:
            raise DisclosureError(name, f"{field[:80]!r} is both opened and closed")
        if (
            not isinstance(given, dict)
            or set(given) != {"salt", "value"}
            or not isinstance(given["value"], str)
            or not isinstance(given["salt"], str)
            or not _HEX64.fullmatch(given["salt"])
        ):
            raise DisclosureError(name, f"{field[:80]!r} is not a salt and a value")
        opened[field] = OpenedField(salt=bytes.fromhex(given["salt"]), value=given["value"])
    return DisclosedPart(opened=opened, closed=closed)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DisclosureError(where, "is not an object")
    return value

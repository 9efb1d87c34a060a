"""Writers and readers of bodies, made once a type from its fields: `audit.entries` without a detour.

Only what is exactly as its type says passes; anything else raises one of `ODD` and the caller takes the long
way, which names the field or copes. A writer gives RFC 8785 text: keys are ASCII and sorted, the strings'
escapes are `json`'s own. A reader checks no value: the caller writes the body again and compares the bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from functools import lru_cache
from json.encoder import encode_basestring
from operator import attrgetter
from typing import Any, Final, get_args, get_origin, get_type_hints

from audit.canonical import MAX_INTEGER

Writer = Callable[[Any], str]
Reader = Callable[[Any], Any]

_FEW: Final = 16
_KNOWN_PARTS: Final = 32
_KNOWN_BODIES: Final = 128
_SIGNATURE: Final = "signature"

_writers: dict[tuple[type[Any], frozenset[str], frozenset[str]], Writer] = {}
_readers: dict[type[Any], Reader] = {}
_is_pseudonym = re.compile(r"[0-9a-f]{32}").fullmatch
_is_digest = re.compile(r"[0-9a-f]{64}").fullmatch


class OddError(Exception):
    """A value is not exactly of its field's type."""


ODD: Final = (OddError, TypeError, ValueError, KeyError, AttributeError, RecursionError)


def writer_of(kind: type[Any], digests: frozenset[str], without: frozenset[str] = frozenset()) -> Writer:
    """Return what writes bodies of `kind`; `digests` are names of fields that hold a hex SHA-256.

    Fields `without` are left out, of the body itself and not of its parts.
    """
    writer = _writers.get((kind, digests, without))
    if writer is None:
        writer = _writers[kind, digests, without] = _body_writer(kind, digests, without)
    return writer


def reader_of(kind: type[Any]) -> Reader:
    """Return what builds bodies of `kind` from a parsed object; of its values it checks the shape alone."""
    reader = _readers.get(kind)
    if reader is None:
        reader = _readers[kind] = _body_reader(kind)
    return reader


def _body_writer(kind: type[Any], digests: frozenset[str], without: frozenset[str]) -> Writer:
    hints = {name: hint for name, hint in get_type_hints(kind).items() if name not in without}
    later = {f.name: f.default for f in fields(kind) if f.default is not MISSING}
    if later:
        return _later_writer(kind, hints, later, digests)
    names = sorted(hints)
    template = "{" + ",".join(f'"{name}":%s' for name in names) + "}"
    writers = [_value_writer(hints[name], name, digests) for name in names]
    if len(names) == 1:
        read, only = attrgetter(names[0]), writers[0]
        return lambda body: template % only(read(body))
    read_all = attrgetter(*names)

    def write(body: Any) -> str:
        values = zip(writers, read_all(body), strict=True)
        return template % tuple([put(value) for put, value in values])

    return write


def _later_writer(
    kind: type[Any], hints: dict[str, Any], later: dict[str, Any], digests: frozenset[str]
) -> Writer:
    """For a type with fields that a later release added: left out where they have their default."""
    if _SIGNATURE in {field.name for field in fields(kind)}:
        return _signed_writer(kind, hints, digests)
    names = sorted(hints)
    steps = [
        (f'"{name}":', _value_writer(hints[name], name, digests), later.get(name, MISSING)) for name in names
    ]
    read_all = attrgetter(*names)

    def write(body: Any) -> str:
        parts = [
            key + put(value)
            for (key, put, default), value in zip(steps, read_all(body), strict=True)
            if value != default
        ]
        return "{" + ",".join(parts) + "}"

    return write


class _Members:
    """The members of signed bodies of one type, written once a body: it is asked for them as a whole, without
    its signature, and without what an odometer leaves out. Frozen, it stays what it was.
    """

    def __init__(self, kind: type[Any], digests: frozenset[str]) -> None:
        hints, later = get_type_hints(kind), {f.name: f.default for f in fields(kind)}
        self._names = sorted(hints)
        self._steps = {
            name: (f'"{name}":', _value_writer(hints[name], name, digests), later[name])
            for name in self._names
        }
        self._read_all = attrgetter(*self._names)
        self._young: dict[int, tuple[Any, dict[str, str]]] = {}  # by identity
        self._old: dict[int, tuple[Any, dict[str, str]]] = {}

    def of(self, body: Any) -> dict[str, str]:
        """Return the body's members by name, in order, each as text; not to be changed."""
        found = self._young.get(id(body)) or self._old.get(id(body))
        if found is not None and found[0] is body:
            return found[1]
        members = {}
        for name, value in zip(self._names, self._read_all(body), strict=True):
            key, put, default = self._steps[name]
            if value != default:
                members[name] = key + put(value)
        self._keep(body, members)
        return members

    def replace(self, body: Any, changes: dict[str, Any]) -> Any:
        """As `dataclasses.replace`; members that stay are not written again."""
        made = replace(body, **changes)
        found = self._young.get(id(body)) or self._old.get(id(body))
        if found is not None and found[0] is body and changes.keys() <= found[1].keys():
            members = dict(found[1])
            for name in changes:
                key, put, default = self._steps[name]
                value = getattr(made, name)
                if value == default:
                    return made
                members[name] = key + put(value)
            self._keep(made, members)
        return made

    def _keep(self, body: Any, members: dict[str, str]) -> None:
        if len(self._young) >= _KNOWN_BODIES:
            self._old, self._young = self._young, {}
        self._young[id(body)] = (body, members)


_members: dict[tuple[type[Any], frozenset[str]], _Members] = {}


def members_of(kind: type[Any], digests: frozenset[str]) -> _Members:
    found = _members.get((kind, digests))
    if found is None:
        found = _members[kind, digests] = _Members(kind, digests)
    return found


def _signed_writer(kind: type[Any], hints: dict[str, Any], digests: frozenset[str]) -> Writer:
    members, wanted = members_of(kind, digests), frozenset(hints)
    if len(wanted) == len(fields(kind)):
        return lambda body: "{" + ",".join(members.of(body).values()) + "}"
    return lambda body: (
        "{" + ",".join([text for name, text in members.of(body).items() if name in wanted]) + "}"
    )


def _body_reader(kind: type[Any]) -> Reader:
    readers = [
        (name, reader) for name, hint in get_type_hints(kind).items() if (reader := _value_reader(hint))
    ]
    later = [(f.name, f.default) for f in fields(kind) if f.default is not MISSING]

    def read(value: Any) -> Any:
        if type(value) is not dict:
            raise OddError
        for name, default in later:
            if name in value and value[name] in (default, [*default] if type(default) is tuple else default):
                raise OddError  # it is left out where it is empty
        if not readers:
            return kind(**value)
        made = dict(value)
        for name, reader in readers:
            if name in made:
                made[name] = reader(made[name])
        return kind(**made)

    return read


def _value_writer(hint: Any, name: str, digests: frozenset[str]) -> Writer:
    if hint is str:
        return _digest if name in digests else _pseudonym if name == "subject" else encode_basestring
    if hint is int:
        return _integer
    if get_origin(hint) is tuple:
        item = _value_writer(get_args(hint)[0], "", digests)
        if item is encode_basestring:
            return _texts

        def array(values: Any) -> str:
            if type(values) is not tuple:
                raise OddError
            return f"[{','.join([item(value) for value in values])}]"

        return array
    part = writer_of(hint, digests)
    known: dict[int, tuple[Any, str]] = {}  # by identity: a frozen part that comes again is written once

    def nested(value: Any) -> str:
        found = known.get(id(value))
        if found is not None and found[0] is value:
            return found[1]
        if type(value) is not hint:
            raise OddError
        text = part(value)
        if len(known) >= _KNOWN_PARTS:
            known.clear()
        known[id(value)] = (value, text)
        return text

    return nested


def _value_reader(hint: Any) -> Reader | None:
    if hint in (str, int):
        return None
    if get_origin(hint) is not tuple:
        return reader_of(hint)
    item = _value_reader(get_args(hint)[0])

    def array(values: Any) -> tuple[Any, ...]:
        if type(values) is not list:
            raise OddError
        return tuple(values) if item is None else tuple([item(value) for value in values])

    return array


def _texts(values: Any) -> str:
    if type(values) is not tuple:
        raise OddError
    return _many_texts(values) if len(values) > _FEW else f"[{','.join(map(encode_basestring, values))}]"


@lru_cache(maxsize=8)
def _many_texts(values: tuple[str, ...]) -> str:
    """The names of a round's participants are in each of its statements: written once, not once a site."""
    return f"[{','.join(map(encode_basestring, values))}]"


def _digest(value: Any) -> str:
    if not _is_digest(value):
        raise OddError
    return f'"{value}"'


def _pseudonym(value: Any) -> str:
    if not _is_pseudonym(value):
        raise OddError
    return f'"{value}"'


def _integer(value: Any) -> str:
    if type(value) is not int or not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise OddError
    return str(value)

"""Entries take a short way to bytes and back; it must never differ from the long one, nor from rfc8785."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from audit import _codec, entries
from audit._codec import ODD, writer_of
from audit.canonical import MAX_INTEGER, canonical_bytes
from audit.changed_body import with_fields
from audit.entries import (
    TYPES,
    Entry,
    EntryError,
    IndexColumns,
    KeyRevoked,
    RoundAbandoned,
    SiteStatement,
    SiteUndelivered,
    columns_of,
    decode_entry,
    encode_entry,
    index_columns,
    new_entry,
)
from audit.errors import AuditError, CanonicalError

DIGESTS = entries._DIGEST_FIELDS
TIME = "2026-11-23T22:23:12Z"
PSEUDONYM = st.text("0123456789abcdef", min_size=32, max_size=32)
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
WHOLE = st.integers(-MAX_INTEGER, MAX_INTEGER)


def values_of(hint: Any, name: str = "") -> st.SearchStrategy[Any]:
    if hint is str:
        return HEX if name in DIGESTS else PSEUDONYM if name == "subject" else TEXT
    if hint is int:
        return WHOLE
    if get_origin(hint) is tuple:
        return st.lists(values_of(get_args(hint)[0]), max_size=3).map(tuple)
    return bodies_of(hint)


def bodies_of(kind: type[Any]) -> st.SearchStrategy[Any]:
    later = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    values = {name: values_of(hint, name) for name, hint in get_type_hints(kind).items()}
    values |= {name: st.just(default) | values[name] for name, default in later.items()}
    if "packed" in values:
        values["packed"] = st.just("")  # whoever makes one makes it whole; a decoded one may hold anything
    return st.builds(kind, **values)


BODIES = st.one_of([bodies_of(kind) for kind in TYPES.values()])
ANY_JSON = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, HEX, st.lists(TEXT, max_size=2), st.just({})
)


@given(BODIES)
def test_bytes_are_the_oracles_and_read_back_for_every_type(body: Any) -> None:
    entry = new_entry(body, actor="tester", time=TIME)
    data = encode_entry(entry)
    assert data == rfc8785.dumps(entries._document(entry))
    assert decode_entry(data) == entries._decode_slowly(data) == entry
    assert columns_of(data) == index_columns(entry) == slow_columns(entry)


def slow_columns(entry: Entry) -> IndexColumns:
    body: Any = entry.body.statement if isinstance(entry.body, SiteUndelivered) else entry.body
    found = {
        name: value
        for name in ("model", "version", "run", "site", "principal", "subject")
        if isinstance(value := getattr(body, name, None), str) and value
    }
    number = getattr(body, "round", None)
    return IndexColumns(
        type=entry.type,
        actor=entry.actor,
        time=entry.time,
        round=number if isinstance(number, int) else None,
        **found,
    )


@given(BODIES, st.data())
def test_odd_field_meets_the_same_fate_as_on_the_long_way(body: Any, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(get_type_hints(type(body)).keys() - {"packed"})))
    odd = dataclasses.replace(body, **{name: data.draw(st.one_of(ANY_JSON, st.just("\ud800")))})
    entry = new_entry(odd, actor="tester", time=TIME)
    assert outcome(encode_entry, entry) == outcome(lambda e: canonical_bytes(entries._document(e)), entry)


SIGNED = st.one_of([bodies_of(kind) for kind in TYPES.values() if kind in entries.DOMAINS])


@given(SIGNED, st.data())
def test_what_is_kept_of_a_signed_body_is_of_it_alone(body: Any, data: st.DataObject) -> None:
    """However it was made, and in whatever order it is asked for, its bytes are those of the long way."""
    kind = type(body)
    if data.draw(st.booleans()):
        entries.signing_payload(body)
    other = data.draw(bodies_of(kind))
    names = data.draw(st.sets(st.sampled_from(sorted(get_type_hints(kind))), max_size=3))
    changes = {name: getattr(other, name) for name in names}
    changed = with_fields(body, **changes)
    assert changed == dataclasses.replace(body, **changes)
    for one in data.draw(st.permutations([body, changed, body])):
        slow = entries._plain(one)
        assert entries.body_bytes(one) == canonical_bytes(slow)
        unsigned = {name: value for name, value in slow.items() if name not in entries.SIGNATURE_FIELDS}
        assert entries.signing_payload(one) == (entries.DOMAINS[kind], canonical_bytes(unsigned))
        if isinstance(one, SiteStatement):
            hashed = canonical_bytes({name: slow[name] for name in entries._HASHED})
            digest = hashlib.sha256(b"affidavit/event/v1\x00" + hashed).hexdigest()
            assert entries.event_hash(one) == digest


@settings(max_examples=3)
@given(bodies_of(SiteStatement))
def test_what_is_kept_of_signed_bodies_does_not_grow(body: Any) -> None:
    for number in range(3 * _codec._KNOWN_BODIES):
        entries.signing_payload(dataclasses.replace(body, round=number))
    members = _codec.members_of(SiteStatement, entries._DIGEST_FIELDS)
    assert len(members._young) + len(members._old) <= 2 * _codec._KNOWN_BODIES


@given(BODIES, st.data())
def test_changed_document_is_read_as_on_the_long_way(body: Any, data: st.DataObject) -> None:
    document = json.loads(encode_entry(new_entry(body, actor="tester", time=TIME)))
    place = data.draw(st.sampled_from([document, document["body"]]))
    name = data.draw(st.sampled_from([*sorted(place), "unknown"]))
    if data.draw(st.booleans()):
        place.pop(name, None)
    else:
        place[name] = data.draw(ANY_JSON)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert outcome(decode_entry, text.encode()) == outcome(entries._decode_slowly, text.encode())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"v":1', b'"v":1.0'),
        (b'"v":1', b'"v":true'),
        (b'"v":1', b'"v":1,"v":1'),
        (b'"round":3', b'"round":3e0'),
        (b'"round":3', b'"round":-0'),
        (b'"round":3', b'"round":true'),
        (b'"round":3', b'"round":9007199254740993'),
        (b'"round":3', b'"round":' + b"1" * 5000),
        (b'"round":3', b'"round":3 '),
        (b'"round":3', b'"round":3,"round":3'),
        (b'"missing":[]', b'"missing":{}'),
        (b'"missing":[]', b'"missing":""'),
        (b'"missing":[]', b'"missing":[[[]]]'),
        (b'"missing":[]', b'"missing":' + b"[" * 5000 + b"]" * 5000),
        (b'"actor"', b'"\\u0061ctor"'),
        (b"tester", b"te\\u0073ter"),
        (b"tester", b"\\ud800"),
        (b"tester", b"\xff"),
        (b'{"actor"', b'\xef\xbb\xbf{"actor"'),
        (b'{"actor"', b'[{"actor"'),
    ],
)
def test_other_spelling_of_an_entry_is_refused_and_names_the_field(old: bytes, new: bytes) -> None:
    body = RoundAbandoned(run="r", round=3, reason="", missing=())
    data = encode_entry(new_entry(body, actor="tester", time=TIME))
    assert data.count(old) == 1
    with pytest.raises(EntryError):
        decode_entry(data.replace(old, new))


def test_utf16_twin_of_an_entry_is_refused() -> None:
    data = encode_entry(new_entry(KeyRevoked(key_id="k"), actor="tester", time=TIME))
    for encoding in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig"):
        with pytest.raises(EntryError):
            decode_entry(data.decode().encode(encoding))


def test_lone_surrogate_has_no_bytes() -> None:
    with pytest.raises(CanonicalError):
        encode_entry(new_entry(KeyRevoked(key_id="\ud800"), actor="tester", time=TIME))


def test_writer_refuses_a_part_of_another_kind() -> None:
    for body in (object(), {"key_id": "k"}, RoundAbandoned(run="r", round=1, reason="", missing=["a"])):  # type: ignore[arg-type]
        kind = KeyRevoked if not isinstance(body, RoundAbandoned) else RoundAbandoned
        with pytest.raises(ODD):
            writer_of(kind, DIGESTS)(body)


def test_made_event_ids_ascend_with_time_and_never_repeat() -> None:
    made = [new_entry(KeyRevoked(key_id="k"), actor="tester", time=TIME).event_id for _ in range(300)]
    assert made == sorted(set(made))
    later = new_entry(KeyRevoked(key_id="k"), actor="tester", time="2026-11-23T22:23:13Z").event_id
    assert later > made[-1]


def test_entry_without_a_time_says_so() -> None:
    with pytest.raises(EntryError) as caught:
        new_entry(KeyRevoked(key_id="k"), actor="tester", time="yesterday")
    assert caught.value.field == "time"


def outcome(act: Any, given: Any) -> Any:
    try:
        return act(given)
    except AuditError as error:
        return type(error), error.code, str(error)

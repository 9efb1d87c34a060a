"""Leaves are read strictly, signed over exact bytes, and indexed from their own bytes alone."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import MISSING, fields, replace

import pytest

from audit.canonical import canonical_bytes
from audit.entries import (
    REFUSAL_CODES,
    TYPE_OF,
    TYPES,
    ZERO_DIGEST,
    Entry,
    EntryError,
    KeyCreated,
    MechanismEvent,
    RoundCompleted,
    SiteStatement,
    SiteUndelivered,
    body_bytes,
    body_document,
    columns_of,
    decode_entry,
    decode_signature,
    encode_entry,
    event_hash,
    new_entry,
    parse_body,
    signing_payload,
)
from audit.known_leaf import decode_entry_of

EVENT = MechanismEvent(
    mechanism="discrete_gaussian",
    sampling="full",
    sample_rate="1",
    steps=1,
    sigma_grid=200_000_000,
    sensitivity_grid=16_777_300,
    dimension=31,
    grid_bits=24,
    relation="add_remove",
    unit="row",
)
STATEMENT = SiteStatement(
    run="run-1",
    round=3,
    charter="a" * 64,
    site="north",
    population="p" * 32,
    base_model="b" * 64,
    participants=("east", "north"),
    agent_code="c" * 64,
    previous_round=ZERO_DIGEST,
    event=EVENT,
    sequence=3,
    previous_event="d" * 64,
    update="e" * 64,
    signature="",
)


@pytest.fixture
def leaf() -> bytes:
    return encode_entry(new_entry(STATEMENT, actor="site:north", time="2026-01-02T03:04:05Z"))


def edited(leaf: bytes, path: list[str], value: object) -> bytes:
    document = json.loads(leaf)
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    return canonical_bytes(document)


def test_an_entry_survives_its_own_bytes(leaf: bytes) -> None:
    entry = decode_entry(leaf)
    assert entry.body == STATEMENT
    assert encode_entry(entry) == leaf


def test_equal_bodies_make_different_leaves() -> None:
    first, second = (new_entry(STATEMENT, actor="a", time="2026-01-02T03:04:05Z") for _ in range(2))
    assert encode_entry(first) != encode_entry(second)


def test_every_type_has_one_body_and_back() -> None:
    assert {TYPE_OF[body]: body for body in TYPES.values()} == TYPES


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        (["v"], 2, "v"),
        (["v"], True, "v"),
        (["type"], "site.rumour", "type"),
        (["type"], 3, "type"),
        (["event_id"], "A" * 32, "event_id"),
        (["nonce"], "ab", "nonce"),
        (["time"], "2026-01-02 03:04:05", "time"),
        (["time"], 1767323045, "time"),
        (["actor"], "Somebody Else", "actor"),
        (["extra"], 1, "entry"),
        (["body", "extra"], 1, "body"),
        (["body", "round"], "3", "body.round"),
        (["body", "round"], True, "body.round"),
        (["body", "site"], 3, "body.site"),
        (["body", "charter"], "A" * 64, "body.charter"),
        (["body", "charter"], "a" * 63, "body.charter"),
        (["body", "participants"], "north", "body.participants"),
        (["body", "participants"], [1], "body.participants[0]"),
        (["body", "event", "steps"], "1", "body.event.steps"),
        (["body", "event", "extra"], 0, "body.event"),
    ],
)
def test_a_changed_leaf_is_refused_by_field(leaf: bytes, path: list[str], value: object, field: str) -> None:
    with pytest.raises(EntryError) as caught:
        decode_entry(edited(leaf, path, value))
    assert caught.value.field == field


@pytest.mark.parametrize("name", ["v", "type", "event_id", "nonce", "time", "actor", "body"])
def test_a_missing_envelope_field_is_refused(leaf: bytes, name: str) -> None:
    document = json.loads(leaf)
    del document[name]
    with pytest.raises(EntryError):
        decode_entry(canonical_bytes(document))


@pytest.mark.parametrize("name", [f.name for f in fields(SiteStatement) if f.default is MISSING])
def test_a_missing_body_field_is_refused(leaf: bytes, name: str) -> None:
    document = json.loads(leaf)
    del document["body"][name]
    with pytest.raises(EntryError) as caught:
        decode_entry(canonical_bytes(document))
    assert name in caught.value.problem


@pytest.mark.parametrize(
    "data",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"v":1,"v":1}', b"{" * 5_000, b"1" * 70_000],
)
def test_what_is_no_entry_is_refused(data: bytes) -> None:
    with pytest.raises(EntryError):
        decode_entry(data)


def test_bytes_that_are_not_canonical_are_refused(leaf: bytes) -> None:
    with pytest.raises(EntryError):
        decode_entry(json.dumps(json.loads(leaf)).encode())
    with pytest.raises(EntryError):
        decode_entry(leaf + b"\n")


def test_an_entry_too_large_for_a_leaf_is_refused() -> None:
    huge = replace(STATEMENT, participants=tuple(f"site-{i}" for i in range(10_000)))
    with pytest.raises(EntryError, match="65535"):
        encode_entry(new_entry(huge, actor="a", time="2026-01-02T03:04:05Z"))


def test_a_wrongly_typed_body_never_becomes_a_leaf() -> None:
    with pytest.raises(EntryError, match=r"body\.round"):
        encode_entry(new_entry(replace(STATEMENT, round="3"), actor="a", time="2026-01-02T03:04:05Z"))  # type: ignore[arg-type]


def test_an_envelope_checks_itself() -> None:
    with pytest.raises(EntryError, match="actor"):
        Entry(event_id="0" * 32, nonce="0" * 32, time="2026-01-02T03:04:05Z", actor="", body=STATEMENT)


def test_the_signed_bytes_leave_out_the_signature_alone() -> None:
    domain, payload = signing_payload(STATEMENT)
    assert domain == "statement"
    assert signing_payload(replace(STATEMENT, signature="x")) == (domain, payload)
    for field in fields(SiteStatement):
        if field.name in {"signature", "event"}:
            continue
        changed = {str: "other", int: 99, tuple: ("other",)}[type(getattr(STATEMENT, field.name))]
        assert signing_payload(replace(STATEMENT, **{field.name: changed}))[1] != payload, field.name


def test_bodies_that_nobody_signs_have_no_payload() -> None:
    body = RoundCompleted(
        run="r",
        round=1,
        base_model=ZERO_DIGEST,
        statements=(),
        missing=(),
        output_model=ZERO_DIGEST,
        metrics=(),
    )
    with pytest.raises(EntryError):
        signing_payload(body)


def test_an_event_hash_covers_what_the_accountant_reads() -> None:
    first = event_hash(STATEMENT)
    for change in (
        {"sequence": 4},
        {"previous_event": "0" * 64},
        {"population": "q" * 32},
        {"run": "run-2"},
        {"round": 4},
        {"event": replace(EVENT, sigma_grid=1)},
        {"event": replace(EVENT, steps=2)},
    ):
        assert event_hash(replace(STATEMENT, **change)) != first, change
    assert event_hash(replace(STATEMENT, signature="x", update="f" * 64)) == first


def test_columns_come_from_the_bytes(leaf: bytes) -> None:
    columns = columns_of(leaf)
    assert (columns.type, columns.run, columns.site, columns.round) == ("site.statement", "run-1", "north", 3)
    lost = encode_entry(
        new_entry(SiteUndelivered(statement=STATEMENT), actor="a", time="2026-01-02T03:04:05Z")
    )
    assert (columns_of(lost).type, columns_of(lost).site) == ("site.undelivered", "north")


@pytest.mark.parametrize("text", ["", "AAAA", "A" * 88, base64.b64encode(bytes(63)).decode(), "é" * 88])
def test_a_signature_that_is_not_64_bytes_is_refused(text: str) -> None:
    with pytest.raises(EntryError):
        decode_signature(text)


def test_a_signature_has_one_spelling() -> None:
    text = base64.b64encode(bytes(64)).decode()
    assert decode_signature(text) == bytes(64)
    with pytest.raises(EntryError):
        decode_signature(text[:-3] + "B==")


def test_refusals_say_nothing_of_data() -> None:
    assert all(code.replace("_", "").isalpha() and len(code) < 32 for code in REFUSAL_CODES)


def test_bytes_of_a_body_are_those_of_its_document():
    for body in (STATEMENT, replace(STATEMENT, site='"\\\u2028é\x7f'), EVENT):
        assert body_bytes(body) == canonical_bytes(body_document(body))
    with pytest.raises(EntryError):
        body_bytes(replace(STATEMENT, charter="no digest"))


def test_signed_bytes_and_event_hash_are_those_of_the_slow_way():
    document = body_document(STATEMENT)
    assert signing_payload(STATEMENT)[1] == canonical_bytes(
        {key: value for key, value in document.items() if key != "signature"}
    )
    hashed = ("population", "sequence", "previous_event", "run", "round", "charter", "event")
    data = canonical_bytes({key: document[key] for key in hashed})
    assert event_hash(STATEMENT) == hashlib.sha256(b"affidavit/event/v1\x00" + data).hexdigest()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("participants",), "east"),
        (("participants",), ["east", 1]),
        (("participants",), ("east",)),
        (("round",), True),
        (("round",), 1.0),
        (("round",), "1"),
        (("site",), None),
        (("base_model",), "B" * 64),
        (("event",), []),
        (("event", "steps"), False),
        (("event", "share_grid"), 0),
        (("roster",), ""),
        (("also",), "this"),
    ],
)
def test_a_document_with_one_odd_value_is_no_body(path, value):
    document = body_document(STATEMENT)
    *above, last = path
    target = document
    for name in above:
        target = target[name]
    target[last] = value
    if isinstance(value, tuple):
        assert parse_body(SiteStatement, body_document(STATEMENT)) == STATEMENT
    with pytest.raises(EntryError) as caught:
        parse_body(SiteStatement, document)
    assert ".".join(("body", *path[:-1])) in str(caught.value) or path == ("also",)


def test_an_empty_list_of_a_later_field_is_left_out():
    """One body has one form: a leaf that writes out what is left out where it is empty is another one."""
    body = KeyCreated(**{field.name: "" for field in fields(KeyCreated) if field.default is MISSING})
    document = body_document(body)
    assert "models" not in document
    with pytest.raises(EntryError, match="left out"):
        parse_body(KeyCreated, {**document, "models": []})


def test_the_leaf_of_a_body_at_hand_is_what_it_is_when_read_whole(leaf: bytes) -> None:
    found = decode_entry_of(leaf, STATEMENT)
    assert found == decode_entry(leaf)
    assert found is not None
    assert found.body is STATEMENT


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["body", "round"], 4),
        (["body", "signature"], "c2ln"),
        (["type"], "site.undelivered"),
        (["v"], 2),
        (["actor"], "Site:north"),
        (["actor"], "site:n\u00f6rth"),
        (["nonce"], "f" * 31),
        (["event_id"], "F" * 32),
        (["time"], "2026-01-02T03:04:05"),
        (["more"], 1),
    ],
)
def test_any_other_leaf_is_not_taken_for_it(leaf: bytes, path: list[str], value: object) -> None:
    assert decode_entry_of(edited(leaf, path, value), STATEMENT) is None


def test_bytes_around_a_body_at_hand_are_read_strictly(leaf: bytes) -> None:
    body = body_bytes(STATEMENT)
    for damaged in (
        leaf + b" ",
        b" " + leaf,
        leaf[:-1],
        leaf.replace(b'","nonce', b'", "nonce'),
        leaf.replace(b'"actor":"site:north"', b'"actor":"site:\\u006eorth"'),
        leaf.replace(body, body + b"," + body),
        body,
        b"",
        leaf.replace(b'"body"', b'"boby"'),
    ):
        assert decode_entry_of(damaged, STATEMENT) is None
        with pytest.raises(EntryError):
            decode_entry(damaged)


def test_an_event_hash_is_of_the_very_statement_however_many_there_were() -> None:
    many = [replace(STATEMENT, sequence=number) for number in range(1, 600)]
    first = [event_hash(statement) for statement in many]
    assert len(set(first)) == len(many)
    assert [event_hash(replace(statement)) for statement in many] == first
    assert [event_hash(statement) for statement in many] == first

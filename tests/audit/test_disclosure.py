"""Fields open one by one: what is opened was committed to, and what stays closed cannot be guessed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.canonical import canonical_bytes
from audit.disclosure import (
    DisclosureError,
    choose,
    disclosed_document,
    new_part,
    opened_row,
    parse_disclosed,
    root_of,
    verify_disclosed,
    whole,
)
from audit.entries import Prediction, RowCommitment
from audit.errors import AuditError
from tests.soak_report import Report

AGES = [str(age) for age in range(121)]


def sealed() -> dict[str, Any]:
    return {
        "context": new_part({"purpose": "triage", "request_id": "a" * 32}),
        "row.0.input": new_part({"age": "51", "fever": True, "ward": "north"}),
        "row.0.output": new_part({"label": "ill", "probability": "0.75"}),
        "row.1.input": new_part({"age": "7", "fever": True, "ward": "north"}),
        "row.1.output": new_part({"label": "well", "probability": "0.25"}),
    }


def entry_of(parts: dict[str, Any]) -> Prediction:
    rows = tuple(
        RowCommitment(
            input=parts[f"row.{n}.input"].root(f"row.{n}.input"),
            output=parts[f"row.{n}.output"].root(f"row.{n}.output"),
        )
        for n in range(2)
    )
    digest = "0" * 64
    return Prediction(
        request_id="", model="toy", version=digest, charter=digest, transition=digest, purpose="",
        principal="p-1", role="consumer", site="", policies=("p",), policy_set=digest, rows=rows,
        subject="a" * 32, context=parts["context"].root("context"), sealed=digest,
    )  # fmt: skip


def test_chosen_fields_open_and_the_others_stay_closed() -> None:
    parts = sealed()
    chosen = choose(parts, ["age", "context.purpose"])
    verify_disclosed(entry_of(parts), chosen)
    assert {part: sorted(found.opened) for part, found in chosen.items()} == {
        "context": ["purpose"],
        "row.0.input": ["age"],
        "row.1.input": ["age"],
    }
    assert sorted(chosen["row.0.input"].closed) == ["fever", "ward"]
    text = json.dumps(disclosed_document({7: chosen}))
    assert "north" not in text
    assert "0.75" not in text
    assert parse_disclosed(disclosed_document({7: chosen})) == {7: chosen}


def test_opened_field_tells_nothing_about_its_neighbours_salts() -> None:
    part = sealed()["row.0.input"]
    opened = part.disclose("row.0.input", ["age"]).opened["age"]
    for name, value in (("fever", b"true"), ("ward", b'"north"')):
        head = b"\x00".join((b"affidavit/field/v1", b"row.0.input", name.encode(), b""))
        for salt in (opened.salt, part.salt, b"\0" * 32, hashlib.sha256(opened.salt).digest()):
            guess = hashlib.sha256(head + salt + value).hexdigest()
            assert guess != part.open("row.0.input", name).commitment("row.0.input", name)


@pytest.mark.reported
def test_guessing_recovers_every_unsalted_value_and_no_salted_one(report: Report) -> None:
    unsalted = [hashlib.sha256(b'"%s"' % age.encode()).hexdigest() for age in AGES]
    by_hash = {hashlib.sha256(f'"{age}"'.encode()).hexdigest(): age for age in AGES}
    assert [by_hash.get(digest) for digest in unsalted] == AGES
    parts = [new_part({"age": age}) for age in AGES]
    leaf = [part.root("row.0.input") for part in parts]
    commitments = [part.open("row.0.input", "age").commitment("row.0.input", "age") for part in parts]
    guesses = set(by_hash) | {root_of({"age": digest}) for digest in by_hash}
    for salt in (b"", b"\0" * 32):
        head = b"\x00".join((b"affidavit/field/v1", b"row.0.input", b"age", b""))
        made = [hashlib.sha256(head + salt + f'"{age}"'.encode()).hexdigest() for age in AGES]
        guesses |= set(made) | {root_of({"age": digest}) for digest in made}
    assert not guesses & set(leaf)
    assert not guesses & set(commitments)
    report(
        "erasure",
        size=f"{len(AGES)} ages, every possible one guessed",
        result=f"{len(AGES)} of {len(AGES)} recovered from plain hashes, 0 from ours",
    )


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.soak)])
def test_equal_inputs_have_distinct_commitments(count: int) -> None:
    parts = [new_part({"age": "51"}) for _ in range(count)]
    assert len({part.root("row.0.input") for part in parts}) == count
    assert len({part.open("row.0.input", "age").commitment("row.0.input", "age") for part in parts}) == count


def other_value(document: Any) -> None:
    document["7"]["row.0.input"]["opened"]["age"]["value"] = '"52"'


def other_salt(document: Any) -> None:
    document["7"]["row.0.input"]["opened"]["age"]["salt"] = "ab" * 32


def renamed(document: Any) -> None:
    opened = document["7"]["row.0.input"]["opened"]
    opened["dose"] = opened.pop("age")


def hidden_field(document: Any) -> None:
    del document["7"]["row.0.input"]["closed"]["ward"]


def further_field(document: Any) -> None:
    document["7"]["row.0.input"]["closed"]["sex"] = "ab" * 32


def moved_to_another_row(document: Any) -> None:
    document["7"]["row.1.input"] = document["7"].pop("row.0.input")


def moved_to_the_answer(document: Any) -> None:
    document["7"]["row.0.output"] = document["7"].pop("row.0.input")


def no_such_row(document: Any) -> None:
    document["7"]["row.9.input"] = document["7"].pop("row.0.input")


@pytest.mark.parametrize(
    "forge",
    [other_value, other_salt, renamed, hidden_field, further_field, moved_to_another_row,
     moved_to_the_answer, no_such_row],
)  # fmt: skip
def test_forged_disclosure_is_refused(forge: Any) -> None:
    parts = sealed()
    document = json.loads(json.dumps(disclosed_document({7: choose(parts, ["row.0.input.age"])})))
    forge(document)
    with pytest.raises(DisclosureError) as caught:
        verify_disclosed(entry_of(parts), parse_disclosed(document)[7])
    assert caught.value.code == "disclosure.mismatch"


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"x": {}},
        {"07": {}},
        {"7": []},
        {"7": {"row.0": {"opened": {}, "closed": {}}}},
        {"7": {"row.00.input": {"opened": {}, "closed": {}}}},
        {"7": {"terms": {"opened": {}}}},
        {"7": {"terms": {"opened": {}, "closed": {"a": "no hash"}}}},
        {"7": {"terms": {"opened": {"a": {"salt": "ab", "value": "1"}}, "closed": {}}}},
        {"7": {"terms": {"opened": {"a": {"salt": "ab" * 32, "value": 1}}, "closed": {}}}},
        {"7": {"terms": {"opened": {"a": {"salt": "ab" * 32, "value": "1"}}, "closed": {"a": "ab" * 32}}}},
    ],
)
def test_malformed_disclosure_is_refused(document: Any) -> None:
    with pytest.raises(DisclosureError):
        parse_disclosed(document)


def test_unknown_field_is_refused_and_the_message_names_those_that_there_are() -> None:
    with pytest.raises(DisclosureError, match=r"row\.0\.input\.ward"):
        choose(sealed(), ["income"])


def test_entry_that_is_not_sealed_has_nothing_to_open() -> None:
    parts = sealed()
    plain = dataclasses.replace(entry_of(parts), sealed="")
    with pytest.raises(DisclosureError, match="no such part"):
        verify_disclosed(plain, whole(parts))


def test_row_opened_by_its_salt_makes_the_same_root_as_its_fields() -> None:
    parts = sealed()
    part = parts["row.0.input"]
    root, values = opened_row("row.0.input", part.salt.hex(), canonical_bytes(dict(part.values)).decode())
    assert root == entry_of(parts).rows[0].input
    assert values == part.values
    for salt, text in (("zz", "{}"), ("ab" * 32, "[]"), ("ab" * 16, "{}"), ("ab" * 32, "{ }")):
        with pytest.raises(AuditError):
            opened_row("row.0.input", salt, text)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.dictionaries(
    TEXT.filter(lambda name: name and "\0" not in name),
    TEXT | st.integers(-(2**53) + 1, 2**53 - 1) | st.booleans() | st.none() | st.lists(TEXT, max_size=2),
    max_size=6,
)


@given(VALUES, st.sampled_from(["context", "terms", "row.0.input", "row.31.output"]))
def test_root_of_all_is_made_of_each_fields_own_commitment(values: dict[str, Any], part: str) -> None:
    made = new_part(values)
    each = {name: made.open(part, name).commitment(part, name) for name in values}
    assert made.root(part) == root_of(each) == made.disclose(part, list(values)[::2]).root(part)

"""An answer that was expected is read as any other: the same statement, or the same refusal."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from audit.canonical import canonical_bytes, parse_strict
from audit.entries import (
    MechanismEvent,
    SiteEnrolled,
    SiteStatement,
    body_document,
    parse_body,
    signing_payload,
)
from audit.errors import AuditError
from audit.keys import SigningKey
from audit.weights import encode_update
from federation.errors import StatementError
from federation.expected import ExpectedStatements
from federation.statements import OdometerHead, RoundTerms, verify_statement

KEYS = {name: SigningKey.generate() for name in ("north", 'söuth "2"')}
UPDATE = encode_update([1, -2, 3])
EVENT = MechanismEvent(
    mechanism="discrete_gaussian",
    sampling="full",
    sample_rate="1",
    steps=1,
    sigma_grid=8 << 20,
    sensitivity_grid=1 << 20,
    dimension=3,
    grid_bits=20,
    relation="add_remove",
    unit="row",
)


def enrolled(site):
    names = [field.name for field in dataclasses.fields(SiteEnrolled)]
    texts = dict.fromkeys(names, "") | {
        "site": site,
        "population": hashlib.sha256(site.encode()).hexdigest()[:32],
    }
    return SiteEnrolled(**(texts | {"statement_key": KEYS[site].verify_key.text}))


TERMS = RoundTerms(
    run="r",
    round=2,
    charter="a" * 64,
    base_model="b" * 64,
    participants=tuple(sorted(KEYS)),
    previous_round="c" * 64,
    event=EVENT,
    released=3,
    enrolments={site: enrolled(site) for site in KEYS},
    heads={site: OdometerHead(sequence=4, event_hash="d" * 64) for site in KEYS},
)


def statement(site, **changes):
    terms = TERMS
    honest = {
        "run": terms.run,
        "round": terms.round,
        "charter": terms.charter,
        "site": site,
        "population": terms.enrolments[site].population,
        "base_model": terms.base_model,
        "participants": terms.participants,
        "agent_code": "e" * 64,
        "previous_round": terms.previous_round,
        "event": EVENT,
        "sequence": 5,
        "previous_event": "d" * 64,
        "update": hashlib.sha256(UPDATE).hexdigest(),
        "signature": "",
    }
    unsigned = SiteStatement(**(honest | changes))
    signature = base64.b64encode(KEYS[site].sign(*signing_payload(unsigned))).decode()
    return dataclasses.replace(unsigned, signature=changes.get("signature") or signature)


def answer(body):
    return canonical_bytes({"statement": body_document(body)})


def outcome(site, raw, read, terms=TERMS):
    """What becomes of an answer: the statement that counts, or why none does."""
    try:
        header = read(raw)
        if not isinstance(header, dict) or "statement" not in header:
            return "no statement"
        accepted = verify_statement(terms, site, header["statement"], UPDATE)
    except (AuditError, StatementError) as error:
        return f"{error.code}: {error}"
    return accepted.statement


def same(site, raw, terms=TERMS):
    expected = ExpectedStatements(terms)
    found = outcome(site, raw, lambda data: expected.read(site, data), terms)
    assert found == outcome(site, raw, parse_strict, terms)
    return found


@pytest.mark.parametrize("site", KEYS)
def test_what_a_site_must_answer_is_found_and_not_read(site):
    body = statement(site)
    found = ExpectedStatements(TERMS).read(site, answer(body))["statement"]
    assert type(found) is SiteStatement
    assert found == body == parse_body(SiteStatement, json.loads(answer(body))["statement"])
    assert found.participants is TERMS.participants
    assert same(site, answer(body)) == body


def test_a_masked_rounds_statement_is_found_too():
    terms = dataclasses.replace(TERMS, roster="f" * 64)
    body = statement("north", roster="f" * 64)
    assert type(ExpectedStatements(terms).read("north", answer(body))["statement"]) is SiteStatement
    assert same("north", answer(body), terms) == body
    assert "roster" in same("north", answer(statement("north")), terms)


@pytest.mark.parametrize(
    "changes",
    [
        {"run": "other"},
        {"round": 3},
        {"sequence": 6},
        {"previous_event": "0" * 64},
        {"participants": ("north",)},
        {"base_model": "0" * 64},
        {"update": "0" * 64},
        {"update": "not hex"},
        {"agent_code": "E" * 64},
        {"agent_code": "e" * 63 + '"'},
        {"site": 'söuth "2"'},
        {"population": "0" * 32},
        {"event": dataclasses.replace(EVENT, sigma_grid=1)},
        {"signature": "A" * 86 + "=="},
        {"signature": "A" * 85 + "B=="},  # not the canonical base64 of anything
        {"signature": "not base64"},
        {"roster": "f" * 64},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_a_statement_that_says_another_thing_is_refused_for_the_same_reason(changes):
    document = body_document(statement("north")) | {
        name: dataclasses.asdict(value) if name == "event" else value for name, value in changes.items()
    }
    found = same("north", canonical_bytes({"statement": document}))
    assert isinstance(found, str)


def test_another_sites_statement_and_an_unknown_site_are_no_exception():
    other = answer(statement('söuth "2"'))
    assert isinstance(same("north", other), str)
    assert ExpectedStatements(TERMS).read("nobody", other) == parse_strict(other)


HONEST = answer(statement("north"))


@settings(max_examples=300)
@given(st.integers(0, len(HONEST) - 1), st.integers(0, 255), st.integers(0, 3))
@example(12, ord(" "), 0)
def test_bytes_that_differ_have_the_fate_of_a_whole_reading(place, byte, removed):
    same("north", HONEST[:place] + bytes([byte]) + HONEST[place + removed :])


@pytest.mark.parametrize(
    "raw",
    [
        HONEST + b" ",
        HONEST.replace(b'{"statement"', b'{ "statement"'),
        HONEST[:-1] + b',"statement":1}',
        HONEST[:-1] + b',"zzz":1}',
        HONEST.replace(b'"site":"north"', b'"site":"no\\u0072th"'),
        HONEST.replace(b'"round":2', b'"round":2.0'),
        HONEST.replace(b'"round":2', b'"round":2,"round":2'),
        b"",
        b"\xff",
        b"[]",
    ],
    ids=range(10),
)
def test_other_spellings_have_the_fate_of_a_whole_reading(raw):
    same("north", raw)

"""A coordinator takes no signature that is for another log, another start or another author."""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit.entries import (
    CharterPublished,
    CharterSigned,
    RunAccepted,
    SiteEnrolled,
    body_document,
    parse_body,
)
from audit.keys import SigningKey
from federation.errors import RunFailedError


def speaks_of(site, kind, name, body_type, **changes):
    def tamper(asked, header, blobs):
        if asked == kind and name in header:
            body = replace(parse_body(body_type, header[name]), **changes)
            if body_type is SiteEnrolled:
                body = site.signed(body, site.statement, "statement_proof")
                body = site.signed(body, site.witness, "witness_proof")
            key = site.statement if body_type is RunAccepted else site.identity
            header[name] = body_document(site.signed(body, key))

    site.tamper = tamper


def test_an_enrolment_in_another_log_is_refused(federation):
    speaks_of(federation.sites["north"], "hello", "enrolment", SiteEnrolled, origin="other.example/log")
    with pytest.raises(RunFailedError, match="north: origin"):
        federation.train()
    assert {body.site for body in federation.bodies(SiteEnrolled)} == {"south", "west"}


@pytest.mark.parametrize("changes", [{"start": "ab" * 32}, {"origin": "other.example/log"}])
def test_an_acceptance_of_another_start_or_in_another_log_does_not_count(federation, changes):
    speaks_of(federation.sites["west"], "run.propose", "acceptance", RunAccepted, **changes)
    federation.train()
    assert {body.site for body in federation.bodies(RunAccepted)} == {"north", "south"}


def test_a_signature_of_the_charter_for_another_author_is_refused(federation):
    stranger = SigningKey.generate().text
    speaks_of(federation.sites["south"], "charter.sign", "signature", CharterSigned, author=stranger)
    with pytest.raises(RunFailedError, match="south: author"):
        federation.train()


def test_a_later_run_by_somebody_else_leaves_the_charter_its_author(federation):
    federation.train()
    first, federation.author = federation.author, SigningKey.generate()
    federation.train()
    assert [body.author for body in federation.bodies(CharterPublished)] == [first.text]
    assert {body.author for body in federation.bodies(CharterSigned)} == {first.text}

"""A site says in what it signs which log, which start of a run and whose charter it means."""

from __future__ import annotations

import pytest

from audit.entries import CharterSigned, RunAccepted, RunStarted, SiteEnrolled, parse_body, run_digest
from audit.keys import SigningKey


def test_an_enrolment_names_the_log_of_the_site_s_own_policy(signed, request_of):
    agent = signed.agents["alpha"]
    body = parse_body(SiteEnrolled, request_of(agent, "hello", {})[0]["enrolment"])
    assert body.origin == agent.home.policy().logs[0].origin == signed.coordinator.origin


def test_an_acceptance_names_its_log_and_the_one_start(accepted):
    started = parse_body(RunStarted, accepted.run_started())
    answer = accepted.propose(only="beta")["beta"]
    body = parse_body(RunAccepted, answer["acceptance"])
    assert (body.start, body.origin) == (run_digest(started), accepted.coordinator.origin)


@pytest.mark.parametrize("change", [{"code": "1" * 64}, {"model": "another"}, {"sites": ("alpha", "beta")}])
def test_a_second_start_of_an_accepted_run_is_refused(accepted, code_of, change):
    assert code_of(accepted.propose(only="alpha", **change)["alpha"]) == "run_not_accepted"


def test_a_second_start_by_another_author_is_refused(accepted, code_of):
    accepted.author = SigningKey.generate()
    assert code_of(accepted.propose(only="alpha")["alpha"]) == "run_not_accepted"


def test_the_same_start_again_gets_the_same_acceptance(accepted):
    assert accepted.propose(only="gamma") == accepted.propose(only="gamma")


def test_a_charter_s_signature_binds_the_author_it_was_said_to_have(signed, request_of):
    for author in (signed.author.text, SigningKey.generate().text):
        document, _ = request_of(
            signed.agents["alpha"], "charter.sign", signed.to_sign() | {"author": author}
        )
        assert parse_body(CharterSigned, document["signature"]).author == author


@pytest.mark.parametrize("author", ["", "ed25519:", "ed25519:AAAA", "someone", 7, None])
def test_an_author_that_is_no_key_is_a_bad_request(signed, request_of, code_of, author):
    answer, _ = request_of(signed.agents["alpha"], "charter.sign", signed.to_sign() | {"author": author})
    assert code_of(answer) == "bad_request"

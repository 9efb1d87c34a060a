"""The policy that a log proposes: one voice for each operator, whatever the sites are called."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from audit.entries import SiteEnrolled, decode_entry, encode_entry, new_entry
from audit.errors import AuditError
from audit.keys import SigningKey
from audit.notes import KeyType, NoteSigner
from audit.tlog_policy import Policy
from federation.coordinator import Coordinator
from federation.errors import FederationError
from federation.statements import verify_enrolment
from federation.trust import federation_policy, log_policy

ORIGIN = "hospital.example/log"
LOG = NoteSigner(ORIGIN, SigningKey.generate()).vkey


def keys(*names: str) -> dict[str, str]:
    return {name: NoteSigner(name, SigningKey.generate(), KeyType.COSIGNATURE).vkey for name in names}


def enrolled(site: str, operator: str = "", key: str = "") -> SiteEnrolled:
    return SiteEnrolled(
        site=site, operator=operator, origin=ORIGIN, population="ab" * 16, identity_key="", statement_key="",
        witness_key=key or keys(site)[site], agreement_key="", signature="", statement_proof="",
        witness_proof="",
    )  # fmt: skip


def test_five_sites_of_two_operators_are_judged_as_three_voices(tmp_path: Path) -> None:
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN) as home:
        for site, operator in (("a", "trust"), ("b", "trust"), ("c", "trust"), ("d", ""), ("e", "")):
            home.append(enrolled(site, operator), "coordinator")
        policy = log_policy(home.ledger)
    assert Policy.parse(policy.format()) == policy
    assert [(group.name, group.rule, group.members) for group in policy.groups] == [
        ("trust", "any", ("a", "b", "c")),
        ("members", 2, ("d", "e", "trust")),
    ]
    assert not policy.evaluate(["a", "b", "c"]).satisfied, "the trust alone cannot make a quorum"
    assert policy.evaluate(["b", "d"]).satisfied


def test_latest_enrolment_decides_and_no_site_at_all_needs_nobody(tmp_path: Path) -> None:
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN) as home:
        assert log_policy(home.ledger).quorum == "none"
        newer = keys("a")["a"]
        for body in (enrolled("a"), enrolled("b"), enrolled("a", "trust", newer), enrolled("b", "trust")):
            home.append(body, "coordinator")
        policy = log_policy(home.ledger)
    assert policy.witnesses[0].verifier.vkey == newer
    assert [group.name for group in policy.groups] == ["trust", "members"]


@pytest.mark.parametrize(
    ("names", "operators"),
    [
        (("east", "north"), {"east": "north"}),
        (("members", "other"), {}),
        (("a", "b", "c"), {"a": "members", "b": "members"}),
        (("all", "any", "1"), {"all": "any"}),
    ],
)
def test_names_that_collide_give_a_policy_all_the_same(
    names: tuple[str, ...], operators: dict[str, str]
) -> None:
    policy = federation_policy(LOG, keys(*names), operators=operators)
    assert Policy.parse(policy.format()) == policy
    assert policy.evaluate(names).satisfied
    assert not policy.evaluate([]).satisfied


def test_enrolment_without_an_operator_is_the_bytes_of_an_earlier_release() -> None:
    data = encode_entry(new_entry(enrolled("a"), actor="coordinator", time="2026-01-02T03:04:05Z"))
    assert b"operator" not in data
    assert decode_entry(data).body == dataclasses.replace(decode_entry(data).body, operator="")
    named = encode_entry(new_entry(enrolled("a", "trust"), actor="coordinator", time="2026-01-02T03:04:05Z"))
    assert b'"operator":"trust"' in named
    empty = named.replace(b'"operator":"trust"', b'"operator":""')
    with pytest.raises(AuditError):
        decode_entry(empty)


@pytest.mark.parametrize("operator", ["x\nquorum none", "two words", "UPPER", "-x", "x" * 64, "é"])
def test_operator_that_is_no_name_is_refused_and_writes_no_line(tmp_path: Path, operator: str) -> None:
    """A site's word goes into everybody's policy; it must not become another line of it."""
    with Coordinator.create(tmp_path / "c", tmp_path / "s", ORIGIN) as home:
        home.append(enrolled("a", operator), "coordinator")
        home.append(enrolled("b"), "coordinator")
        policy = log_policy(home.ledger)
    assert (policy.quorum, [group.name for group in policy.groups]) == ("members", ["members"])
    document = {field.name: "" for field in dataclasses.fields(SiteEnrolled)}
    witness = keys("a")["a"]
    document |= {"site": "a", "origin": ORIGIN, "operator": operator, "witness_key": witness}
    with pytest.raises(FederationError, match="operator"):
        verify_enrolment("a", "", ORIGIN, document)

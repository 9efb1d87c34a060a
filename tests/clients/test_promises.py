"""What a site refuses before any release: a charter whose numbers cannot keep what its words promise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from audit.canonical import canonical_bytes
from clients.admission import check_promise
from clients.dp.errors import TermsError
from clients.dp.mechanism import MechanismTerms
from clients.errors import HomeError, RefusedError
from clients.terms import read_terms


def altered(canonical: str, **privacy: Any) -> str:
    document = json.loads(canonical)
    document["privacy"] |= privacy
    return canonical_bytes(document).decode()


@pytest.mark.parametrize(
    "changes",
    [{"epsilon": "1"}, {"epsilon": "0.01"}, {"delta": "0.000000001"}, {"noise_multiplier": "0.7"}],
)
def test_a_plan_that_costs_more_than_the_charter_promises_is_not_signed(
    signed, request_of, code_of, changes: dict[str, str]
) -> None:
    text = altered(signed.text(), **changes)
    document, _ = request_of(signed.agents["alpha"], "charter.sign", signed.to_sign() | {"charter": text})
    assert code_of(document) == "charter_not_approved"


@pytest.mark.parametrize(("epsilon", "kept"), [("100", True), ("3.9", True), ("3.7", False)])
def test_a_sampled_plan_is_held_to_its_promise_too(signed, epsilon: str, kept: bool) -> None:
    text = altered(signed.text(), sample_rate="0.25", epsilon=epsilon, noise_multiplier="1")
    terms = read_terms(text, site="alpha")
    if kept:
        check_promise(terms)
        return
    with pytest.raises(RefusedError, match=r"promises epsilon 3\.7"):
        check_promise(terms)


@pytest.mark.parametrize(
    ("clip", "precision"),
    [
        ("0." + "0" * 304 + "1", "float64"),
        ("0.0000001", "float64"),
        ("0.0001", "float32"),
        ("10000000", "float64"),
    ],
)
def test_a_clipping_norm_that_floating_point_cannot_hold_is_refused(
    signed, clip: str, precision: str
) -> None:
    with pytest.raises(RefusedError, match="max_grad_norm"):
        read_terms(altered(signed.text(), max_grad_norm=clip, precision=precision), site="alpha")


def test_a_persons_norm_is_shared_by_their_rows_before_it_is_judged() -> None:
    given: dict[str, Any] = {"max_grad_norm": 0.01, "noise_multiplier": 4.0, "sample_rate": 1.0}
    MechanismTerms(**given, relation="add_remove", rows_per_unit=1000)
    with pytest.raises(TermsError, match="max_grad_norm"):
        MechanismTerms(**given, relation="add_remove", rows_per_unit=100_000)


def test_a_new_pseudonym_does_not_start_the_odometer_over(network) -> None:
    network.start()
    network.play(1)
    site = network.agents["alpha"].home.path / "site.yaml"
    old = network.agents["alpha"].population
    site.write_text(site.read_text(encoding="utf-8").replace(old, "0" * 32), encoding="utf-8")
    with pytest.raises(HomeError, match="population"):
        network.restart("alpha")
    site.write_text(site.read_text(encoding="utf-8").replace("0" * 32, old), encoding="utf-8")
    assert network.restart("alpha").ledger.head(old).sequence == 1

"""Masked rounds when the coordinator lies: about keys, shares and survivors, or by asking twice."""

from __future__ import annotations

import base64
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from audit.entries import body_document, parse_body, signing_payload
from audit.keys import SigningKey
from audit.masking import (
    combined,
    mask_words,
    pair_mask_key,
    sign_of,
)
from audit.secure_bodies import MaskKeys
from audit.secure_round import keys_digest
from audit.shamir import Opening
from audit.weights import decode_update
from clients.identity import signature_text
from tests.clients.conftest import SITES, Network, call, refusal_code
from tests.clients.masked_driver import Answer, Driver, own_key

# the coordinator in the middle


def forged_keys(driver: Driver, site: str, *, key: SigningKey | None = None, **changes: Any) -> Answer:
    """Keys of the coordinator's own making in a site's name."""
    private = X25519PrivateKey.generate().public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    body = parse_body(MaskKeys, driver.keys[site])
    body = dataclasses.replace(body, **({"mask_key": base64.b64encode(private).decode()} | changes))
    if key is not None:
        domain, payload = signing_payload(body)
        body = dataclasses.replace(body, signature=signature_text(key, domain, payload))
    return body_document(body)


Lie = Callable[[Driver, list[Answer]], None]


def _swap_key(driver: Driver, shown: list[Answer]) -> None:
    shown[1]["keys"] = forged_keys(driver, "beta")


def _sign_by_stranger(driver: Driver, shown: list[Answer]) -> None:
    shown[1]["keys"] = forged_keys(driver, "beta", key=SigningKey.generate())


def _enrol_stranger(driver: Driver, shown: list[Answer]) -> None:
    """A whole new site with keys of the coordinator's, under a member's name."""
    stranger = SigningKey.generate()
    shown[1]["keys"] = forged_keys(driver, "beta", key=stranger)
    shown[1]["enrolment"] = {**shown[1]["enrolment"], "statement_key": stranger.text}


def _old_round(driver: Driver, shown: list[Answer]) -> None:
    shown[1]["keys"] = forged_keys(driver, "beta", key=own_key(driver, "beta"), round=2)


def _other_run(driver: Driver, shown: list[Answer]) -> None:
    shown[1]["keys"] = forged_keys(driver, "beta", key=own_key(driver, "beta"), run="run-0")


def _other_participants(driver: Driver, shown: list[Answer]) -> None:
    changed = ("alpha", "beta")
    shown[1]["keys"] = forged_keys(driver, "beta", key=own_key(driver, "beta"), participants=changed)


def _too_few(driver: Driver, shown: list[Answer]) -> None:
    del shown[1:]


def _leave_out_me(driver: Driver, shown: list[Answer]) -> None:
    del shown[0]


def _my_keys_changed(driver: Driver, shown: list[Answer]) -> None:
    shown[0]["keys"] = forged_keys(driver, "alpha", key=own_key(driver, "alpha"))


def _one_key_twice(driver: Driver, shown: list[Answer]) -> None:
    mine = shown[2]["keys"]["mask_key"]
    shown[1]["keys"] = forged_keys(driver, "beta", key=own_key(driver, "beta"), mask_key=mine)


def _one_key_in_another_dress(driver: Driver, shown: list[Answer]) -> None:
    """beta between alpha and gamma: with gamma's key for alpha's its two masks would cancel each other."""
    mine = bytearray(base64.b64decode(shown[2]["keys"]["mask_key"]))
    mine[31] ^= 0x80  # X25519 ignores this bit
    changed = base64.b64encode(bytes(mine)).decode()
    shown[1]["keys"] = forged_keys(driver, "beta", key=own_key(driver, "beta"), mask_key=changed)


def _small_mask_key(driver: Driver, shown: list[Answer]) -> None:
    one = base64.b64encode(b"\x01" + bytes(31)).decode()
    shown[1]["keys"] = forged_keys(driver, "beta", key=own_key(driver, "beta"), mask_key=one)


def _small_key(driver: Driver, shown: list[Answer]) -> None:
    zeros = base64.b64encode(bytes(32)).decode()
    shown[1]["keys"] = forged_keys(driver, "beta", key=own_key(driver, "beta"), share_key=zeros)


def _site_twice(driver: Driver, shown: list[Answer]) -> None:
    shown.insert(1, copy.deepcopy(shown[1]))


def _no_member(driver: Driver, shown: list[Answer]) -> None:
    shown[1]["keys"] = {**shown[1]["keys"], "site": "delta"}


@pytest.mark.parametrize(
    "lie",
    [
        _swap_key,
        _sign_by_stranger,
        _enrol_stranger,
        _old_round,
        _other_run,
        _other_participants,
        _too_few,
        _leave_out_me,
        _my_keys_changed,
        _one_key_twice,
        _one_key_in_another_dress,
        _small_key,
        _small_mask_key,
        _site_twice,
        _no_member,
    ],
    ids=lambda lie: lie.__name__.strip("_"),
)
def test_keys_that_a_member_did_not_sign_for_this_round_are_refused(keyed: Driver, lie: Lie) -> None:
    shown = copy.deepcopy(keyed.shown())
    lie(keyed, shown)
    assert refusal_code(keyed.step("shares", "alpha", keys=shown)) == "roster_not_proved"
    agent = keyed.network.agents["alpha"]
    assert agent.ledger.head(agent.population).sequence == 0


def test_a_site_answers_one_set_of_keys(driver: Driver) -> None:
    driver.ask_keys()
    first = driver.step("shares", "alpha", keys=driver.shown())
    assert driver.step("shares", "alpha", keys=driver.shown()) == first
    other = driver.step("shares", "alpha", keys=driver.shown(("alpha", "beta")))
    assert refusal_code(other) == "already_answered"
    assert driver.step("keys", "alpha", attempt=0, participants=list(SITES))["keys"] == driver.keys["alpha"]


def test_an_altered_or_misdirected_share_costs_no_release(driver: Driver) -> None:
    driver.ask_keys()
    driver.ask_shares()
    good = driver.shares_for("alpha")
    raw = bytearray(base64.b64decode(good["beta"]))
    raw[5] ^= 1
    bad = {
        "altered": good | {"beta": base64.b64encode(bytes(raw)).decode()},
        "of another sender": {"beta": good["gamma"], "gamma": good["beta"]},
        "for another": good | {"beta": driver.sealed["beta"]["gamma"]},
        "no base64": good | {"beta": "%%%"},
        "from a stranger": good | {"delta": good["beta"]},
        "from itself": good | {"alpha": good["beta"]},
        "from too few": {},
    }
    for name, shares in bad.items():
        answer = driver.update("alpha", shares)
        assert refusal_code(answer) in ("roster_not_proved",), (name, answer)
    agent = driver.network.agents["alpha"]
    assert agent.ledger.head(agent.population).sequence == 0
    assert "statement" in driver.update("alpha")


def test_a_masked_round_has_an_order(driver: Driver) -> None:
    codes = [
        driver.step("shares", "alpha", keys=[]),
        driver.step("survivors", "alpha", survivors=["alpha"], updates=["00" * 32]),
        driver.step("open", "alpha", agreed=[]),
        driver.network.ask("alpha", 1, shares={})[0],
    ]
    assert [refusal_code(answer) for answer in codes] == ["round_out_of_order"] * 4
    assert refusal_code(driver.network.ask("alpha", 1)[0]) == "bad_request"  # nobody gets it without masks
    outside = {"run": driver.network.run, "round": 9, "charter": driver.network.charter.digest}
    answer = call(
        driver.network.agents["alpha"], "masked.keys", outside | {"attempt": 0, "participants": list(SITES)}
    )[0]
    assert refusal_code(answer) == "round_out_of_order"


def test_a_round_that_was_left_for_the_next_one_is_refused_by_name(masked: Driver) -> None:
    """The keys of round 2 delete the secrets of round 1; who asks for them then hears that, and gets none."""
    masked.updates.pop("gamma")
    masked.ask_survivors(("alpha", "beta"))
    agreed = [masked.agreed[site] for site in ("alpha", "beta")]
    network = masked.network
    header = {"run": network.run, "round": 2, "charter": network.charter.digest}
    assert (
        "keys"
        in call(network.agents["alpha"], "masked.keys", header | {"attempt": 0, "participants": list(SITES)})[
            0
        ]
    )
    kept = network.agents["alpha"].ledger.masked_round(network.run, 1)
    assert kept is not None
    assert kept.keys().isdisjoint({"secret", "own", "held"})
    assert refusal_code(masked.step("open", "alpha", agreed=agreed)) == "round_out_of_order"


def test_keys_that_were_forgotten_deal_no_shares(driver: Driver) -> None:
    driver.ask_keys()
    agent = driver.network.agents["alpha"]
    agent._masked.forget(driver.network.run)
    assert refusal_code(driver.step("shares", "alpha", keys=driver.shown())) == "round_out_of_order"


def test_a_plain_run_has_no_masked_steps(network: Network) -> None:
    network.start()
    driver = Driver(network)
    assert (
        refusal_code(driver.step("keys", "alpha", attempt=0, participants=list(SITES)))
        == "round_out_of_order"
    )
    assert refusal_code(network.ask("alpha", 1, shares={})[0]) == "bad_request"


@pytest.mark.parametrize("kind", ["keys", "shares", "survivors", "open"])
def test_a_step_of_a_run_that_was_not_accepted_is_refused(keyed: Driver, kind: str) -> None:
    fields: dict[str, dict[str, Any]] = {
        "keys": {"attempt": 0, "participants": list(SITES)},
        "shares": {"keys": []},
        "survivors": {"survivors": [], "updates": []},
        "open": {"agreed": []},
    }
    assert refusal_code(keyed.step(kind, "alpha", run="run-2", **fields[kind])) == "run_not_accepted"


# the coordinator asks about another set


def test_a_site_signs_one_set_of_survivors(masked: Driver) -> None:
    masked.ask_survivors(("alpha",))
    assert masked.sign_survivors("alpha", SITES)["agreed"] == masked.agreed["alpha"]
    other = masked.sign_survivors("alpha", ("alpha", "beta"))
    assert refusal_code(other) == "already_answered"


def test_survivors_must_be_enough_and_hold_what_this_site_sent(masked: Driver) -> None:
    updates = {site: masked.statements[site].update for site in SITES}
    bad = [
        (["alpha"], [updates["alpha"]]),  # too few
        (["beta", "gamma"], [updates["beta"], updates["gamma"]]),  # without this site
        (["alpha", "beta"], ["11" * 32, updates["beta"]]),  # another update in its name
        (["beta", "alpha"], [updates["beta"], updates["alpha"]]),  # out of order
        (["alpha", "alpha"], [updates["alpha"]] * 2),
        (["alpha", "delta"], [updates["alpha"], updates["beta"]]),  # a stranger
        (["alpha", "beta"], [updates["alpha"]]),  # not as many
    ]
    for survivors, digests in bad:
        answer = masked.step("survivors", "alpha", survivors=survivors, updates=digests)
        assert refusal_code(answer) == "survivors_not_agreed", survivors
    masked.ask_survivors(SITES)


def test_different_survivors_at_different_sites_open_nothing(masked: Driver) -> None:
    """alpha is told that gamma is gone, gamma that alpha is: beta, in both sets, signs one of them only."""
    masked.agreed["alpha"] = masked.sign_survivors("alpha", ("alpha", "beta"))["agreed"]
    masked.agreed["gamma"] = masked.sign_survivors("gamma", ("beta", "gamma"))["agreed"]
    masked.agreed["beta"] = masked.sign_survivors("beta", ("alpha", "beta"))["agreed"]
    every = [masked.agreed[site] for site in SITES]
    opened = {site: masked.step("open", site, agreed=every) for site in SITES}
    assert {refusal_code(answer) for answer in opened.values()} == {"survivors_not_agreed"}
    pair = [masked.agreed["alpha"], masked.agreed["beta"]]
    assert refusal_code(masked.step("open", "gamma", agreed=pair)) == "survivors_not_agreed"
    assert "opened" in masked.step("open", "alpha", agreed=pair)
    assert "opened" in masked.step("open", "beta", agreed=pair)


def test_a_sum_is_opened_for_enough_true_signatures_only(masked: Driver) -> None:
    masked.ask_survivors(SITES)
    good = [masked.agreed[site] for site in SITES]
    forged = copy.deepcopy(good)
    forged[1]["signature"] = good[0]["signature"]
    renamed = copy.deepcopy(good)
    renamed[1] = {**good[0], "site": "beta"}
    other_roster = copy.deepcopy(good)
    other_roster[1]["roster"] = "22" * 32
    bad = [[], good[:1], forged, renamed, other_roster, [good[0], good[0]], [good[1], good[0]]]
    for agreed in bad:
        assert refusal_code(masked.step("open", "alpha", agreed=agreed)) == "survivors_not_agreed", agreed
    masked.ask_open(SITES)
    assert masked.total() == masked.expected()


def test_asking_to_open_twice_gains_nothing(masked: Driver) -> None:
    """The second answer is the first, and no site is ever given away by both kinds of share."""
    masked.updates.pop("gamma"), masked.statements.pop("gamma")
    masked.ask_survivors(("alpha", "beta"))
    masked.ask_open(("alpha", "beta"))
    first = dict(masked.opened)
    masked.ask_open(("alpha", "beta"))
    assert masked.opened == first
    assert len(first["alpha"]["seeds"]) == 2
    assert len(first["alpha"]["keys"]) == 1
    assert masked.total() == masked.expected()
    answer = masked.step(
        "survivors", "alpha", survivors=list(SITES), updates=[masked.agreed["alpha"]["updates"][0]] * 3
    )
    assert refusal_code(answer) == "already_answered"


def test_a_late_update_stays_under_its_own_mask_though_its_mask_key_is_known(masked: Driver) -> None:
    """gamma was called gone and its mask key is public; its update, kept all the same, still says nothing."""
    kept, plain = masked.updates.pop("gamma"), masked.plain["gamma"]
    masked.statements.pop("gamma")
    masked.ask_survivors(("alpha", "beta"))
    masked.ask_open(("alpha", "beta"))
    transcript = masked.transcript()
    shares = {
        place: bytes.fromhex(masked.opened[site]["keys"][0]) for place, site in ((1, "alpha"), (2, "beta"))
    }
    private = X25519PrivateKey.from_private_bytes(Opening([1, 2]).join(shares))

    binding = keys_digest(transcript.keys)
    parts: list[tuple[int, Any]] = [(1, decode_update(kept))]
    for item in transcript.keys:
        if item.site != "gamma":
            key = pair_mask_key(private, base64.b64decode(item.mask_key), binding, ("gamma", item.site))
            parts.append((-sign_of("gamma", item.site), mask_words(key, len(plain))))
    stripped = combined(len(plain), parts)
    assert all(abs(found - true) > 2**40 for found, true in zip(stripped, plain, strict=True))

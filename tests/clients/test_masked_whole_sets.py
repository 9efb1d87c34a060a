"""A whole set is opened with its signature, and keys are made anew: what a coordinator can make of either."""

from __future__ import annotations

from typing import Any

import pytest

from audit.entries import parse_body
from audit.masking import combined, mask_words, own_mask_key
from audit.secure_bodies import MaskKeys
from audit.secure_round import keys_digest
from audit.shamir import Opening
from audit.weights import decode_update
from tests.clients.conftest import SITES, call, refusal_code
from tests.clients.masked_driver import Answer, Driver


def kept(driver: Driver, site: str, number: int = 1) -> Answer:
    state = driver.network.agents[site].ledger.masked_round(driver.network.run, number)
    assert state is not None
    return state


def stripped(driver: Driver, seeds: dict[str, bytes], sites: tuple[str, ...]) -> list[int]:
    """The sum of these sites' updates with their own masks taken off, and no pair's."""
    binding = keys_digest(tuple(parse_body(MaskKeys, driver.keys[site]) for site in SITES))
    size = len(driver.plain[sites[0]])
    parts: list[tuple[int, Any]] = [(1, decode_update(driver.updates[site])) for site in sites]
    parts += [(-1, mask_words(own_mask_key(seeds[site], binding, site), size)) for site in sites]
    return combined(size, parts)


def seeds_of(opened: dict[str, Answer], owners: tuple[str, ...]) -> dict[str, bytes]:
    """What the shares in these answers give, by owner; each answer has one share an owner, in order."""
    places = {SITES.index(site) + 1: answer["seeds"] for site, answer in opened.items()}
    return {
        owner: Opening(sorted(places)).join({at: bytes.fromhex(found[n]) for at, found in places.items()})
        for n, owner in enumerate(owners)
    }


def is_hidden(found: list[int], true: list[int]) -> bool:
    return all(abs(a - b) > 2**40 for a, b in zip(found, true, strict=True))


def test_of_a_whole_set_shares_come_with_the_signature_and_the_secrets_go(masked: Driver) -> None:
    first = masked.sign_survivors("alpha", SITES)
    assert len(first["opened"]["seeds"]) == 3
    assert first["opened"]["keys"] == []
    assert kept(masked, "alpha").keys().isdisjoint({"secret", "own", "held"})
    assert masked.sign_survivors("alpha", SITES) == first
    masked.network.restart("alpha")
    assert masked.sign_survivors("alpha", SITES) == first
    masked.ask_survivors(SITES)
    masked.ask_open(SITES)  # the same shares once more, for whoever lost them
    assert masked.opened["alpha"] == first["opened"]
    assert masked.total() == masked.expected()


def test_of_a_smaller_set_nothing_comes_with_the_signature(masked: Driver) -> None:
    answer = masked.sign_survivors("alpha", ("alpha", "beta"))
    assert set(answer) == {"agreed"}
    assert {"secret", "own", "held"} <= kept(masked, "alpha").keys()
    assert masked.sign_survivors("alpha", ("alpha", "beta")) == answer
    assert refusal_code(masked.sign_survivors("alpha", SITES)) == "already_answered"


@pytest.mark.parametrize("first", [SITES, ("alpha", "beta")])
def test_whoever_opened_a_whole_set_signs_no_other_and_the_other_way_round(
    masked: Driver, first: tuple[str, ...]
) -> None:
    other = ("alpha", "beta") if first == SITES else SITES
    masked.agreed["alpha"] = masked.sign_survivors("alpha", first)["agreed"]
    assert refusal_code(masked.sign_survivors("alpha", other)) == "already_answered"
    masked.agreed["beta"] = masked.sign_survivors("beta", other)["agreed"]
    pair = [masked.agreed["alpha"], masked.agreed["beta"]]
    for site in ("alpha", "beta"):
        assert refusal_code(masked.step("open", site, agreed=pair)) == "survivors_not_agreed"


def test_all_called_there_while_one_sent_nothing_opens_nothing(driver: Driver) -> None:
    """gamma never answered: every seed comes out, and the masks that they share with gamma stay on."""
    driver.ask_keys()
    driver.ask_shares()
    for site in ("alpha", "beta"):
        driver.update(site)
    made_up = {"gamma": "33" * 32} | {site: driver.statements[site].update for site in ("alpha", "beta")}
    updates = [made_up[site] for site in SITES]
    opened = {
        site: driver.step("survivors", site, survivors=list(SITES), updates=updates)["opened"]
        for site in ("alpha", "beta")
    }
    seeds = seeds_of(opened, SITES)
    assert set(seeds) == set(SITES)
    for sites in (("alpha",), ("beta",), ("alpha", "beta")):
        plain = [sum(values) for values in zip(*(driver.plain[site] for site in sites), strict=True)]
        assert is_hidden(stripped(driver, seeds, sites), plain), sites
    assert refusal_code(driver.sign_survivors("alpha", ("alpha", "beta"))) == "already_answered"


def test_two_rosters_that_are_each_called_whole_open_no_single_update(driver: Driver) -> None:
    """alpha is told that gamma's shares never came: its whole set is two, beta's is all three."""
    driver.ask_keys()
    driver.ask_shares()
    driver.update("alpha", {"beta": driver.sealed["beta"]["alpha"]})
    for site in ("beta", "gamma"):
        driver.update(site)
    opened = {"alpha": driver.sign_survivors("alpha", ("alpha", "beta"))["opened"]}
    opened |= {site: driver.sign_survivors(site, SITES)["opened"] for site in ("beta", "gamma")}
    assert [len(answer["keys"]) for answer in opened.values()] == [0, 0, 0]
    seeds = seeds_of({site: opened[site] for site in ("beta", "gamma")}, SITES)
    for sites in (
        ("alpha",),
        ("beta",),
        ("gamma",),
        ("alpha", "beta"),
        ("alpha", "gamma"),
        ("beta", "gamma"),
        SITES,
    ):
        plain = [sum(values) for values in zip(*(driver.plain[site] for site in sites), strict=True)]
        assert is_hidden(stripped(driver, seeds, sites), plain), sites


# keys that are given ahead, and made anew


def test_keys_are_made_anew_as_a_whole_as_long_as_nothing_was_released(driver: Driver) -> None:
    driver.ask_keys()
    driver.ask_shares()
    before, old = kept(driver, "alpha"), driver.shown()
    answer = driver.step("keys", "alpha", attempt=7, participants=list(SITES))
    assert answer["keys"] != before["keys"]
    after = kept(driver, "alpha")
    assert after.keys().isdisjoint({"shares", "own", "asked_keys"})
    assert set(after["secret"].values()).isdisjoint(before["secret"].values())
    home = driver.network.folder / "sites" / "alpha"
    for secret in before["secret"].values():
        assert all(secret.encode() not in path.read_bytes() for path in home.rglob("*") if path.is_file()), (
            "the old secrets are gone from the disk"
        )
    assert driver.step("keys", "alpha", attempt=7, participants=list(SITES)) == answer
    assert driver.step("keys", "alpha", attempt=0, participants=list(SITES)) == answer
    assert refusal_code(driver.step("shares", "alpha", keys=old)) == "roster_not_proved"
    assert refusal_code(driver.update("alpha")) == "round_out_of_order"
    driver.ask_keys()
    driver.ask_shares(("alpha",))
    assert refusal_code(driver.step("shares", "beta", keys=driver.shown())) == "already_answered"


def test_other_participants_mean_other_keys(driver: Driver) -> None:
    first = driver.step("keys", "alpha", attempt=0, participants=list(SITES))["keys"]
    other = driver.step("keys", "alpha", attempt=0, participants=["alpha", "beta"])["keys"]
    again = driver.step("keys", "alpha", attempt=0, participants=list(SITES))["keys"]
    texts = [keys[name] for keys in (first, other, again) for name in ("mask_key", "share_key", "seed")]
    assert len(set(texts)) == 9


def test_after_the_release_keys_stay_what_they_were(masked: Driver) -> None:
    assert masked.step("keys", "alpha", attempt=0, participants=list(SITES))["keys"] == masked.keys["alpha"]
    for attempt, participants in ((1, list(SITES)), (0, ["alpha", "beta"]), (9, ["alpha", "beta"])):
        answer = masked.step("keys", "alpha", attempt=attempt, participants=participants)
        assert refusal_code(answer) == "already_answered"
    assert {"secret", "own", "held"} <= kept(masked, "alpha").keys()
    masked.ask_survivors(SITES)
    masked.ask_open(SITES)
    assert masked.total() == masked.expected()


def test_new_keys_at_one_site_make_it_a_dropped_one_for_those_who_had_its_old_ones(driver: Driver) -> None:
    """gamma's old mask key comes out, as of every site that drops out; it masks nothing of gamma's."""
    driver.ask_keys()
    driver.ask_shares()
    for site in ("alpha", "beta"):
        driver.update(site)
    driver.step("keys", "gamma", attempt=1, participants=list(SITES))
    old = {name: driver.shares_for("gamma")[name] for name in ("alpha", "beta")}
    assert refusal_code(driver.update("gamma", old)) == "round_out_of_order"
    driver.ask_survivors(("alpha", "beta"))
    driver.ask_open(("alpha", "beta"))
    assert driver.total() == driver.expected()
    agent = driver.network.agents["gamma"]
    assert agent.ledger.head(agent.population).sequence == 0


@pytest.mark.parametrize("attempt", [-1, True, "1", 1.5, None, [1]])
def test_an_attempt_is_a_whole_number(driver: Driver, attempt: Any) -> None:
    answer = driver.step("keys", "alpha", attempt=attempt, participants=list(SITES))
    assert refusal_code(answer) == "bad_request"


def test_the_next_round_s_keys_do_not_open_this_one(masked: Driver) -> None:
    """Whoever asks for them first gets them, and shares of this round from nobody."""
    network = masked.network
    header = {"run": network.run, "round": 2, "charter": network.charter.digest, "attempt": 0}
    for site in SITES:
        call(network.agents[site], "masked.keys", header | {"participants": list(SITES)})
        assert kept(masked, site).keys().isdisjoint({"secret", "own", "held"})
        assert refusal_code(masked.sign_survivors(site, SITES)) == "round_out_of_order"

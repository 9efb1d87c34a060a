"""Masked rounds at real agents: what they compute, what one update says, what a site keeps and forgets."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audit.entries import SiteStatement, body_document, parse_body, signing_payload
from audit.masking import (
    own_mask_key,
    seed_commitment,
)
from audit.secure_bodies import SharesOpened
from audit.secure_round import SecureRoundError, Transcript, keys_digest
from audit.shamir import Opening, ShareError
from audit.weights import decode_update, encode_update
from clients.identity import signature_text
from tests.clients.conftest import SITES, Network, call, refusal_code
from tests.clients.masked_driver import Answer, Driver, masked_charter, own_key

# what the protocol computes


def test_the_opened_sum_is_the_plain_sum(masked: Driver) -> None:
    masked.ask_survivors(SITES)
    masked.ask_open(SITES)
    assert masked.total() == masked.expected()


@pytest.mark.parametrize("phase", ["keys", "shares", "update", "survivors", "open"])
def test_one_site_may_drop_out_in_any_phase(driver: Driver, phase: str) -> None:
    """Whoever is gone before its update leaves the sum; later, its update counts and others open it."""
    left = ("alpha", "gamma")
    phases = ["keys", "shares", "update", "survivors", "open"]

    def there(step: str) -> tuple[str, ...]:
        return left if phases.index(step) >= phases.index(phase) else SITES

    driver.ask_keys(there("keys"))
    driver.ask_shares(there("shares"))
    for site in there("update"):
        driver.update(site)
    driver.ask_survivors(there("survivors"))
    driver.ask_open(there("open"))
    assert driver.total() == driver.expected()
    assert len(driver.updates) == (2 if phase in ("keys", "shares", "update") else 3)


def test_what_leaves_the_site_is_masked_everywhere(masked: Driver) -> None:
    for site in SITES:
        release = masked.network.agents[site].ledger.release_of(masked.network.run, 1)
        assert release is not None
        assert release.update == masked.updates[site] != encode_update(masked.plain[site])
        home = masked.network.folder / "sites" / site
        plain = np.array(masked.plain[site], dtype="<i8").tobytes()
        for path in home.rglob("*"):
            assert not path.is_file() or plain not in path.read_bytes(), path


def test_a_statement_names_the_roster_and_what_it_drew_itself(masked: Driver) -> None:
    rosters = {statement.roster for statement in masked.statements.values()}
    assert rosters == {masked.transcript().roster}
    event = masked.statements["alpha"].event
    assert event.sharers == 2
    assert event.sharers * event.share_grid**2 >= event.sigma_grid**2
    assert event.sharers * (event.share_grid - 1) ** 2 < event.sigma_grid**2


# what one site's update says to those who see everything but its secrets


def test_one_masked_update_is_uniform_even_when_every_pair_mask_is_known(driver: Driver) -> None:
    """All others collude and hand over their keys: the site's own mask is left, and nothing shows through."""
    driver.ask_keys()
    driver.ask_shares()
    agent = driver.network.agents["alpha"]
    zeros = [0] * 40_000
    agent._trainer.update = lambda *a, **o: zeros  # type: ignore[assignment, method-assign]
    driver.update("alpha")
    seen = np.array(decode_update(driver.updates["alpha"]), dtype="<i8").view(np.uint8)
    counts = np.bincount(seen, minlength=256)
    square = float(((counts - len(seen) / 256) ** 2 / (len(seen) / 256)).sum())
    assert 140 < square < 400  # 255 degrees of freedom, beyond 5 standard deviations
    ones = np.unpackbits(seen).mean()
    assert abs(ones - 0.5) < 0.002
    words = np.array(decode_update(driver.updates["alpha"]), dtype="<i8").view("<u8").astype(np.float64)
    assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 0.03


def test_two_updates_of_one_site_never_carry_the_same_mask(masked: Driver) -> None:
    """The same request gives the same bytes, and no other request gives any."""
    again = masked.update("alpha")
    assert parse_body(SiteStatement, again["statement"]) == masked.statements["alpha"]
    other = masked.network.ask("alpha", 1, shares={"beta": masked.shares_for("alpha")["beta"]})[0]
    assert refusal_code(other) == "already_released"


def test_shares_below_the_threshold_open_nothing(masked: Driver) -> None:
    masked.ask_survivors(SITES)
    masked.ask_open(SITES)
    seeds = [bytes.fromhex(masked.opened[site]["seeds"][1]) for site in SITES]
    commitment = masked.keys["beta"]["seed"]
    assert seed_commitment(Opening([1, 3]).join({1: seeds[0], 3: seeds[2]})) == commitment
    try:
        single = Opening([1]).join({1: seeds[0]})
    except ShareError:
        single = b""
    assert seed_commitment(single) != commitment


# what the site keeps, and what it forgets


def test_each_step_survives_a_restart_with_the_same_bytes(driver: Driver) -> None:
    def again(act: Callable[[], Answer]) -> Answer:
        first = act()
        driver.network.restart("alpha")
        assert act() == first
        return first

    driver.ask_keys()
    again(lambda: driver.step("keys", "alpha", attempt=0, participants=list(SITES)))
    driver.ask_shares()
    again(lambda: driver.step("shares", "alpha", keys=driver.shown()))
    for site in SITES:
        driver.update(site)
    again(lambda: driver.update("alpha"))
    again(lambda: driver.sign_survivors("alpha", SITES))
    driver.ask_survivors(SITES)
    again(lambda: driver.step("open", "alpha", agreed=[driver.agreed[site] for site in SITES]))


def secrets_of(driver: Driver, site: str) -> set[str]:
    state = driver.network.agents[site].ledger.masked_round(driver.network.run, 1)
    assert state is not None
    return {"secret", "own", "held"} & set(state)


def test_secrets_are_deleted_once_the_sum_is_open(masked: Driver) -> None:
    assert secrets_of(masked, "alpha") == {"secret", "own", "held"}
    state = masked.network.agents["alpha"].ledger.masked_round(masked.network.run, 1)
    assert state is not None
    needle = state["secret"]["seed"].encode()
    kept = (masked.network.folder / "sites" / "alpha").glob("ledger.db*")
    assert any(needle in path.read_bytes() for path in kept)
    masked.ask_survivors(SITES)
    masked.ask_open(SITES)
    assert secrets_of(masked, "alpha") == set()
    for path in (masked.network.folder / "sites" / "alpha").glob("ledger.db*"):
        assert needle not in path.read_bytes(), path  # nor in the write-ahead log, while the agent runs


def test_secrets_are_deleted_when_the_run_is_over(masked: Driver) -> None:
    call(masked.network.agents["beta"], "run.finished", {"run": masked.network.run})
    assert secrets_of(masked, "beta") == set()
    assert refusal_code(masked.sign_survivors("beta", SITES)) == "run_not_accepted"


def test_a_ledger_of_an_older_release_gets_the_table_it_lacks(network: Network) -> None:
    import sqlite3

    network.agents["alpha"].close()
    path: Path = network.folder / "sites" / "alpha" / "ledger.db"
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE masked_round")
    network.restart("alpha")
    network.charter = masked_charter(network.agents)
    network.start(network.charter)
    assert "keys" in Driver(network).step("keys", "alpha", attempt=0, participants=list(SITES))


# the mathematics, as the transcript is read by others


def test_a_transcript_has_one_form_and_any_change_is_found(masked: Driver) -> None:
    masked.ask_survivors(SITES)
    masked.ask_open(SITES)
    transcript = masked.transcript()
    assert Transcript.decode(transcript.encode()) == transcript
    for data in (b"{}", b"[]", transcript.encode() + b" ", transcript.encode().replace(b"masked", b"marked")):
        with pytest.raises(SecureRoundError):
            Transcript.decode(data)
    seed = bytearray(bytes.fromhex(masked.opened["beta"]["seeds"][0]))
    seed[-1] ^= 1
    honest = copy.deepcopy(masked.opened)
    masked.opened["beta"]["seeds"][0] = bytes(seed).hex()
    with pytest.raises(SecureRoundError, match="does not verify"):
        masked.total()
    body = parse_body(SharesOpened, masked.opened["beta"])
    domain, payload = signing_payload(body)
    signature = signature_text(own_key(masked, "beta"), domain, payload)
    masked.opened["beta"] = body_document(dataclasses.replace(body, signature=signature))
    with pytest.raises(SecureRoundError, match=r"another seed|one of them is wrong"):
        masked.total()  # a liar that signs its lie is named by the commitment
    masked.opened = honest
    assert masked.total() == masked.expected()


def test_the_own_mask_depends_on_seed_and_on_everybodys_keys(masked: Driver) -> None:
    binding, seed, site = keys_digest(masked.transcript().keys), os.urandom(32), "alpha"
    assert own_mask_key(seed, binding, site) != own_mask_key(seed, bytes(32), site)
    assert own_mask_key(seed, binding, site) != own_mask_key(os.urandom(32), binding, site)

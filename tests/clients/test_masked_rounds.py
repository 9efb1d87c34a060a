"""Masked rounds at real agents, driven by a coordinator that is honest, forgetful or lying."""

from __future__ import annotations

import base64
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from audit.entries import SiteStatement, body_document, parse_body, signing_payload
from audit.keys import SigningKey
from audit.masking import (
    combined,
    mask_words,
    own_mask_key,
    pair_mask_key,
    seed_commitment,
    sign_of,
)
from audit.secure_bodies import MaskKeys, SharesOpened, SurvivorsAgreed
from audit.secure_round import RoundName, SecureRoundError, Transcript, keys_digest, open_sum
from audit.shamir import Opening, ShareError
from audit.weights import decode_update, encode_update
from clients.agent import Agent
from clients.identity import signature_text
from federation.charter import Charter
from tests.clients.conftest import SITES, Network, call, charter_text, refusal_code

Answer = dict[str, Any]


def masked_charter(agents: dict[str, Agent], *, rounds: int = 3, more: str = "") -> Charter:
    text = charter_text(agents, rounds=rounds).replace(", weight: 1", "")
    return Charter.parse(text + "secure_aggregation: {tolerated: 1}\n" + more)


class Driver:
    """A coordinator by hand. It keeps all it sees, and what each site's mechanism really released."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.plain: dict[str, list[int]] = {}
        self.keys: dict[str, Answer] = {}
        self.sealed: dict[str, dict[str, str]] = {}
        self.statements: dict[str, SiteStatement] = {}
        self.updates: dict[str, bytes] = {}
        self.agreed: dict[str, Answer] = {}
        self.opened: dict[str, Answer] = {}
        for site, agent in network.agents.items():
            agent._trainer.update = self._recording(site, agent._trainer.update)  # type: ignore[method-assign]

    def _recording(self, site: str, update: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **options: Any) -> Any:
            self.plain[site] = list(update(*args, **options))
            return self.plain[site]

        return recorded

    def step(self, kind: str, site: str, **fields: Any) -> Answer:
        header = {"run": self.network.run, "round": 1, "charter": self.network.charter.digest, **fields}
        return call(self.network.agents[site], f"masked.{kind}", header)[0]

    def ask_keys(self, sites: tuple[str, ...] = SITES) -> None:
        for site in sites:
            self.keys[site] = self.step("keys", site, participants=list(SITES))["keys"]

    def shown(self, sites: tuple[str, ...] = SITES) -> list[Answer]:
        enrolment = {
            site: agent.home.keys().enrolment(site, agent.population, agent._origin)
            for site, agent in self.network.agents.items()
        }
        return [
            {"enrolment": body_document(enrolment[site]), "keys": self.keys[site]}
            for site in sorted(set(sites) & set(self.keys))
        ]

    def ask_shares(self, sites: tuple[str, ...] = SITES) -> None:
        shown = self.shown()
        for site in sites:
            self.sealed[site] = self.step("shares", site, keys=shown)["shares"]

    def shares_for(self, site: str) -> dict[str, str]:
        return {other: sealed[site] for other, sealed in self.sealed.items() if other != site}

    def update(self, site: str, shares: dict[str, str] | None = None) -> Answer:
        answer, update = self.network.ask(site, 1, shares=self.shares_for(site) if shares is None else shares)
        if "statement" in answer:
            self.statements[site] = parse_body(SiteStatement, answer["statement"])
            self.updates[site] = update
        return answer

    def ask_survivors(self, sites: tuple[str, ...], survivors: tuple[str, ...] | None = None) -> None:
        for site in sites:
            self.agreed[site] = self.sign_survivors(site, survivors or tuple(sorted(self.updates)))["agreed"]

    def sign_survivors(self, site: str, survivors: tuple[str, ...]) -> Answer:
        updates = [self.statements[other].update for other in survivors]
        return self.step("survivors", site, survivors=list(survivors), updates=updates)

    def ask_open(self, sites: tuple[str, ...]) -> None:
        agreed = [self.agreed[site] for site in sorted(self.agreed)]
        for site in sites:
            self.opened[site] = self.step("open", site, agreed=agreed)["opened"]

    def transcript(self) -> Transcript:
        return Transcript(
            keys=tuple(parse_body(MaskKeys, self.keys[site]) for site in sorted(self.keys)),
            members=tuple(sorted(self.sealed)),
            agreed=tuple(parse_body(SurvivorsAgreed, self.agreed[site]) for site in sorted(self.agreed)),
            opened=tuple(parse_body(SharesOpened, self.opened[site]) for site in sorted(self.opened)[:2]),
        )

    def total(self) -> list[int]:
        return open_sum(
            RoundName(run=self.network.run, round=1, charter=self.network.charter.digest, participants=SITES),
            self.transcript(),
            {site: decode_update(update) for site, update in self.updates.items()},
            {site: statement.update for site, statement in self.statements.items()},
            lambda site: self.network.agents[site].home.keys().statement.text,
            least=2,
        )

    def expected(self) -> list[int]:
        return [sum(values) for values in zip(*(self.plain[site] for site in self.updates), strict=True)]


@pytest.fixture
def driver(network: Network) -> Iterator[Driver]:
    """Three sites that accepted a masked run; one may drop out."""
    network.charter = masked_charter(network.agents)
    network.start(network.charter)
    return Driver(network)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory, make_network: Any) -> Iterator[Driver]:
    """All three have given keys; tests that use it only make requests that are refused."""
    network = make_network(tmp_path_factory.mktemp("keyed"))
    network.charter = masked_charter(network.agents)
    network.start(network.charter)
    made = Driver(network)
    made.ask_keys()
    yield made
    network.close()


@pytest.fixture
def masked(driver: Driver) -> Driver:
    """All three have sent masked updates."""
    driver.ask_keys()
    driver.ask_shares()
    for site in SITES:
        assert "statement" in driver.update(site)
    return driver


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


def own_key(driver: Driver, site: str) -> SigningKey:
    return driver.network.agents[site].home.keys().statement


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
        _small_key,
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
    asked = driver.step("keys", "alpha", participants=["alpha", "beta"])
    assert refusal_code(asked) == "already_answered"


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
    answer = call(driver.network.agents["alpha"], "masked.keys", outside | {"participants": list(SITES)})[0]
    assert refusal_code(answer) == "round_out_of_order"


def test_a_plain_run_has_no_masked_steps(network: Network) -> None:
    network.start()
    driver = Driver(network)
    assert refusal_code(driver.step("keys", "alpha", participants=list(SITES))) == "round_out_of_order"
    assert refusal_code(network.ask("alpha", 1, shares={})[0]) == "bad_request"


@pytest.mark.parametrize("kind", ["keys", "shares", "survivors", "open"])
def test_a_step_of_a_run_that_was_not_accepted_is_refused(keyed: Driver, kind: str) -> None:
    fields: dict[str, dict[str, Any]] = {
        "keys": {"participants": list(SITES)},
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
            key = pair_mask_key(private, base64.b64decode(item.mask_key), binding)
            parts.append((-sign_of("gamma", item.site), mask_words(key, len(plain))))
    stripped = combined(len(plain), parts)
    assert all(abs(found - true) > 2**40 for found, true in zip(stripped, plain, strict=True))


# what the site keeps, and what it forgets


def test_each_step_survives_a_restart_with_the_same_bytes(driver: Driver) -> None:
    def again(act: Callable[[], Answer]) -> Answer:
        first = act()
        driver.network.restart("alpha")
        assert act() == first
        return first

    driver.ask_keys()
    again(lambda: driver.step("keys", "alpha", participants=list(SITES)))
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
    assert "keys" in Driver(network).step("keys", "alpha", participants=list(SITES))


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
    binding, seed = keys_digest(masked.transcript().keys), os.urandom(32)
    assert own_mask_key(seed, binding) != own_mask_key(seed, bytes(32))
    assert own_mask_key(seed, binding) != own_mask_key(os.urandom(32), binding)

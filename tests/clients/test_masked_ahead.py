"""Masked rounds whose keys and shares were given ahead: what is asked, and what is when somebody is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message

from audit.entries import RoundCompleted, SiteRefused
from audit.entries import SiteStatement as Statement
from audit.principal import LocalOwner, Principal
from audit.secure_bodies import RoundOpened
from audit.secure_round import Transcript
from clients.agent import Agent
from clients.client_app import app as client_app
from clients.inprocess import live_agents
from clients.simulation import _set_up, join_all
from federation import service
from federation.charter import Charter
from federation.errors import RunFailedError
from federation.exchange import Exchange
from federation.grid import InProcessGrid
from federation.server_app import carry_out
from federation.service import TrainRequest
from tests.clients.conftest import call
from tests.clients.test_masked_runs import CHARTER, NAMES, SITES, Between, Carried, Hold, Lie, honestly, never
from tests.federation.dying import CrashError, Dying

THREE = CHARTER.replace("rounds: 2", "rounds: 3")


class Listening(InProcessGrid):
    """Keeps which kinds each message to a site held, in order."""

    sent: list[tuple[str, ...]]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        for message in listed:
            record = message.content["header"]
            assert isinstance(record, ConfigRecord)
            kinds = record["kind"]
            self.sent.append((kinds,) if isinstance(kinds, str) else tuple(map(str, kinds)))  # type: ignore[arg-type]
        return super().push_messages(listed)


class DiesAfterShares(Dying):
    """Ends when a round was witnessed for which the next one's shares were sealed."""

    def __init__(self, coordinator: Any, sent: list[tuple[str, ...]]) -> None:
        super().__init__(coordinator, 10_000)
        self._sent = sent

    def cosign_round(self, collect: Any) -> Any:
        note = super().cosign_round(collect)
        if ("cosign", "masked.shares") in self._sent:
            raise CrashError
        return note


class Lab:
    """Four sites and a prepared masked run, carried out as often as needed."""

    def __init__(self, folder: Path, charter: str) -> None:
        self.federation, agreed = _set_up(charter, SITES, None, folder, "1000")
        join_all(self.federation.homes, self.federation.coordinator)
        self.agents = {name: Agent.open(home) for name, home in self.federation.homes.items()}
        author = self.federation.scientist.key
        principal = Principal(id="curie", role="scientist", key=author.text)
        log, request = self.federation.coordinator, TrainRequest(charter=agreed)
        self.run = service.start_run(log, principal, LocalOwner(), request, author)
        self.charter: Charter = agreed
        self.done = Carried(self.federation, agreed, None, self.run)

    def go(
        self,
        *,
        hold: Hold = never,
        lie: Lie = honestly,
        connected: Iterable[str] = NAMES,
        dies: bool = False,
    ) -> list[tuple[str, ...]]:
        """Carry the run out, or on; return the kinds in each message."""
        links: Any = {name: Between(agent, hold, lie) for name, agent in self.agents.items()}
        sent: list[tuple[str, ...]] = []
        home: Any = self.federation.coordinator
        if dies:
            home = DiesAfterShares(home, sent)
        with live_agents(links), Listening(client_app, {name: {} for name in connected}) as grid:
            grid.sent = sent
            exchange = Exchange(grid, poll_s=0.001, discovery_s=3)
            try:
                carry_out(grid, home, self.run, exchange=exchange, hold_s=0.2, principal="curie")
            except CrashError:
                assert dies
        return sent

    def transcripts(self) -> list[Transcript]:
        blobs = self.federation.coordinator.blobs
        return [Transcript.decode(blobs.get(body.transcript)) for body in self.done.bodies(RoundOpened)]


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Any]:
    made: list[Lab] = []

    def make(charter: str = THREE) -> Lab:
        made.append(Lab(tmp_path / "sim", charter))
        return made[-1]

    yield make
    for one in made:
        for agent in one.agents.values():
            agent.close()
        one.federation.close()


def test_a_masked_round_is_three_messages_to_a_site(lab: Any) -> None:
    lab = lab()
    counts = Counter(lab.go())
    assert counts["round",] == 12
    assert counts["masked.keys",] == counts["masked.shares",] == 4  # of the first round alone
    assert counts["masked.survivors", "masked.keys"] == counts["cosign", "masked.shares"] == 8
    assert counts["masked.survivors",] == 4  # of the last one: no keys are made for a round that never comes
    assert not any("masked.open" in kinds for kinds in counts)
    assert [body.round for body in lab.done.bodies(RoundCompleted)] == [1, 2, 3]
    report = lab.done.report()
    assert not report.failures, report.text()


def test_every_round_has_keys_of_its_own(lab: Any) -> None:
    lab = lab()
    lab.go()
    texts = [
        text
        for transcript in lab.transcripts()
        for keys in transcript.keys
        for text in (keys.mask_key, keys.share_key, keys.seed)
    ]
    assert len(texts) == len(set(texts)) == 3 * 4 * 3
    for agent in lab.agents.values():
        for number in agent.ledger.masked_rounds(lab.run):
            state = agent.ledger.masked_round(lab.run, number)
            assert state.keys().isdisjoint({"secret", "own", "held"})


@pytest.mark.parametrize("gone", [(), ("b",)], ids=["all come back", "one does not"])
def test_a_run_that_is_resumed_behind_sealed_shares_goes_on(lab: Any, gone: tuple[str, ...]) -> None:
    """Sites sealed shares for a set with b in it. Where b is away they make new keys for one without."""
    lab = lab()
    lab.go(dies=True)
    ahead = {name: agent.ledger.masked_round(lab.run, 2)["keys"] for name, agent in lab.agents.items()}
    counts = Counter(lab.go(connected=[name for name in NAMES if name not in gone]))
    assert counts["masked.keys",] == (3 + 3 if gone else 4)
    assert [body.round for body in lab.done.bodies(RoundCompleted)] == [1, 2, 3]
    second = lab.transcripts()[1]
    assert second.members == tuple(name for name in NAMES if name not in gone)
    used = {keys.site: keys.mask_key for keys in second.keys}
    assert {ahead[site]["mask_key"] == key for site, key in used.items()} == {not gone}
    report = lab.done.report()
    assert not report.failures, report.text()


def test_a_coordinator_that_dies_twice_behind_new_keys_uses_those(lab: Any) -> None:
    """The second one asks as the first did, and is given the newest keys that there are."""
    lab = lab()
    lab.go(dies=True)
    header = {"run": lab.run, "round": 2, "charter": lab.charter.digest, "participants": list(NAMES)}
    newest = {
        name: call(agent, "masked.keys", {**header, "attempt": 5})[0]["keys"]["mask_key"]
        for name, agent in lab.agents.items()
    }
    assert Counter(lab.go())["masked.keys",] == 4
    assert {keys.site: keys.mask_key for keys in lab.transcripts()[1].keys} == newest
    assert not lab.done.report().failures


def test_one_site_with_newer_keys_than_the_others_shares_were_sealed_for_makes_all_new(lab: Any) -> None:
    lab = lab()
    lab.go(dies=True)
    header = {"run": lab.run, "round": 2, "charter": lab.charter.digest, "participants": list(NAMES)}
    call(lab.agents["a"], "masked.keys", {**header, "attempt": 5})
    assert Counter(lab.go())["masked.keys",] == 8
    assert [len(body.statements) for body in lab.done.bodies(RoundCompleted)] == [4, 4, 4]
    assert not lab.done.report().failures


def spoiling(kind: str, site: str, number: int) -> Lie:
    """A site's answer of this kind for one round, number by number, is of no use the first time."""
    seen: list[str] = []

    def lie(agent: Agent, asked: str, answer: dict[str, Any]) -> None:
        if (asked, agent.name) == (kind, site):
            seen.append(asked)
            if len(seen) == number:
                answer.clear()
                answer["keys" if kind == "masked.keys" else "shares"] = {"b": "x"}

    return lie


@pytest.mark.parametrize("kind", ["masked.keys", "masked.shares"])
def test_what_was_not_given_ahead_is_asked_for_again(lab: Any, kind: str) -> None:
    lab = lab()
    counts = Counter(lab.go(lie=spoiling(kind, "c", 2)))
    assert counts["masked.shares",] == 8  # of round 1, and of round 2, whose were not all there
    assert counts["masked.keys",] == (8 if kind == "masked.keys" else 4)
    assert [len(body.statements) for body in lab.done.bodies(RoundCompleted)] == [4, 4, 4]
    assert lab.done.bodies(SiteRefused) == []
    assert not lab.done.report().failures


def test_a_site_that_is_gone_before_it_seals_is_left_out_of_the_next_round(lab: Any) -> None:
    """It does not cosign either; its update of the round before counts."""
    seen: list[str] = []

    def hold(site: str, kind: str) -> bool:
        seen.append(kind)
        return (site, kind) == ("b", "cosign") and "round" in seen

    lab = lab(CHARTER)
    counts = Counter(lab.go(hold=hold))
    assert counts["masked.shares",] == 4 + 4  # asked once more, as b might have come back
    assert [len(body.statements) for body in lab.done.bodies(RoundCompleted)] == [4, 3]
    assert lab.transcripts()[1].members == ("a", "c", "d")
    assert not lab.done.report().failures


def test_a_site_that_is_gone_behind_its_shares_is_a_dropped_one(lab: Any) -> None:
    """Its mask key opens the round, with enough signatures, in messages of their own."""
    rounds: list[str] = []

    def hold(site: str, kind: str) -> bool:
        if (site, kind) == ("b", "round"):
            rounds.append(kind)
        return site == "b" and len(rounds) == 2

    lab = lab()
    counts = Counter(lab.go(hold=hold))
    assert counts["masked.survivors",] == 3 + 3  # of round 2, and of the last
    assert counts["masked.open", "masked.keys"] == 3
    assert [body.survivors for body in lab.done.bodies(RoundOpened)] == [
        NAMES,
        ("a", "c", "d"),
        ("a", "c", "d"),
    ]
    second = lab.transcripts()[1]
    assert second.members == NAMES
    assert all(len(given.keys) == 1 for given in second.opened)
    report = lab.done.report()
    assert not report.failures, report.text()


def test_a_coordinator_that_asks_for_the_next_keys_first_loses_the_round_it_is_in(lab: Any) -> None:
    """Secrets of a round are gone once the next one's keys are made; so it opens nothing, and hears why."""
    lab = lab(CHARTER)

    def lie(agent: Agent, kind: str, answer: dict[str, Any]) -> None:
        if kind == "round" and agent.ledger.masked_round(lab.run, 2) is None:
            header = {"run": lab.run, "round": 2, "charter": lab.charter.digest, "attempt": 0}
            call(agent, "masked.keys", {**header, "participants": list(NAMES)})

    with pytest.raises(RunFailedError, match="not_opened"):
        lab.go(lie=lie)
    assert lab.done.bodies(RoundOpened) == lab.done.bodies(RoundCompleted) == []
    assert {body.reason for body in lab.done.bodies(SiteRefused)} == {"round_out_of_order"}
    assert lab.done.bodies(Statement) == []

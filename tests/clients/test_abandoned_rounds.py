"""Masked rounds that are lost in the middle of a run, with real agents; and coordinators that lose them on
purpose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from audit.entries import RoundAbandoned, RoundCompleted, RunFailed, SiteRefused, SiteUndelivered
from audit.entries import SiteStatement as Statement
from audit.principal import LocalOwner, Principal
from audit.secure_bodies import RoundOpened
from audit.verify import Word
from clients.agent import Agent
from clients.client_app import app as client_app
from clients.inprocess import live_agents
from clients.local_layers import LocalLayers
from clients.simulation import _set_up, join_all
from federation import service
from federation.charter import Charter
from federation.coordinator import Coordinator
from federation.errors import RunFailedError
from federation.exchange import Exchange
from federation.grid import InProcessGrid
from federation.runs import find_run
from federation.server_app import carry_out as carry_run_out
from federation.service import TrainRequest
from tests.audit_verify.judging import EPSILON, ODOMETERS, REPLAY, ROUNDS
from tests.clients import test_masked_runs as masked_runs
from tests.clients.conftest import SITES, Network, call, refusal_code
from tests.clients.masked_driver import Driver, masked_charter
from tests.clients.test_masked_runs import CHARTER, NAMES, Between, Carried, honestly, never
from tests.federation.dying import CrashError, Dying

carry_out = masked_runs.carry_out
SPARE = CHARTER.replace("minimum_sites: 3", "minimum_sites: 3, spare_rounds: 1")
COUNTS = "evaluation: {share: 0.2, noise_multiplier: 4}\n"


def losing(kind: str, *sites: str, times: int = 1) -> Callable[[Agent, str, dict[str, Any]], None]:
    """These sites' first answers of a kind are lost on their way back; what they did is done."""
    seen: dict[str, int] = {}

    def lie(agent: Agent, asked: str, answer: dict[str, Any]) -> None:
        if asked == kind and agent.name in sites and seen.get(agent.name, 0) < times:
            seen[agent.name] = seen.get(agent.name, 0) + 1
            answer.clear()
            answer["error"] = "site_closed"  # what is not asked again

    return lie


def both(*lies: Callable[[Agent, str, dict[str, Any]], None]) -> Callable[..., None]:
    def lie(agent: Agent, asked: str, answer: dict[str, Any]) -> None:
        for one in lies:
            one(agent, asked, answer)

    return lie


@pytest.mark.parametrize(
    ("lost", "reason", "more"),
    [
        ([("masked.survivors", "b", "c")], "not_opened", COUNTS),  # shares were given, too few arrived
        ([("round", "d"), ("masked.survivors", "b")], "not_opened", ""),
        ([("round", "d"), ("masked.open", "b")], "not_opened", ""),
        ([("round", "b", "c")], "not_enough_sites", ""),  # two released, and nobody heard
        ([("masked.keys", "b", "c")], "not_enough_sites", ""),
        ([("masked.shares", "b", "c")], "not_enough_sites", ""),
    ],
    ids=lambda value: "-".join(kind for kind, *_ in value) if isinstance(value, list) else None,
)
def test_a_lost_masked_round_costs_a_spare_one_and_not_the_run(
    carry_out: Any, lost: list[tuple[str, ...]], reason: str, more: str
) -> None:
    kind = lost[-1][0]
    done = carry_out(lie=both(*(losing(*one) for one in lost)), charter=SPARE + more)
    assert done.failed is None, done.failed
    (body,) = done.bodies(RoundAbandoned)
    assert (body.round, body.reason) == (1, reason)
    assert [body.round for body in done.bodies(RoundCompleted)] == [2, 3]
    assert [body.round for body in done.bodies(RoundOpened)] == [2, 3]
    written_off = {body.statement.site: body.statement for body in done.bodies(SiteUndelivered)}
    fresh = {body.site: body for body in done.bodies(Statement) if body.round == 2}
    assert sorted(fresh) == list(NAMES)
    assert sorted(written_off) == ([] if kind in ("masked.keys", "masked.shares") else list(NAMES))
    for site, statement in written_off.items():
        assert (statement.round, statement.sequence, fresh[site].sequence) == (1, 1, 2)
        assert fresh[site].roster != statement.roster
        assert fresh[site].update != statement.update
    report = done.report()
    assert not report.failures, report.text()
    assert f"round 1 ({reason})" in report.step(ROUNDS).detail
    assert report.step(REPLAY).word is Word.PROVED
    assert report.step(EPSILON).word is Word.PROVED
    assert "at most 0 of 3 sites collude" in report.step(EPSILON).detail  # who knows whether it was opened
    released = len(written_off) // 4 + 2 + bool(more)
    assert report.step(ODOMETERS).detail.count(f"1 to {released}") == 4, report.text()
    assert {body.round for body in done.bodies(Statement)} == {2, 3} | ({4} if more else set())


def test_with_no_spare_round_left_every_release_stays_debited_and_the_run_fails(carry_out: Any) -> None:
    done = carry_out(lie=losing("masked.survivors", "b", "c", times=2), charter=SPARE)
    assert done.failed is not None
    assert [body.round for body in done.bodies(RoundAbandoned)] == [1, 2]
    assert [(body.round, body.reason) for body in done.bodies(RunFailed)] == [(2, "not_opened")]
    assert [body.statement.sequence for body in done.bodies(SiteUndelivered)] == [1] * 4 + [2] * 4


def test_an_old_share_in_a_new_round_is_refused(carry_out: Any) -> None:
    """a's sealed shares of the abandoned round, shown to the others in the next one, open nothing."""
    kept: list[dict[str, str]] = []
    lose = losing("masked.survivors", "b", "c")

    def lie(agent: Agent, kind: str, answer: dict[str, Any]) -> None:
        lose(agent, kind, answer)
        if (agent.name, kind) == ("a", "masked.shares"):
            kept.append(dict(answer["shares"]))
            if len(kept) == 2:
                answer["shares"] = {site: kept[0][site] for site in answer["shares"]}

    done = carry_out(lie=lie, charter=SPARE)
    refused = {(body.site, body.round, body.reason) for body in done.bodies(SiteRefused)}
    assert {(site, 2, "roster_not_proved") for site in "bcd"} <= refused
    assert done.failed is not None  # b, c and d are needed, and released nothing for round 2
    assert {body.statement.round for body in done.bodies(SiteUndelivered)} == {1, 2}
    assert {body.statement.site for body in done.bodies(SiteUndelivered) if body.statement.round == 2} == {
        "a"
    }


class Rewriting:
    """A coordinator that writes something else of an abandoned round than what happened."""

    def __init__(self, coordinator: Coordinator, **changes: Any) -> None:
        self._coordinator, self._changes = coordinator, changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coordinator, name)

    def append(self, body: Any, *more: Any) -> Any:
        if isinstance(body, RoundAbandoned):
            body = dataclasses.replace(body, **self._changes)
        return self._coordinator.append(body, *more)


@pytest.fixture
def begun(tmp_path: Path) -> Any:
    """Return `go(home, lie)`, which carries one run out with such a coordinator, and what is there."""
    federation, agreed = _set_up(SPARE, masked_runs.SITES, None, tmp_path / "sim", "1000")
    join_all(federation.homes, federation.coordinator)
    agents = {name: Agent.open(home) for name, home in federation.homes.items()}
    author, log = federation.scientist.key, federation.coordinator
    principal = Principal(id="curie", role="scientist", key=author.text)
    run = service.start_run(log, principal, LocalOwner(), TrainRequest(charter=agreed), author)
    done = Carried(federation, agreed, None, run)

    def go(home: Any, lie: Any = honestly) -> Carried:
        links: Any = {name: Between(agent, never, lie) for name, agent in agents.items()}
        with live_agents(links), InProcessGrid(client_app, {name: {} for name in agents}) as grid:
            exchange = Exchange(grid, poll_s=0.001, discovery_s=5)
            carry_run_out(grid, home or log, run, exchange=exchange, hold_s=0.2, principal="curie")
        return done

    yield go, log, done, agents
    for agent in agents.values():
        agent.close()
    federation.close()


def test_a_coordinator_killed_after_the_entry_opens_the_next_round_and_not_the_same_one(begun: Any) -> None:
    go, log, done, agents = begun
    dying: Any = Dying(log, 10_000, lambda: bool(done.bodies(RoundAbandoned)))
    with pytest.raises(CrashError):
        go(dying, losing("masked.survivors", "b", "c"))
    go(None)
    assert [body.round for body in done.bodies(RoundAbandoned)] == [1]
    assert [body.round for body in done.bodies(RoundCompleted)] == [2, 3]
    assert {agent.ledger.head(agent.population).sequence for agent in agents.values()} == {3}
    report = done.report()
    assert not report.failures, report.text()
    assert "taken up again once, at round 2" in report.step(ROUNDS).detail
    scientist = Principal(id="curie", role="scientist", key=done.federation.scientist.public)
    request = service.RegisterRequest(run=done.run)
    claims = service.register(log, scientist, LocalOwner(), request).registered.epsilons
    assert [claim.events for claim in claims] == [3] * 4  # what was lost is claimed with the rest
    assert {claim.run_epsilon for claim in claims} == {claim.lifetime_epsilon for claim in claims}
    view = find_run(log.ledger, done.run)
    assert view.abandoned == {1: "not_opened"}
    assert view.undelivered == dict.fromkeys(NAMES, 1)


@pytest.mark.parametrize(
    ("field", "forged", "code"),
    [("base_model", "ab" * 32, "base_model_mismatch"), ("round", 2, "round_out_of_order")],
)
def test_a_site_builds_on_no_other_end_of_a_round_than_it_saw(
    begun: Any, field: str, forged: Any, code: str
) -> None:
    go, log, done, agents = begun
    with pytest.raises(RunFailedError):
        go(Rewriting(log, **{field: forged}), losing("masked.survivors", "b", "c"))
    assert not done.bodies(RoundCompleted)
    assert {body.reason for body in done.bodies(SiteRefused)} == {code}
    assert {agent.ledger.head(agent.population).sequence for agent in agents.values()} == {1}


def test_an_abandoned_round_on_another_history_is_found(begun: Any) -> None:
    """No site can see what came before its own first round; the verifier can."""
    go, log, done, _ = begun
    go(Rewriting(log, previous_round="ab" * 32), losing("masked.survivors", "b", "c"))
    report = done.report()
    assert (report.failures[0].title, report.failures[0].code) == (ROUNDS, "round.abandoned")


def test_a_sum_that_was_opened_and_said_to_be_lost_is_found(begun: Any) -> None:
    go, log, done, _ = begun

    class Opening(Rewriting):
        def append(self, body: Any, *more: Any) -> Any:
            if isinstance(body, RoundAbandoned):
                digest = "ab" * 32
                opened = RoundOpened(
                    run=body.run, round=1, roster=digest, survivors=NAMES, transcript=digest, total=digest
                )
                log.append(opened, "coordinator")
            return super().append(body, *more)

    go(Opening(log), losing("masked.survivors", "b", "c"))
    report = done.report()
    assert (report.failures[0].title, report.failures[0].code) == (ROUNDS, "round.abandoned")
    assert "its masked sum was opened" in report.failures[0].detail


# by hand


@pytest.fixture
def driver(network: Network) -> Driver:
    """A masked run of two rounds and a spare one, up to the masked updates of round 1."""
    text = masked_charter(network.agents, rounds=2).to_yaml()
    network.charter = Charter.parse(text.replace("spare_rounds: 0", "spare_rounds: 1"))
    network.start(network.charter)
    driver = Driver(network)
    driver.ask_keys()
    driver.ask_shares()
    for site in SITES:
        driver.update(site)
    return driver


def header(driver: Driver, number: int, **fields: Any) -> dict[str, Any]:
    network = driver.network
    return {"run": network.run, "round": number, "charter": network.charter.digest, **fields}


def test_the_same_round_is_not_opened_again_for_the_same_sites(driver: Driver) -> None:
    agent = driver.network.agents["alpha"]
    fewer = header(driver, 1, attempt=0, participants=["alpha", "beta"])
    assert refusal_code(call(agent, "masked.keys", fewer)[0]) == "already_answered"
    anew = header(driver, 1, attempt=1, participants=list(SITES))
    assert refusal_code(call(agent, "masked.keys", anew)[0]) == "already_answered"
    assert refusal_code(driver.update("alpha", shares={"beta": driver.sealed["beta"]["alpha"]})) == (
        "already_released"
    )
    assert agent.ledger.head(agent.population).sequence == 1


def test_rounds_without_end_are_bounded_by_the_plan(driver: Driver) -> None:
    for number, wanted in ((3, None), (4, "round_out_of_order"), (10**6, "round_out_of_order")):
        answer = call(
            driver.network.agents["alpha"],
            "masked.keys",
            header(driver, number, attempt=0, participants=list(SITES)),
        )[0]
        assert ("keys" in answer) if wanted is None else (refusal_code(answer) == wanted)
    agent = driver.network.agents["alpha"]
    assert len(agent.ledger.committed_events(agent.population)) == 3  # two rounds, one spare: never more


def test_once_the_next_round_has_begun_the_lost_one_cannot_be_opened(driver: Driver) -> None:
    driver.updates.pop("gamma")
    driver.ask_survivors(("alpha", "beta"))
    agent = driver.network.agents["alpha"]
    assert "keys" in call(agent, "masked.keys", header(driver, 2, attempt=0, participants=list(SITES)))[0]
    answer = driver.step("open", "alpha", agreed=[driver.agreed[site] for site in ("alpha", "beta")])
    assert refusal_code(answer) == "round_out_of_order"


def test_a_site_names_what_it_released_for_an_open_run_and_nothing_else(driver: Driver) -> None:
    agent = driver.network.agents["alpha"]
    answer = call(agent, "run.undelivered", {"run": driver.network.run})[0]
    assert [said["round"] for said in answer["undelivered"]] == [1]
    assert refusal_code(call(agent, "run.undelivered", {"run": "run-x"})[0]) == "run_not_accepted"
    assert refusal_code(call(agent, "run.undelivered", {"run": 1})[0]) == "bad_request"
    assert refusal_code(call(agent, "run.undelivered", {})[0]) == "bad_request"


# what stays at a site


def test_layers_of_an_abandoned_round_are_forgotten_and_the_last_ones_are_averaged(tmp_path: Path) -> None:
    kept = LocalLayers(tmp_path / "local")
    for number in (1, 2, 4, 5):
        kept.save("run-1", number, [float(number)], keep=2)
    assert kept.load("run-1", 2) is None
    assert kept.load_before("run-1", 5) == [4.0]
    assert kept.average("run-1", 9, 2) == [4.5]
    kept.drop("run-1", 5)
    assert kept.load_before("run-1", 6) == [4.0]
    assert kept.load_before("run-1", 4) is None
    kept.save("run-1.5", 6, [60.0], keep=2)  # another run, whose name begins alike
    assert kept.load_before("run-1", 9) == [4.0]

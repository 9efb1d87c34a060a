"""Two runs on one population: the second is refused while the first holds it, and nothing is spent twice."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest

from audit.entries import RunCompleted, RunFailed, RunStarted, parse_body
from clients.errors import OdometerError
from clients.ledger import Reservation
from clients.reviewing import withdraw
from clients.virtual import VirtualLedger
from tests.clients.conftest import SITES, Network, call, refusal_code


def propose(network: Network, run: str, **more: Any) -> dict[str, Any]:
    """Another coordinator's run, to one site."""
    kept = network.base, network.theta
    header = {"run_started": network.run_started(run=run), "charter": network.text(), **more}
    network.base, network.theta = kept  # the first run goes on from its own model
    return call(network.agents["alpha"], "run.propose", header)[0]


def ended(network: Network, run: str, kind: type = RunFailed, **options: Any) -> dict[str, str]:
    """The end of a run, as the log holds it."""
    body: Any = RunFailed(run=run, charter=network.charter.digest, round=0, reason="stopped")
    if kind is RunCompleted:
        digest = network.charter.digest
        body = RunCompleted(run=run, charter=digest, rounds=3, last_round="0" * 64, weights="0" * 64)
    if kind is RunStarted:
        body = parse_body(RunStarted, network.run_started(run=run))
    return network.logged(network.coordinator.append(body, "coordinator").leaf_index, **options)


def test_two_coordinators_runs_interleaved_spend_one_plan(network: Network) -> None:
    network.start()
    agent = network.agents["alpha"]
    assert refusal_code(propose(network, "run-2")) == "population_busy"
    network.play(1)
    assert refusal_code(propose(network, "run-2")) == "population_busy"
    assert refusal_code(network.ask("alpha", 1, run="run-2")[0]) == "run_not_accepted"
    network.play(2)
    assert refusal_code(propose(network, "run-3")) == "population_busy"
    assert [held.run for held in agent.ledger.open_reservations(agent.population)] == ["run-1"]
    planned = network.charter.plan.rounds
    assert len(agent.ledger.committed_events(agent.population)) == planned
    assert "acceptance" in network.propose(only="alpha")["alpha"]  # the first one's own question, once more
    call(agent, "run.finished", {"run": network.run})
    assert "acceptance" in propose(network, "run-2")
    assert len(agent.ledger.committed_events(agent.population)) == 2 + planned


def test_of_many_runs_at_once_one_is_accepted(network: Network) -> None:
    network.sign()
    agent, answers = network.agents["alpha"], []
    headers = [
        {"run_started": network.run_started(run=f"run-{number}"), "charter": network.text()}
        for number in range(8)
    ]
    gate = threading.Barrier(len(headers))

    def ask(header: dict[str, Any]) -> None:
        gate.wait()
        answers.append(call(agent, "run.propose", header)[0])

    threads = [threading.Thread(target=ask, args=(header,)) for header in headers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = sorted(refusal_code(answer) for answer in answers)
    assert codes == ["none", *["population_busy"] * 7]
    assert len(agent.ledger.committed_events(agent.population)) == network.charter.plan.rounds


@pytest.mark.parametrize("kind", [RunFailed, RunCompleted])
def test_a_run_that_the_log_shows_to_be_over_holds_nobody(network: Network, kind: type) -> None:
    """The site was away when the run ended, and never heard it from the coordinator."""
    network.start()
    assert "acceptance" in propose(network, "run-2", ended=ended(network, "run-1", kind))
    assert refusal_code(network.ask("alpha", 1)[0]) == "run_not_accepted"


def test_what_is_shown_as_the_end_must_be_one_and_witnessed(network: Network) -> None:
    network.start()
    few = ended(network, "run-1", witnesses=1)
    assert refusal_code(propose(network, "run-2", ended=few)) == "unwitnessed_history"
    other = ended(network, "run-1", RunStarted)
    assert refusal_code(propose(network, "run-2", ended=other)) == "unwitnessed_history"
    another = ended(network, "run-0")
    assert refusal_code(propose(network, "run-2", ended=another)) == "population_busy"
    altered = ended(network, "run-1") | {"entry": ended(network, "run-7")["entry"]}
    assert refusal_code(propose(network, "run-2", ended=altered)) == "unwitnessed_history"
    assert refusal_code(propose(network, "run-2", ended="over")) == "bad_request"
    network.play(1)  # the run goes on


def test_people_may_end_a_run_that_nobody_carries_out_and_it_does_not_come_back(network: Network) -> None:
    network.start()
    home = network.agents["alpha"].home
    withdraw(home, "run-1")
    assert refusal_code(network.ask("alpha", 1)[0]) == "refused_by_site"
    assert "acceptance" in propose(network, "run-2")
    assert refusal_code(network.ask("alpha", 1)[0]) == "run_not_accepted"
    assert refusal_code(network.propose(only="alpha")["alpha"]) == "run_not_accepted"


@pytest.mark.parametrize("virtual", [False, True])
def test_the_ledger_itself_holds_one_open_run_a_population(network: Network, virtual: bool) -> None:
    agent = network.agents["alpha"]
    ledger: Any = VirtualLedger() if virtual else agent.ledger
    first = Reservation("run-1", agent.population, network.text(), (), b"{}", False)
    ledger.reserve(first)
    with pytest.raises(OdometerError, match="has the population"):
        ledger.reserve(dataclasses.replace(first, run="run-2"))
    ledger.reserve(dataclasses.replace(first, run="run-3", population="0" * 32))
    ledger.close_run("run-1")
    ledger.reserve(dataclasses.replace(first, run="run-2"))
    assert [held.run for held in ledger.open_reservations(agent.population)] == ["run-2"]


def test_a_restarted_agent_still_holds_its_population(network: Network) -> None:
    network.start()
    network.restart("alpha")
    assert refusal_code(propose(network, "run-2")) == "population_busy"
    assert set(SITES) == set(network.agents)

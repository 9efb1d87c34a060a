"""The site decides: by its rules, or by its people while the run waits; each decision is an entry."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import yaml

from audit.entries import RunAccepted, SiteRefused, decode_signature, signing_payload
from audit.site_bodies import RequestRefused, SiteDecided
from clients.errors import HomeError
from clients.home import SiteHome
from clients.proposals import MAX_PENDING, Proposals
from clients.reviewing import (
    DecisionError,
    accept,
    find_proposal,
    refuse,
    review_proposal,
    withdraw,
)
from clients.service import status

BROKEN = [
    ({"epsilon_per_run": "0.01"}, "budget_exhausted"),
    ({"epsilon_per_year": "0.01"}, "budget_exhausted"),
    ({"models": ["another"]}, "model_not_allowed"),
    ({"minimum_sites": 4}, "participants_not_allowed"),
    ({"purposes": ["billing"]}, "purpose_not_allowed"),
]


@pytest.fixture
def ruled(build_network):
    """Return `ruled(**rules) -> network`: alpha has these rules, and the charter is signed everywhere."""

    def ruled(*, sign=True, lifetime_epsilon="20", **rules):
        network = build_network(lifetime_epsilon=lifetime_epsilon)
        if sign:
            network.sign()
        set_rules(network, **rules)
        return network

    return ruled


def set_rules(network, site="alpha", **rules):
    path = network.agents[site].home.path / "site.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["rules"] |= rules
    path.write_text(yaml.safe_dump(document), encoding="utf-8")


def decisions(network, site="alpha"):
    return [
        (body.run, body.decision, body.by, body.rules, body.reason)
        for _, _, body in network.agents[site].log.entries(SiteDecided)
    ]


def test_a_run_within_the_rules_is_accepted_and_the_decision_is_a_signed_entry(ruled):
    network = ruled(epsilon_per_run="19", minimum_sites=3, models=["small"])
    assert "acceptance" in network.propose(only="alpha")["alpha"]
    said = network.agents["alpha"].log.latest(SiteDecided)
    assert (said.run, said.decision, said.by, said.rules) == ("run-1", "accepted", "rules", ())
    assert float(said.run_epsilon) > 0
    domain, payload = signing_payload(said)
    network.agents["alpha"].home.keys().statement.verify_key.verify(
        domain, payload, decode_signature(said.signature)
    )


def test_a_broken_rule_refuses_with_its_code_and_reserves_nothing(ruled, code_of):
    network, told = ruled(), []
    agent = network.agents["alpha"]
    untouched = agent.home.config.rules.model_dump(mode="json", exclude={"approved_charters"})
    for number, (rules, code) in enumerate(BROKEN):
        set_rules(network, **(untouched | rules))
        network.run = f"run-{number}"
        assert code_of(network.propose(only="alpha")["alpha"]) == code
        assert decisions(network)[-1] == (network.run, "refused", "rules", (next(iter(rules)),), code)
        told.append(code)
    assert agent.ledger.open_reservations(agent.population) == ()
    assert [body.reason for _, _, body in agent.log.entries(SiteRefused)] == told


def test_a_rule_that_asks_makes_the_run_wait_and_nothing_is_signed(ruled):
    network = ruled(epsilon_per_run="0.01", ask=["epsilon_per_run"])
    assert network.propose(only="alpha")["alpha"] == {"error": "waiting_for_site"}
    assert network.propose(only="alpha")["alpha"] == {"error": "waiting_for_site"}
    assert status(network.agents["alpha"].home).waiting == ("run-1",)
    assert decisions(network)[-1] == ("run-1", "waiting", "rules", ("epsilon_per_run",), "")
    assert len(decisions(network)) == 2  # the charter, and once that it waits
    assert list(network.agents["alpha"].log.entries(RequestRefused)) == []


def test_people_accept_a_run_that_waits_while_its_agent_runs(ruled):
    network = ruled(ask=["runs"])
    home = network.agents["alpha"].home
    network.propose(only="alpha")
    found = review_proposal(home, find_proposal(home, "run-1"))
    assert (found.run, found.model, found.fits, found.decision) == ("run-1", "small", True, "")
    assert found.lifetime_before == 0 < found.run_epsilon == pytest.approx(found.lifetime_after)
    assert found.members == ("alpha", "beta", "gamma")
    assert found.code == "0" * 64
    accept(home, find_proposal(home, "run-1"))
    assert "acceptance" in network.propose(only="alpha")["alpha"]
    assert status(home).waiting == ()
    assert decisions(network)[-1] == ("run-1", "accepted", "person", (), "")


def test_people_may_pass_their_own_rules_and_never_the_lifetime_cap(ruled, code_of):
    network = ruled(epsilon_per_run="0.01", ask=["epsilon_per_run"])
    home = network.agents["alpha"].home
    network.propose(only="alpha")
    accept(home, find_proposal(home, "run-1"))
    assert "acceptance" in network.propose(only="alpha")["alpha"]

    tight = ruled(ask=["runs"], lifetime_epsilon="0.5")
    assert code_of(tight.propose(only="alpha")["alpha"]) == "budget_exhausted"
    from clients.proposals import Proposal

    with pytest.raises(DecisionError, match="no decision passes that cap"):
        accept(tight.agents["alpha"].home, Proposal(charter=tight.text(), run=None))


def test_what_people_accepted_is_one_start_and_no_other(ruled):
    network = ruled(ask=["runs"])
    home = network.agents["alpha"].home
    network.propose(only="alpha")
    accept(home, find_proposal(home, "run-1"))
    swapped = network.propose(only="alpha", model="another")["alpha"]
    assert swapped == {"error": "waiting_for_site"}
    assert "acceptance" in network.propose(only="alpha")["alpha"]


def test_people_refuse_with_a_code_and_only_the_code_leaves(ruled, code_of):
    network = ruled(ask=["runs"])
    home = network.agents["alpha"].home
    network.propose(only="alpha")
    refuse(home, find_proposal(home, "run-1"), reason="purpose_not_allowed")
    answer = network.propose(only="alpha")["alpha"]
    assert code_of(answer) == "purpose_not_allowed"
    assert set(answer["refusal"]) == {"run", "charter", "site", "round", "reason", "signature"}
    with pytest.raises(DecisionError, match="closed list"):
        refuse(home, find_proposal(home, str(network.charter_file())), reason="we do not like them")


def test_a_charter_that_asks_waits_until_somebody_decides(ruled, code_of, request_of):
    network = ruled(sign=False, auto_approve=False, ask=["charters"])
    alpha, home = network.agents["alpha"], network.agents["alpha"].home
    ask = lambda: request_of(alpha, "charter.sign", network.to_sign())[0]  # noqa: E731
    assert ask() == {"error": "waiting_for_site"}
    assert status(home).waiting == (network.charter.digest,)
    refuse(home, find_proposal(home, network.charter.digest[:12]))
    assert code_of(ask()) == "refused_by_site"
    accept(home, find_proposal(home, str(network.charter_file())))
    assert "signature" in ask()


def test_a_run_can_be_left_half_way_and_what_was_released_stays_spent(ruled, code_of):
    network = ruled()
    network.propose()
    network.play(1)
    home = network.agents["alpha"].home
    withdraw(home, "run-1")
    first, _ = network.ask("alpha", 2)
    assert code_of(first) == "refused_by_site"
    assert network.agents["alpha"].ledger.head(network.agents["alpha"].population).sequence == 1
    with pytest.raises(DecisionError, match="neither waits"):
        withdraw(home, "run-9")


def test_only_so_many_proposals_wait(ruled, code_of):
    network = ruled(ask=["runs"])
    folder = network.agents["alpha"].home.path / "proposals"
    folder.mkdir()
    for number in range(MAX_PENDING):
        (folder / f"run-x{number}.json").write_text("{}")
    assert code_of(network.propose(only="alpha")["alpha"]) == "rate_limited"
    assert len(Proposals(network.agents["alpha"].home.path).ids()) == MAX_PENDING


def test_a_run_may_not_pose_as_a_charter(ruled, code_of):
    network = ruled(ask=["runs"])
    network.run = "a" * 64
    assert code_of(network.propose(only="alpha")["alpha"]) == "bad_request"


def test_an_altered_proposal_is_not_shown(ruled):
    network = ruled(ask=["runs"])
    home = network.agents["alpha"].home
    network.propose(only="alpha")
    path = home.path / "proposals" / "run-1.json"
    path.rename(path.with_name("run-2.json"))
    with pytest.raises(HomeError, match="another proposal"):
        find_proposal(home, "run-2")
    with pytest.raises(DecisionError, match="does not wait"):
        find_proposal(home, "../../etc/passwd-not-there")


def test_a_site_yaml_that_breaks_stops_new_runs_and_says_nothing_outward(ruled, code_of):
    network = ruled()
    path = network.agents["alpha"].home.path / "site.yaml"
    path.write_text(path.read_text() + "colour: blue\n")
    assert code_of(network.propose(only="alpha")["alpha"]) == "internal_error"


def test_the_year_is_counted_from_the_sites_own_entries(build_network):
    from clients.agent import Agent
    from clients.decisions import year_events

    now = [datetime(2026, 1, 1, tzinfo=UTC)]
    network = build_network(agent=lambda home: Agent.open(home, clock=lambda: now[0]))
    network.start()
    agent = network.agents["alpha"]
    network.ask("alpha", 1)

    def count(later):
        return len(year_events(agent.log, agent.ledger, agent.population, now[0] + timedelta(days=later)))

    assert count(0) == 3  # one released, two reserved
    assert count(364) == 3
    assert count(366) == 2


def test_the_agent_writes_its_side_of_the_story_before_it_answers(ruled):
    network = ruled()
    network.propose()
    network.play(1)
    types = [entry.type for _, entry in entries_of(network.agents["alpha"].log)]
    assert types[:2] == ["log.created", "site.log_opened"]
    assert types.index("run.accepted") < types.index("site.statement")
    accepted = network.agents["alpha"].log.latest(RunAccepted)
    assert accepted.run == "run-1"


def entries_of(log):
    from audit.entries import decode_entry

    return [(i, decode_entry(data)) for i, data in enumerate(log._ledger.entries(0, log.tree_size))]


def test_a_crash_between_ledger_and_log_is_made_up_for_when_the_agent_starts(ruled, tmp_path):
    import shutil

    from audit.entries import SiteStatement

    network = ruled()
    network.propose()
    home = network.agents["alpha"].home.path
    network.agents["alpha"].close()
    for name in ("log.db", "log-signer"):
        copy = shutil.copytree if (home / name).is_dir() else shutil.copy
        copy(home / name, tmp_path / name)
    network.restart("alpha")
    network.play(1)
    network.agents["alpha"].close()
    for name in ("log.db", "log-signer"):  # as if the entry had not become durable
        target = home / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.move(tmp_path / name, target)
    agent = network.restart("alpha")
    assert agent.log.count(SiteStatement) == 1


def test_an_old_ledger_beside_the_sites_own_log_is_refused(ruled, tmp_path):
    import shutil

    from clients.agent import Agent
    from clients.errors import LedgerBehindError

    network = ruled()
    network.propose()
    home = SiteHome.open(network.agents["alpha"].home.path)
    network.agents["alpha"].close()
    kept = {path: path.read_bytes() for path in (home.ledger_path,)}
    network.restart("alpha")
    network.play(1)
    network.agents["alpha"].close()
    for path, data in kept.items():
        path.write_bytes(data)
    home.high_water_path.unlink(missing_ok=True)
    with pytest.raises(LedgerBehindError, match="own log"):
        Agent.open(home)
    shutil.rmtree(home.path / "log-signer")
    with pytest.raises(HomeError):
        Agent.open(home)
    network.agents.pop("alpha")

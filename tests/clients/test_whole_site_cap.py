"""A cap on what all rows of a site together spend over its life: kept by the agent, signed into the log,
held against it by the verifier. And what a site's people read of how answers may be used.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audit.canonical import parse_canonical
from audit.entries import RunAccepted, parse_body
from audit.epsilon import recompute, whole_site_epsilon
from audit.shared_noise import site_level
from audit.verify import Verdict
from clients.errors import HomeError
from clients.home import SiteHome
from clients.proposals import Proposal
from clients.reviewing import review_proposal
from clients.service import status_of
from clients.terms_of_use import terms_of_use
from federation.charter import Charter
from federation.mechanism import planned_events
from tests.audit_verify.judging import EPSILON, RUN, assert_caught
from tests.audit_verify.test_forged_masks import WholeSites, with_whole_sites
from tests.clients.conftest import Network, call, charter_text, refusal_code
from tests.clients.masked_driver import masked_charter

BOUND = "site_level: {max_update_norm: 3, epsilon: 200}\n"


def capped(network: Network, cap: str | None, site: str = "alpha") -> None:
    """Write the cap into site.yaml, as the site's people do."""
    path = network.agents[site].home.path / "site.yaml"
    text = path.read_text(encoding="utf-8")
    assert "whole_site_epsilon: null" in text or "whole_site_epsilon" not in text
    lines = [line for line in text.splitlines() if "whole_site_epsilon" not in line]
    at = next(place for place, line in enumerate(lines) if line.startswith("lifetime:"))
    lines.insert(at + 1, f"  whole_site_epsilon: '{cap}'")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def cost(charter: Charter, runs: int = 1) -> float:
    delta = 1e-5
    return recompute([site_level(event) for event in planned_events(charter) * runs], delta).value


@pytest.fixture
def bounded(build_network: Any) -> Network:
    network: Network = build_network(lifetime_epsilon="500")
    network.charter = masked_charter(network.agents, rounds=2, more=BOUND)
    network.sign(network.charter)
    return network


def again(network: Network, run: str) -> dict[str, Any]:
    header = {"run_started": network.run_started(run=run), "charter": network.text()}
    return call(network.agents["alpha"], "run.propose", header)[0]


def test_the_cap_counts_all_runs_and_stops_hard(bounded: Network) -> None:
    one, two = cost(bounded.charter), cost(bounded.charter, 2)
    capped(bounded, f"{(one + two) / 2:.2f}")
    bounded.restart("alpha")  # budgets are read when an agent starts, unlike rules
    accepted = again(bounded, "run-1")["acceptance"]
    assert accepted["whole_site_epsilon_cap"] == f"{(one + two) / 2:.2f}".rstrip("0")
    assert accepted["lifetime_delta"] == "0.00001"
    call(bounded.agents["alpha"], "run.finished", {"run": "run-1"})
    assert "acceptance" in again(bounded, "run-2")  # nothing was released: the plan is free again
    call(bounded.agents["alpha"], "run.finished", {"run": "run-2"})
    capped_low = f"{one * 0.9:.2f}"
    path = bounded.agents["alpha"].home.path / "site.yaml"
    text = path.read_text(encoding="utf-8").replace(accepted["whole_site_epsilon_cap"], capped_low)
    path.write_text(text, encoding="utf-8")
    bounded.restart("alpha")
    assert refusal_code(again(bounded, "run-3")) == "budget_exhausted"
    agent = bounded.agents["alpha"]
    assert agent.ledger.head(agent.population).sequence == 0


def test_a_release_that_bounds_nothing_of_a_site_is_refused_under_a_cap(network: Network) -> None:
    capped(network, "999")
    network.sign()
    answers = network.propose()
    assert refusal_code(answers["alpha"]) == "budget_exhausted"
    assert "acceptance" in answers["beta"]  # which sets none, and says none
    assert "whole_site_epsilon_cap" not in answers["beta"]["acceptance"]


def test_a_sites_people_see_the_cap_and_what_a_run_would_cost(bounded: Network) -> None:
    capped(bounded, "150")
    agent = bounded.agents["alpha"]
    home = SiteHome.open(agent.home.path)
    found = review_proposal(home, Proposal(charter=bounded.text(), run=None))
    assert found.whole_site.startswith("0 now, ") or found.whole_site.startswith("0.0000 now, ")
    assert found.whole_site.endswith("afterwards, cap 150")
    status = status_of(home, agent.ledger)
    assert (status.whole_site_cap, status.whole_site_epsilon) == ("150", 0.0)


@pytest.mark.parametrize("cap", ["0", "-3", "1e9", "much"])
def test_a_cap_is_a_number_above_nothing(network: Network, cap: str) -> None:
    capped(network, cap)
    with pytest.raises(HomeError, match="whole_site_epsilon"):
        SiteHome.open(network.agents["alpha"].home.path)


def test_an_acceptance_without_a_cap_has_the_bytes_it_had(network: Network) -> None:
    network.sign()
    accepted = network.propose()["beta"]["acceptance"]
    assert set(accepted).isdisjoint({"whole_site_epsilon_cap", "lifetime_delta"})
    assert parse_body(RunAccepted, accepted).whole_site_epsilon_cap == ""


def test_what_bounds_nothing_costs_a_site_everything(bounded: Network) -> None:
    event = planned_events(bounded.charter)[0]
    assert whole_site_epsilon([], 1e-5) == 0.0
    assert whole_site_epsilon([event], 1e-5) > recompute([event], 1e-5).value
    assert whole_site_epsilon([event, replace(event, site_sensitivity_grid=0)], 1e-5) == math.inf


# the verifier


def judged(**fields: str) -> Any:
    def cap(world: Any, body: Any) -> Any:
        return replace(body, **fields) if body.site == "east" else body

    return WholeSites(charter_changes=with_whole_sites("40"), before={"run.accepted": cap}).judge()


def test_the_verifier_holds_a_site_to_the_cap_that_it_signed() -> None:
    report = judged(whole_site_epsilon_cap="40", lifetime_delta="0.00001")
    assert report.verdict is Verdict.VALID, report.text()
    assert "sites' own caps as a whole, over their lives: east" in report.step(EPSILON).detail
    report = judged(whole_site_epsilon_cap="2", lifetime_delta="0.00001")
    assert_caught(report, EPSILON, "epsilon.over_site_cap")


def test_a_cap_that_is_no_number_is_found() -> None:
    report = judged(whole_site_epsilon_cap="2", lifetime_delta="soon")
    assert_caught(report, EPSILON, "run.acceptance")
    assert report.step(RUN).code == "ok"


# how answers may be used


def test_a_review_says_how_answers_may_be_used(network: Network, tmp_path: Path) -> None:
    text = charter_text(network.agents, rounds=3) + (
        "\nanswers: {decimals: 2, cache: true}\ndecisions: legal_effect\nlegal_basis: required\n"
        "regions: [berlin]\nmax_age_days: 90\n"
    )
    charter = Charter.parse(text)
    home = network.agents["alpha"].home
    found = review_proposal(home, Proposal(charter=charter.canonical().decode(), run=None))
    assert found.use == (
        "an answer's numbers go out with 2 decimals",
        "identical requests may be answered from a cache, each with an entry of its own",
        "a person reviews each decision before it is final",
        "every request says its legal basis",
        "asked for from berlin alone",
        "for 90 days after a version's registration",
        "answers may be explained, feature by feature, where it is asked for",
        "how unusual a row is follows from the declared bounds alone",
    )


def test_what_a_charter_does_not_restrict_is_said_too(network: Network) -> None:
    document: Any = parse_canonical(network.charter.canonical())
    plain = terms_of_use(document)
    assert plain[0] == "an answer's numbers go out exactly as computed"
    assert "no person has to review a decision" in plain
    assert "asked for from any region" in plain
    labels = terms_of_use(document | {"answers": {"decimals": 9, "label_only": 1, "cache": 0}})
    assert labels[0] == "an answer is a label, without a number"
    assert "answers are not explained" in labels
    groups = terms_of_use(document | {"fairness": {"groups": ["sex"]}, "reference": {"bins": 8}})
    assert groups[-1] == "watched by groups of sex"
    assert "8 bins" in groups[-2]

"""A coordinator that asks a site's agent for more than the charter gives, where the unit is the site."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from audit.canonical import canonical_bytes
from audit.entries import SiteStatement, parse_body
from audit.epsilon import recompute, whole_site_epsilon
from audit.units import of_people
from audit.weights import decode_update
from federation.charter import Charter
from federation.mechanism import planned_events
from tests.clients.conftest import SITES, Network, call, charter_text, refusal_code
from tests.clients.masked_driver import Driver

CHANGES = (
    ("unit: row", "unit: site"),
    ("relation: add_remove", "relation: replace_one"),
    ("max_grad_norm: 1", "max_update_norm: 1"),
    ("nominal_rows: 20, weight: 1", "nominal_rows: 1"),
    ("learning_rate: 2", "learning_rate: 1, local_steps: 3, local_learning_rate: 0.5"),
)


def site_charter(network: Network, **terms: Any) -> Charter:
    text = charter_text(network.agents, rounds=2, **terms)
    for old, new in CHANGES:
        assert old in text, old
        text = text.replace(old, new)
    return Charter.parse(text + "secure_aggregation: {tolerated: 1}\n")


@pytest.fixture
def begun(network: Network) -> Driver:
    """Three sites that accepted a run; nothing was released."""
    network.charter = site_charter(network)
    network.start(network.charter)
    return Driver(network)


def odometer(network: Network, site: str = "alpha") -> int:
    agent = network.agents[site]
    return agent.ledger.head(agent.population).sequence


def play(driver: Driver) -> None:
    driver.ask_keys()
    driver.ask_shares()
    for site in SITES:
        driver.update(site)


def test_an_honest_round_opens_to_the_sum_and_names_the_unit(begun: Driver) -> None:
    play(begun)
    begun.ask_survivors(SITES)
    begun.ask_open(SITES)
    assert begun.total() == begun.expected()
    event = begun.statements["alpha"].event
    assert (event.unit, event.steps, event.sharers) == ("site", 1, 2)
    assert event == planned_events(begun.network.charter)[0]
    stored = begun.network.agents["alpha"].ledger.events(begun.network.agents["alpha"].population)
    assert stored == (event,)  # the same odometer as any other release


def test_what_leaves_is_masked(begun: Driver) -> None:
    play(begun)
    sent = np.array(decode_update(begun.updates["alpha"]), dtype=np.float64)
    assert np.abs(sent).max() > 2.0**55  # uniform over 64 bits: the plain update is below 2**40
    assert max(map(abs, begun.plain["alpha"])) < 2**40


@pytest.mark.parametrize(
    ("changes", "code"),
    [({}, "bad_request"), ({"shares": {}}, "round_out_of_order")],
    ids=["no masks asked for", "masks of nobody"],
)
def test_no_update_leaves_without_masks(begun: Driver, changes: dict[str, Any], code: str) -> None:
    answer, update = begun.network.ask("alpha", 1, **changes)
    assert refusal_code(answer) == code
    assert update == b""
    assert odometer(begun.network) == 0


def test_shares_of_too_few_sites_mask_nothing(begun: Driver) -> None:
    begun.ask_keys()
    begun.ask_shares()
    answer = begun.update("alpha", {})
    assert refusal_code(answer) == "roster_not_proved"
    assert odometer(begun.network) == 0


def test_a_round_asked_again_gives_the_same_bytes_and_is_debited_once(begun: Driver) -> None:
    play(begun)
    first = begun.updates["alpha"]
    begun.update("alpha")
    assert begun.updates["alpha"] == first
    assert odometer(begun.network) == 1
    other, _ = begun.network.ask("alpha", 1, shares={"beta": begun.shares_for("alpha")["beta"]})
    assert refusal_code(other) == "already_released"
    ahead, _ = begun.network.ask("alpha", 2, shares=begun.shares_for("alpha"))
    assert refusal_code(ahead) != "none"
    assert odometer(begun.network) == 1


def test_a_round_of_another_charter_is_not_computed(begun: Driver) -> None:
    """Less noise or a longer bound is another charter, with another digest, and this run has this one."""
    begun.ask_keys()
    begun.ask_shares()
    for changed in (site_charter(begun.network, noise="1.5"), site_charter(begun.network, noise="4")):
        answer, update = begun.network.ask(
            "alpha", 1, charter=changed.digest, shares=begun.shares_for("alpha")
        )
        assert refusal_code(answer) != "none"
        assert update == b""
    assert odometer(begun.network) == 0


def test_a_run_is_not_accepted_under_terms_that_nobody_signed(network: Network) -> None:
    network.charter = site_charter(network)
    network.sign(network.charter)
    weaker = site_charter(network, noise="1.5")
    header = {"run_started": network.run_started(weaker), "charter": network.text(weaker)}
    answer, _ = call(network.agents["alpha"], "run.propose", header)
    assert refusal_code(answer) == "charter_not_approved"
    mixed = {"run_started": network.run_started(), "charter": network.text(weaker)}
    assert refusal_code(call(network.agents["alpha"], "run.propose", mixed)[0]) == "charter_not_approved"


COUNTS = {"share": "0.2", "noise_multiplier": "9"}
HOSTILE = {
    "no masks": (lambda d: d.pop("secure_aggregation"), "bad_request"),
    "k below 3": (lambda d: d.update(sites=d["sites"][:2]), "bad_request"),
    "t too large": (lambda d: d["secure_aggregation"].update(tolerated=2), "bad_request"),
    "participation hidden": (lambda d: d["privacy"].update(relation="add_remove"), "bad_request"),
    "sampling": (lambda d: d["privacy"].update(sample_rate="0.5"), "bad_request"),
    "counts beside it": (lambda d: d.update(evaluation=COUNTS), "bad_request"),
    "rows as weights": (lambda d: d["sites"][0].update(nominal_rows=20, weight="20"), "bad_request"),
    "both units": (lambda d: d["privacy"].update(max_grad_norm="1"), "bad_request"),
    "too fine a share": (lambda d: d["privacy"].update(noise_multiplier="0.0000001"), "bad_request"),
    "less noise": (lambda d: d["privacy"].update(noise_multiplier="0.9"), "charter_not_approved"),
    "more rounds": (lambda d: d["plan"].update(rounds=40), "charter_not_approved"),
    "spare rounds": (lambda d: d["plan"].update(spare_rounds=40), "charter_not_approved"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_charter_made_by_hand_is_not_signed(network: Network, name: str) -> None:
    change, code = HOSTILE[name]
    document = copy.deepcopy(site_charter(network).document)
    change(document)
    header = {"charter": canonical_bytes(document).decode(), "author": network.author.text}
    for site in ("alpha", "beta"):
        answer, _ = call(network.agents[site], "charter.sign", header)
        assert refusal_code(answer) == code, answer


# budgets


def set_budget(network: Network, **values: str) -> None:
    path = network.agents["alpha"].home.path / "site.yaml"
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    document["lifetime"] |= values
    path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    network.restart("alpha")


def proposed(network: Network) -> dict[str, Any]:
    header = {"run_started": network.run_started(), "charter": network.text()}
    return call(network.agents["alpha"], "run.propose", header)[0]


def test_the_site_s_own_cap_counts_what_a_row_spends(network: Network) -> None:
    network.charter = site_charter(network)
    network.sign(network.charter)
    cost = recompute(of_people(planned_events(network.charter)), 1e-5).value
    set_budget(network, epsilon=f"{cost * 0.99:.3f}")
    assert refusal_code(proposed(network)) == "budget_exhausted"
    set_budget(network, epsilon=f"{cost * 1.01:.3f}")
    assert "acceptance" in proposed(network)
    assert odometer(network) == 0


def test_the_cap_for_the_site_as_a_whole_counts_one_length(network: Network) -> None:
    network.charter = site_charter(network)
    network.sign(network.charter)
    whole = whole_site_epsilon(planned_events(network.charter), 1e-5)
    assert whole < recompute(of_people(planned_events(network.charter)), 1e-5).value
    set_budget(network, whole_site_epsilon=f"{whole * 0.99:.3f}")
    assert refusal_code(proposed(network)) == "budget_exhausted"
    set_budget(network, whole_site_epsilon=f"{whole * 1.01:.3f}")
    assert "acceptance" in proposed(network)


def test_what_is_reserved_is_the_whole_plan_and_a_second_run_waits(begun: Driver) -> None:
    agent = begun.network.agents["alpha"]
    (reservation,) = agent.ledger.open_reservations(agent.population)
    assert reservation.planned == planned_events(begun.network.charter)
    begun.network.run = "run-2"
    assert refusal_code(proposed(begun.network)) == "population_busy"


def test_the_statement_is_of_the_ledger_s_own_event(begun: Driver, tmp_path: Path) -> None:
    """A mechanism that ran with anything else than the charter's numbers releases nothing."""
    begun.ask_keys()
    begun.ask_shares()
    trainer = begun.network.agents["alpha"]._trainer
    terms = begun.network.agents["alpha"].admission.approved_terms(begun.network.text())
    trainer._workshop.mechanism(terms).share_grid //= 2
    answer = begun.update("alpha")
    assert refusal_code(answer) == "internal_error"
    assert odometer(begun.network) == 0
    assert parse_body(SiteStatement, begun.update("beta")["statement"]).event.share_grid

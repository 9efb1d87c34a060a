"""A charter whose unit is the site alone: what it needs, what it excludes, what it costs and is worth."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from audit.charter_parts import CharterFormError
from audit.charter_view import read_charter
from audit.cost_bodies import UNBOUNDED
from audit.entries import SiteStatement
from audit.epsilon import recompute
from audit.keys import SigningKey
from audit.shared_noise import site_level
from audit.units import row_level
from clients.terms import read_terms
from federation._site_unit_checks import noise_on_mean, sites_for
from federation.accounting import LifetimeFilter, check_fits, plan_cost, plan_report, spent
from federation.charter import Charter
from federation.draft import draft_charter
from federation.errors import CharterError, CharterFileError, PlanDoesNotFitError
from federation.gates import epsilons
from federation.mechanism import planned_event, planned_events

SOURCE = """
name: toy
task: binary
features: [{name: x, type: number, lower: -3, upper: 3}, {name: z, type: boolean, missing: midpoint}]
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 1, rounds: 4, local_steps: 5, local_learning_rate: 0.5, minimum_sites: 5}
privacy:
  {unit: site, relation: replace_one, epsilon: 8, delta: 1e-3, max_update_norm: 0.5, noise_multiplier: 1.1}
secure_aggregation: {tolerated: 1}
"""
MASKS = "secure_aggregation: {tolerated: 1}\n"
NAMES = tuple(f"site-{n}" for n in range(6))
KEYS = {name: SigningKey.generate().text for name in NAMES}


def source(text: str = SOURCE, *, sites: tuple[str, ...] = NAMES, rows: int = 1) -> str:
    members = "".join(f'  - {{name: {n}, identity: "{KEYS[n]}", nominal_rows: {rows}}}\n' for n in sites)
    return f"{text}sites:\n{members}purposes: [research]\n"


def checked(text: str = SOURCE, **options: Any) -> Charter:
    return Charter.parse(source(text, **options))


NOISE, NORM, LAYERS = (
    "noise_multiplier: 1.1",
    "max_update_norm: 0.5",
    "family: mlp, hidden: [3], local_layers: [0]",
)
MEDIAN = "aggregation: {rule: median, norm_bound: false}\n"

PROBLEMS = [
    ((MASKS, ""), "privacy.unit", "trusts the coordinator"),
    ((MASKS, "central_noise: {sigma: 3}\n"), "central_noise", "not a key"),
    (("relation: replace_one", "relation: add_remove"), "privacy.relation", "takes part"),
    ((NOISE, f"{NOISE}, sample_rate: 0.5"), "privacy.sample_rate", "the log shows"),
    ((f"{NORM}, ", ""), "privacy.max_update_norm", "missing"),
    ((NORM, "max_grad_norm: 0.5"), "privacy.max_grad_norm", "bounds nothing"),
    ((NORM, f"{NORM}, max_grad_norm: 1"), "privacy.max_grad_norm", "bounds nothing"),
    ((NORM, "max_update_norm: 0"), "privacy.max_update_norm", "is 0"),
    (("unit: site", "unit: row"), "privacy.max_grad_norm", "missing"),
    (("unit: site", "unit: site, subject_id: who"), "privacy.unit", "subject_id"),
    (("unit: site", "unit: site, max_rows_per_subject: 3"), "privacy.unit", "max_rows_per_subject"),
    ((MASKS, f"{MASKS}site_level: {{max_update_norm: 3, epsilon: 9}}\n"), "site_level", "the unit itself"),
    ((MASKS, f"{MASKS}evaluation: {{share: 0.2, noise_multiplier: 9}}\n"), "evaluation", "counts"),
    ((MASKS, f"{MASKS}reference: {{noise_multiplier: 9}}\n"), "reference", "counts"),
    ((MASKS, MASKS + MEDIAN), "aggregation.rule", "each site's update"),
    ((MASKS, f"{MASKS}aggregation: {{rule: mean}}\n"), "aggregation.norm_bound", "each site's update"),
    (("tolerated: 1", "tolerated: 3"), "secure_aggregation.tolerated", "two sets"),
    (("tolerated: 1", "tolerated: 0"), "plan.minimum_sites", "make less than the noise"),
    (("family: logistic_regression", LAYERS), "model.local_layers", "share"),
    (("local_steps: 5", "local_steps: 5, proximal: 9"), "plan.proximal", "overshoot"),
]


@pytest.mark.parametrize(("change", "path", "said"), PROBLEMS, ids=[f"{p}-{s}" for _, p, s in PROBLEMS])
def test_what_a_unit_of_one_site_needs_and_excludes_is_said(
    change: tuple[str, str], path: str, said: str
) -> None:
    assert change[0] in SOURCE
    with pytest.raises(CharterError) as raised:
        checked(SOURCE.replace(*change))
    found = [problem for problem in raised.value.problems if problem.path == path]
    assert found, raised.value
    assert any(said in problem.message for problem in found), found
    assert all(problem.fix and problem.line for problem in found)
    assert raised.value.code == "federation.charter"


def test_two_sites_hide_nothing() -> None:
    with pytest.raises(CharterError, match="hides nothing"):
        checked(SOURCE.replace("minimum_sites: 5", "minimum_sites: 2"), sites=NAMES[:2])


def test_no_site_s_number_of_rows_stands_in_the_charter() -> None:
    with pytest.raises(CharterError, match=r"nominal_rows: tells how many rows a site has"):
        checked(rows=140)
    document = checked().document
    assert {(site["nominal_rows"], site["weight"]) for site in document["sites"]} == {(1, "1")}


def test_it_reads_back_and_means_the_same_to_all() -> None:
    charter = checked()
    assert "max_grad_norm" not in charter.document["privacy"]
    assert Charter.from_canonical(charter.canonical().decode()).digest == charter.digest
    assert Charter.parse(charter.to_yaml()).digest == charter.digest
    view = read_charter(charter.canonical())
    terms = read_terms(charter.canonical().decode(), site=NAMES[0])
    event = planned_event(charter)
    assert view.event_problem(event) is None
    assert terms.event == event
    assert (event.unit, event.steps, event.sample_rate, event.sharers) == ("site", 1, "1", 5)
    assert view.aggregation.divisor(5) == 5 * 2**20 / 0.5
    assert not view.aggregation.is_gradient


def test_zeroed_out_is_one_length_and_replaced_is_two() -> None:
    replaced = planned_event(checked())
    zeroed = planned_event(checked(SOURCE.replace("replace_one", "zero_out")))
    assert replaced.sensitivity_grid == 2 * zeroed.sensitivity_grid
    assert zeroed.sensitivity_grid >= 2**20


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("secure_aggregation"),
        lambda d: d["privacy"].update(relation="add_remove"),
        lambda d: d["privacy"].update(sample_rate="0.5"),
        lambda d: d["privacy"].update(subject_id="who"),
        lambda d: d["privacy"].update(max_rows_per_subject=2),
        lambda d: d["privacy"].update(max_grad_norm="1"),
        lambda d: d["privacy"].update(max_update_norm="0"),
        lambda d: d["privacy"].update(max_update_norm=3),
        lambda d: d["privacy"].pop("max_update_norm"),
        lambda d: d["privacy"].update(unit="federation"),
        lambda d: d["privacy"].update(unit=["site"]),
        lambda d: d["sites"][0].update(nominal_rows=2, weight="2"),
        lambda d: d["sites"][0].update(weight="2"),
        lambda d: d.update(site_level={"max_update_norm": "1", "epsilon": "8"}),
        lambda d: d.update(evaluation={"share": "0.2", "noise_multiplier": "9"}),
        lambda d: d.update(aggregation={"rule": "median", "byzantine": 0, "keep": 0, "norm_bound": 0}),
        lambda d: d["secure_aggregation"].update(tolerated=3),
        lambda d: d.update(sites=d["sites"][:2]),
    ],
)
def test_a_verifier_and_an_agent_refuse_a_form_that_nobody_checked(change: Any) -> None:
    from audit.canonical import canonical_bytes
    from clients.errors import RefusedError

    document = checked().document
    change(document)
    text = canonical_bytes(document)
    with pytest.raises(CharterFormError):
        read_charter(text)
    with pytest.raises(RefusedError) as raised:
        read_terms(text.decode(), site=NAMES[0])
    assert raised.value.code


# what it costs


def test_the_plan_is_composed_over_all_rounds_in_full_and_a_row_is_never_told_less() -> None:
    charter = checked()
    cost, events = plan_cost(charter), planned_events(charter)
    assert cost.sites[0].spent.pld == pytest.approx(recompute(events, 1e-3).value, rel=1e-6)
    assert cost.sites[0].spent.unit == "site"
    assert cost.row == pytest.approx(cost.sites[0].spent.pld, rel=1e-6)  # replace_one covers the row as it is
    zeroed = plan_cost(
        checked(SOURCE.replace("replace_one", "zero_out").replace("epsilon: 8", "epsilon: 20"))
    )
    assert zeroed.row is not None
    assert zeroed.row > 1.5 * zeroed.sites[0].spent.pld
    assert zeroed.whole_site is None
    report = plan_report(charter)
    assert "unit site" in report
    assert "a row has its site's protection and none of its own" in report
    assert "every round counts in full (q = 1)" in report
    assert "4 rounds of 5 step(s)" in report


def test_spare_rounds_are_paid_for() -> None:
    plain, spare = checked(), checked(SOURCE.replace("rounds: 4", "rounds: 4, spare_rounds: 3"))
    assert plan_cost(spare).sites[0].spent.pld > plan_cost(plain).sites[0].spent.pld


def test_a_plan_above_the_charter_is_not_started() -> None:
    charter = checked(SOURCE.replace("noise_multiplier: 1.1", "noise_multiplier: 0.9"))
    with pytest.raises(PlanDoesNotFitError):
        check_fits(charter)
    suggested = plan_cost(charter).suggested_noise_multiplier
    assert suggested is not None
    assert plan_cost(checked(SOURCE.replace("1.1", str(suggested)))).fits


def test_open_noise_is_answered_with_the_number() -> None:
    with pytest.raises(CharterError, match=r"epsilon 8 needs at least [0-9.]+ for this plan"):
        checked(SOURCE.replace("noise_multiplier: 1.1", "noise_multiplier: TODO"))


WIDE = SOURCE.replace("family: logistic_regression", "family: mlp, hidden: [16]")


def test_few_sites_are_warned_with_figures() -> None:
    charter = checked(WIDE)
    (warning,) = [text for text in plan_cost(charter).warnings if "times as long" in text]
    assert f"{noise_on_mean(charter):.1f} times as long as the longest update, with 5 sites" in warning
    assert f"about {sites_for(charter)} sites bring it to 3" in warning
    event = planned_event(charter)
    exact = event.share_grid * math.sqrt(5 * charter.dimension) / 5 / 2**20
    assert noise_on_mean(charter) == pytest.approx(exact)
    assert not [text for text in plan_cost(charter).warnings if "one row" in text]


def test_many_sites_are_not() -> None:
    names = tuple(f"s{n}" for n in range(40))
    KEYS.update({name: SigningKey.generate().text for name in names})
    charter = checked(WIDE.replace("minimum_sites: 5", "minimum_sites: 40"), sites=names)
    assert not [text for text in plan_cost(charter).warnings if "times as long" in text]


def test_a_delta_that_publishes_a_site_is_warned() -> None:
    said = plan_cost(checked(SOURCE.replace("1e-3", "0.2"))).warnings
    assert any("publishing a whole site" in text for text in said)


# one odometer


ROW = replace(planned_event(checked()), unit="row", relation="add_remove", sharers=0, share_grid=0)


def test_a_site_s_cap_counts_what_a_row_in_it_spends() -> None:
    event = planned_event(checked(SOURCE.replace("replace_one", "zero_out")))
    by_row = recompute([row_level(event)], 1e-5).value
    below = LifetimeFilter(epsilon=Decimal(str(by_row * 0.99)), delta=Decimal("0.00001"))
    above = LifetimeFilter(epsilon=Decimal(str(by_row * 1.01)), delta=Decimal("0.00001"))
    assert not below.admits([], [event])  # though one zeroed-out site costs less than the cap
    assert recompute([event], 1e-5).value < by_row * 0.99
    assert above.admits([], [event])
    assert not above.admits([ROW], [event])
    assert not above.admits([event], [ROW])
    assert above.spent([ROW, event]) > max(above.spent([ROW]), above.spent([event]))


def statement(sequence: int, run: str, event: Any) -> SiteStatement:
    return SiteStatement(
        run=run, round=1, charter="", site="a", population="p", base_model="", participants=(), agent_code="",
        previous_round="", event=event, sequence=sequence, previous_event="", update="", signature="",
    )  # fmt: skip


def test_claims_are_in_the_charter_s_unit_over_both_kinds_of_runs() -> None:
    charter = checked()
    event, both = planned_event(charter), replace(ROW, site_sensitivity_grid=2**21)
    (claim,) = epsilons(charter, "now", [statement(1, "before", both), statement(2, "now", event)])
    assert (claim.unit, claim.relation, claim.events) == ("site", "replace_one", 1)
    whole = spent([site_level(both), event], 1e-3).pld_text
    assert claim.lifetime_epsilon == whole
    assert Decimal(claim.lifetime_epsilon) > Decimal(claim.run_epsilon)


def test_a_release_that_bounds_no_site_leaves_its_life_unbounded() -> None:
    charter = checked()
    history = [statement(1, "before", ROW), statement(2, "now", planned_event(charter))]
    (claim,) = epsilons(charter, "now", history)
    assert claim.lifetime_epsilon == UNBOUNDED
    assert claim.run_epsilon == spent([planned_event(charter)], 1e-3).pld_text


# a new charter


def test_a_new_charter_of_sites_has_everything_but_the_decisions(tmp_path: Path) -> None:
    text = draft_charter(["x", "y"], label="y", unit="site")
    for name in ("unit: site", "max_update_norm: TODO", "secure_aggregation", "nominal_rows: 1"):
        assert name in text
    filled = (
        text.replace("lower: TODO, upper: TODO", "lower: 0, upper: 1")
        .replace("unit: TODO, ", "")
        .replace("TODO negative", '"no"')
        .replace("TODO positive", '"yes"')
        .replace("minimum_sites: TODO", "minimum_sites: 5")
        .replace("epsilon: TODO", "epsilon: 8")
        .replace("delta: TODO", "delta: 1e-3")
        .replace("max_update_norm: TODO", "max_update_norm: 1")
        .replace("noise_multiplier: TODO", "noise_multiplier: 9")
        .replace("purposes: [TODO]", "purposes: [research]")
    )
    member = '  - {name: TODO, identity: "TODO", nominal_rows: 1}\n'
    assert member in filled
    members = "".join(f'  - {{name: {n}, identity: "{KEYS[n]}", nominal_rows: 1}}\n' for n in NAMES)
    charter = Charter.parse(filled.replace(member, members))
    assert charter.privacy.by_site
    assert plan_cost(charter).fits
    with pytest.raises(CharterFileError, match="neither row nor site"):
        draft_charter(["x", "y"], label="y", unit="ward")

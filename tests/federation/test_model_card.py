"""The model card: its headings, what it measures, in three forms, and what it never claims."""

from __future__ import annotations

import builtins
import json
import re
from dataclasses import replace
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from audit.cost_bodies import UNBOUNDED
from audit.entries import GateResult, Metric
from audit.public_set import missing_values
from audit.round_bodies import RunEvaluated
from audit.serving_bodies import AlarmClosed, AlarmRaised
from clients.simulation import simulate
from federation import card_privacy
from federation.card import Paragraph, Table
from federation.card_figures import Measured, metric_blocks
from federation.card_metrics import fairness, group_names, intervals, wilson
from federation.card_privacy import lifetimes, privacy_blocks
from federation.errors import AccountingError
from federation.evaluation import PublicData, model_outputs
from federation.model_card import card_of, model_card

CHARTER = """
name: carded
task: binary
features:
  - {name: x, type: number, lower: -3, upper: 3, unit: mg}
  - {name: ward, type: category, categories: [north, south, west]}
label: {name: y, classes: ["no", "yes"]}
model: {family: logistic_regression}
plan: {learning_rate: 4, rounds: 2}
privacy: {unit: row, relation: add_remove, epsilon: 8, delta: 1e-5, max_grad_norm: 1, noise_multiplier: 1.5}
evaluation: {share: 0.2, noise_multiplier: 2}
reference: {bins: 6, noise_multiplier: 2}
answers: {decimals: 2}
fairness: {groups: [ward, x]}
gates: [{metric: auc, source: public_set, margin_over_baseline: 0.1}]
"""

DELTA = Decimal("0.00001")
ANNEX_IV = [str(number) for number in range(1, 10)]


def frame(rows, seed):
    draw = np.random.default_rng(seed)
    x = draw.uniform(-3, 3, rows).round(4)
    ward = np.where(draw.random(rows) < 0.75, "north", "south")
    ward[:3] = "west"
    noise = draw.normal(0, np.where(ward == "south", 1.5, 0.3))
    return pd.DataFrame({"x": x, "ward": ward, "y": np.where(x + noise > 0.3, "yes", "no")})


@pytest.fixture(scope="module")
def run():
    made = simulate(CHARTER, {"a": frame(300, 1), "b": frame(300, 2)}, public=frame(200, 9))
    made.register()
    made.approve()
    yield made
    made.close()


@pytest.fixture(scope="module")
def card(run):
    log = run.federation.coordinator
    return card_of(log.ledger, run.version.digest, log.blobs.find)


def section(card, heading):
    (found,) = [section for section in card.sections if section.heading == heading]
    return found


def test_every_point_of_annex_iv_has_its_heading_once_in_order(card):
    assert [section.annex for section in card.sections if section.annex] == ANNEX_IV
    assert "no legal assessment" in card.about


def test_what_the_log_cannot_show_is_no_evidence(card):
    for heading in ("Risk management", "Standards", "EU declaration of conformity", "Post-market monitoring"):
        assert "NO EVIDENCE" in section(card, heading).blocks[0].text


def test_metrics_stand_with_intervals_that_hold_the_value(card):
    table = section(card, "Metrics").blocks[-2]
    assert table.header[:4] == ("metric", "value", "from", "to")
    methods = {row[0]: row[5] for row in table.rows}
    assert methods == {"auc": "bootstrap", "accuracy": "Wilson"}
    for _, value, lower, upper, rows, _ in table.rows:
        assert float(lower) < float(value) < float(upper)
        assert rows == "200"
    assert "Counted as the sites attest" in section(card, "Metrics").blocks[-1].text


def test_groups_are_the_declared_ones_with_small_ones_marked(card):
    blocks = section(card, "Fairness by declared groups").blocks
    ward, x = (block for block in blocks if isinstance(block, Table))
    assert [row[0] for row in ward.rows] == ["north", "south", "west (few rows)"]
    assert sum(int(row[1]) for row in ward.rows) == 200
    assert [row[0] for row in x.rows] == ["below 0 mg", "0 mg and above"]
    assert ward.header[3:] == ("called yes", "true positive rate", "false positive rate")
    assert any(
        "Largest difference between groups of ward: accuracy" in b.text and "called yes" in b.text
        for b in blocks
        if isinstance(b, Paragraph)
    )


def test_the_figures_are_those_of_the_slow_definition(run):
    log, charter = run.federation.coordinator, run.charter
    data = PublicData.read(charter, log.blobs.find(charter.public_set.digest))
    outputs = model_outputs(charter.layers, run.weights, data.rows)
    (ward, _) = fairness(charter, data, outputs)
    names = group_names(charter, "ward", data)
    for group in ward.groups:
        places = [k for k, name in enumerate(names) if name == group.group]
        called = [outputs[k][0] >= 0 for k in places]
        truth = [data.labels[k] == 1 for k in places]
        assert group.rows == len(places)
        assert group.selection_rate == pytest.approx(sum(called) / len(places))
        right = sum(a == b for a, b in zip(called, truth, strict=True))
        assert group.accuracy.value == pytest.approx(right / len(places))
        positives = [c for c, t in zip(called, truth, strict=True) if t]
        if positives:
            assert group.true_positive_rate == pytest.approx(sum(positives) / len(positives))
        else:
            assert group.true_positive_rate is None
    rates = [group.selection_rate for group in ward.groups]
    assert ward.differences["selection_rate"] == pytest.approx(max(rates) - min(rates))
    assert ward.differences["selection_rate"] > 0
    again = intervals(charter, data, outputs, seed=run.version.digest)
    assert again == intervals(charter, data, outputs, seed=run.version.digest)


@pytest.mark.parametrize(
    ("metric", "floor", "baseline", "value", "word"),
    [
        ("auc", "0.6", "0.5", "0.7", "passed"),
        ("auc", "0", "0.5", "0.7", "passed, asks for no more than the baseline"),
        ("auc", "0.5", "0.5", "0.7", "passed, asks for no more than the baseline"),
        ("auc", "", "0.5", "0.7", "passed, asks for no more than the baseline"),
        ("auc", "0", "0.5", "0.5", "passed, no better than the baseline"),
        ("mae", "3", "4", "2", "passed"),
        ("mae", "5", "4", "2", "passed, asks for no more than the baseline"),
        ("mae", "5", "4", "4.5", "passed, no better than the baseline"),
    ],
)
def test_a_gate_that_asks_for_nothing_is_said_to(run, metric, floor, baseline, value, word):
    gate = GateResult(
        metric=metric, source="public_set", dataset="0" * 64, floor=floor, baseline=baseline,
        value=value, passed=1,
    )  # fmt: skip
    version = replace(run.version, registered=replace(run.version.registered, gates=(gate,)))
    blocks = metric_blocks(version, run.charter, Measured.of(run.charter, version, None), None)
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert table.rows[0][-1] == word


@pytest.mark.parametrize(("right", "rows"), [(0, 10), (10, 10), (1, 3), (500, 1000), (0, 0)])
def test_wilsons_interval_stays_within_shares(right, rows):
    lower, upper = wilson(right, rows)
    assert 0 <= lower <= (right / rows if rows else 0.5) <= upper <= 1
    assert upper - lower > 0
    # the definition: both bounds solve (p - share)^2 = z^2 p (1 - p) / n
    if rows:
        for p in (lower, upper):
            if 0 < p < 1:
                assert (p - right / rows) ** 2 == pytest.approx(3.841458820694124 * p * (1 - p) / rows)


def test_without_files_or_fairlearn_the_card_says_so(run, monkeypatch):
    log = run.federation.coordinator
    bare = model_card(log.ledger, run.version.digest)
    assert "Confidence intervals: NO EVIDENCE" in bare
    assert "NO EVIDENCE for ward, x" in bare
    real = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith("fairlearn"):
            raise ImportError(name)
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    text = card_of(log.ledger, run.version.digest, log.blobs.find).markdown()
    assert "it needs fairlearn" in text
    assert "bootstrap" in text


def test_another_public_set_is_not_measured(run):
    log, charter = run.federation.coordinator, run.charter

    def swapped(digest):
        return b"x,ward,y\n1,north,yes\n" if digest == charter.public_set.digest else log.blobs.find(digest)

    text = card_of(log.ledger, run.version.digest, swapped).markdown()
    assert "Confidence intervals: NO EVIDENCE; they cannot be used" in text


def test_alarms_open_and_closed_are_counted(run):
    log = run.federation.coordinator
    assert "holds no alarm" in model_card(log.ledger, run.version.digest)
    for alarm in ("ab" * 16, "cd" * 16):
        body = AlarmRaised(
            alarm=alarm, kind="extraction", model="carded", measure="m", value="1", threshold="0", window_s=0
        )
        log.append(body, "api")
    log.append(
        AlarmClosed(
            alarm="ab" * 16, kind="extraction", model="carded", principal="p", role="officer", reason="r"
        ),
        "api",
    )
    assert "| extraction | 2 | 1 |" in model_card(log.ledger, run.version.digest)


def test_the_three_forms_hold_the_same(card):
    document = json.loads(card.json())
    assert [s["heading"] for s in document["sections"]] == [s.heading for s in card.sections]
    page = card.html()
    for section in card.sections:
        assert section.heading in page
        assert f"{section.heading}" in card.markdown()
    assert "<script" not in page
    assert "http" not in re.sub(r"<style>.*</style>", "", page, flags=re.S)
    assert page.count("<table>") == card.markdown().count("\n| --- |")


def test_what_is_missing_is_read_from_the_file_and_not_from_its_code():
    data = b'\xef\xbb\xbfx,y,z\n,1,a\n\n0,"",a\n"",,a\n'
    assert missing_values(data, ["x", "y", "z"]) == {
        "x": frozenset({0, 2}), "y": frozenset({1, 2}), "z": frozenset(),
    }  # fmt: skip


def test_a_rate_stands_with_the_rows_that_it_is_of_and_an_empty_group_is_named(run):
    log, charter = run.federation.coordinator, run.charter
    data = PublicData.read(charter, log.blobs.find(charter.public_set.digest))
    kept = [k for k, name in enumerate(group_names(charter, "ward", data)) if name == "north"]
    only = replace(data, rows=[data.rows[k] for k in kept], labels=[data.labels[k] for k in kept])
    outputs = model_outputs(charter.layers, run.weights, only.rows)
    ward, _ = fairness(charter, only, outputs)
    assert [(group.group, group.rows) for group in ward.groups] == [
        ("north", len(kept)), ("south", 0), ("west", 0),
    ]  # fmt: skip
    assert ward.groups[0].positives == sum(label == 1 for label in only.labels)
    assert dict(ward.differences) == {}  # one group differs from nobody


def test_a_claim_below_what_the_releases_cost_is_said_and_never_shown_as_spent(run):
    ledger, version = run.federation.coordinator.ledger, run.version
    honest = lifetimes(ledger, version, DELTA)
    assert not any(life.is_understated for life in honest)
    for field in ("run_epsilon", "lifetime_epsilon"):
        low = tuple(replace(cost, **{field: "0.5"}) for cost in version.registered.costs)
        forged = replace(version, registered=replace(version.registered, epsilons=low))
        found = lifetimes(ledger, forged, DELTA)
        assert all(life.is_understated for life in found)
        assert [life.now for life in found] == [life.now for life in honest]
        blocks = [b.text for b in privacy_blocks(ledger, forged, run.charter) if isinstance(b, Paragraph)]
        assert "The entry claims less than the releases cost: a, b." in blocks
    lax = tuple(replace(cost, delta="0.1") for cost in version.registered.costs)
    forged = replace(version, registered=replace(version.registered, epsilons=lax))
    blocks = [b.text for b in privacy_blocks(ledger, forged, run.charter) if isinstance(b, Paragraph)]
    assert "Claimed at another delta than the charter's: a, b." in blocks


def test_without_the_accountant_a_card_bounds_what_is_spent_and_says_what_it_did_not_count(run, monkeypatch):
    ledger, version = run.federation.coordinator.ledger, run.version
    honest = lifetimes(ledger, version, DELTA)

    def lacking(*_):
        raise AccountingError("PLD needs dp-accounting")

    monkeypatch.setattr(card_privacy, "lifetime_epsilon", lacking)
    for life, before in zip(lifetimes(ledger, version, DELTA), honest, strict=True):
        assert Decimal(life.now) >= Decimal(before.now)
        assert not life.is_recounted
        assert not life.is_understated
    blocks = [b.text for b in privacy_blocks(ledger, version, run.charter) if isinstance(b, Paragraph)]
    assert any("NO EVIDENCE from where this card was made" in text for text in blocks)


def test_no_bound_is_not_shown_as_nothing(run):
    ledger, version = run.federation.coordinator.ledger, run.version
    free = tuple(replace(cost, lifetime_epsilon=UNBOUNDED) for cost in version.registered.costs)
    forged = replace(version, registered=replace(version.registered, epsilons=free))
    (table,) = [b for b in privacy_blocks(ledger, forged, run.charter) if isinstance(b, Table)]
    for row in table.rows:
        assert row[4].startswith("no bound (first ")
        assert row[5].startswith("no bound (first ")
    assert "(no bound for all its releases until registration)" in forged._repr_html_()
    claimed = version.registered.costs[0]
    shown = f"a {claimed.run_epsilon} ({claimed.lifetime_epsilon} for all its releases until registration)"
    assert shown in version._repr_html_()


def test_attributions_are_refused_where_answers_are_rounded(card):
    (told_of,) = [
        i for i in section(card, "Monitoring, functioning and control").blocks[0].items if "Attr" in i
    ]
    assert told_of.startswith(
        "Attributions of an answer to single features are refused: the charter rounds its answers"
    )


def evaluated_as(value, spread, *, missing=()):
    metric = Metric(name="accuracy", value=value, source="private_release", dataset="0" * 64)
    return RunEvaluated(
        run="r", round=3, weights="0" * 64, statements=("1", "2"), missing=missing,
        metrics=(metric,), baseline="0.5", spread=spread,
    )  # fmt: skip


def test_a_paid_release_is_said_to_be_one_and_a_share_stays_a_share(run):
    gate = GateResult(
        metric="accuracy", source="private_release", dataset="0" * 64, floor="0.6", baseline="0.55",
        value="0.98", passed=1,
    )  # fmt: skip
    silent = replace(gate, value="", baseline="", floor="", passed=0)
    version = replace(run.version, registered=replace(run.version.registered, gates=(gate, silent)))
    charter = run.charter.model_copy(update={"public_set": None})
    bare = Measured.of(charter, version, None)
    blocks = list(metric_blocks(version, charter, bare, evaluated_as("0.98", "0.05", missing=("c",))))
    about, table, _, released = blocks
    assert "public set" not in about.text
    assert "ATTESTED by the sites" in about.text
    assert "paid for on its odometer" in about.text
    assert table.rows[1] == ("accuracy", "NO EVIDENCE", "NO EVIDENCE", "-", "private_release", "FAILED")
    assert "by 2 sites: accuracy 0.98, between 0.882 and 1 by the noise" in released.text
    assert "cut off at what a share can be" in released.text
    assert "Without c." in released.text
    *_, low = metric_blocks(version, charter, bare, evaluated_as("0.02", "0.05"))
    assert "between 0 and 0.118 by the noise" in low.text
    *_, inner = metric_blocks(version, charter, bare, evaluated_as("0.5", "0.05"))
    assert "between 0.402 and 0.598 by the noise" in inner.text
    assert "cut off" not in inner.text
    both = replace(
        version, registered=replace(version.registered, gates=(gate, replace(gate, source="public_set")))
    )
    first, second, *_ = metric_blocks(both, run.charter, bare, None)
    assert "public set of 200 rows, which a verifier recomputes" in first.text
    assert "ATTESTED" in second.text


def test_a_document_for_machines_holds_no_mark_up(run, card):
    text = card.json()
    assert "`" not in text
    assert "**" not in text
    rows = json.loads(text)["sections"][0]["blocks"][0]["table"]["rows"]
    assert ["version (SHA-256 of the weights file)", run.version.digest] in rows

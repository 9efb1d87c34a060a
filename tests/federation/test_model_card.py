"""The model card: its headings, what it measures, in three forms, and what it never claims."""

from __future__ import annotations

import builtins
import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from audit.serving_bodies import AlarmClosed, AlarmRaised
from clients.simulation import simulate
from federation.card import Bullets, Card, Paragraph, Section, Table
from federation.card_metrics import fairness, group_names, intervals, wilson
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
    assert [row[0] for row in x.rows] == ["0 mg and above", "below 0 mg"]
    assert ward.header[3:] == ("called yes", "true positive rate", "false positive rate")
    assert any(
        "Largest difference between groups of **ward**" in b.text for b in blocks if isinstance(b, Paragraph)
    )


def test_the_figures_are_those_of_the_slow_definition(run):
    log, charter = run.federation.coordinator, run.charter
    data = PublicData.read(charter, log.blobs.find(charter.public_set.digest))
    outputs = model_outputs(charter.layers, run.weights, data.rows)
    (ward, _) = fairness(charter, data, outputs)
    names = group_names(charter, "ward", data.rows)
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


def test_a_page_escapes_whatever_a_charter_says():
    evil = '<script>alert("x")</script> & `<b>` **<i>**'
    card = Card(
        model="m", version="v", title=evil, about=evil,
        sections=(
            Section(
                heading=evil,
                blocks=(Paragraph(evil), Bullets((evil,)), Table((evil, "b"), ((evil, "1|2"),))),
            ),
        ),
    )  # fmt: skip
    page = card.html()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "1\\|2" in card.markdown()
    assert not math.isnan(len(json.loads(card.json())["sections"]))

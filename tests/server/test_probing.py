"""Who studies a model instead of using it raises an alarm, and who uses it does not."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.testclient import TestClient

from audit.principal import Principal
from server.alarming import Alarming
from server.app import create_app
from server.errors import LedgerUnavailableError
from server.monitoring import Monitoring
from server.probing import LEAST, WINDOW, Look, Window, margin_of


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


def judged(rows, weights, *, out=0.0, seed=0):
    """Return the kinds that a stream of encoded rows raises, judged after every sixteenth row."""
    window, found, draw = Window(), set(), np.random.default_rng(seed)
    for number, row in enumerate(rows, start=1):
        margin = abs(2 * sigmoid(float(np.dot(weights, row))) - 1)
        window.add(Look(row=tuple(float(v) for v in row), margin=margin, out=draw.random() < out))
        if number % 16 == 0:
            found |= {suspicion.measure for suspicion in window.suspicions()}
    return found


@pytest.mark.parametrize("inputs", [1, 2, 4, 30])
@pytest.mark.parametrize("spread", [0.2, 0.5])
def test_honest_traffic_raises_no_alarm(inputs, spread):
    for seed in range(5):
        draw = np.random.default_rng(100 * inputs + seed)
        rows = draw.normal(draw.uniform(-0.3, 0.3, inputs), spread, (800, inputs)).clip(-1, 1).round(2)
        weights = draw.normal(0, 4 / math.sqrt(inputs), inputs)
        assert judged(rows, weights, out=0.05, seed=seed) == set()


def test_one_patient_asked_again_and_again_is_no_alarm():
    row = np.array([0.1, -0.4, 0.9])
    assert judged([row] * 500, [1.0, 1.0, 1.0]) == set()


def test_a_ward_of_few_categories_is_no_alarm():
    draw = np.random.default_rng(3)
    ages = draw.normal(0, 0.4, 800).clip(-1, 1).round(3)
    rows = [
        (age, *(float(k == ward) for k in range(3)))
        for age, ward in zip(ages, draw.integers(0, 3, 800), strict=True)
    ]
    assert judged(rows, [2.0, 1.0, -1.0, 0.5]) == set()


def test_rows_along_the_boundary_are_extraction():
    draw = np.random.default_rng(1)
    weights = np.array([1.0, -2.0, 0.5])
    rows = []
    for _ in range(200):
        x = draw.uniform(-1, 1, 3)
        x[1] = (weights[0] * x[0] + weights[2] * x[2]) / 2 + draw.normal(0, 0.005)
        rows.append(x)
    assert "share_near_boundary" in judged(rows, weights)


def test_a_walk_along_a_grid_is_extraction():
    rows = []
    for feature in range(5):
        for step in np.linspace(-1, 1, 40):
            row = np.zeros(5)
            row[feature] = step
            rows.append(row)
    assert "share_of_single_steps" in judged(rows, np.ones(5))


def test_a_walk_through_categories_is_extraction():
    rows = [(0.01 * (n // 3), *(float(k == n % 3) for k in range(3))) for n in range(200)]
    assert "share_of_single_steps" in judged(rows, [3.0, 1.0, 1.0, 1.0])


def test_a_crowd_around_a_person_is_membership():
    draw = np.random.default_rng(5)
    person = draw.uniform(-1, 1, 8)
    mixed = [person + draw.normal(0, 0.005, 8) if n % 3 else draw.uniform(-1, 1, 8) for n in range(200)]
    assert judged(mixed, np.ones(8)) == {"share_around_one_point"}


def test_a_crowd_is_told_by_its_rows_alone():
    window, draw = Window(), np.random.default_rng(5)
    for _ in range(LEAST):
        window.add(Look(row=tuple(draw.normal(0, 0.005, 8)), margin=None, out=False))
    assert [suspicion.kind for suspicion in window.suspicions()] == ["membership"]


def test_a_storm_of_far_rows_is_told():
    rows = np.random.default_rng(6).uniform(-1, 1, (200, 6))
    assert judged(rows, np.ones(6), out=0.6) == {"share_out_of_distribution"}


def test_few_rows_say_nothing_and_a_window_forgets():
    window = Window()
    for number in range(LEAST - 1):
        window.add(Look(row=(number / 100, 0.0, 0.0), margin=0.0, out=True))
    assert window.suspicions() == ()
    for number in range(3 * WINDOW):
        window.add(Look(row=(number / 1000,), margin=None, out=False))
    assert len(window.looks) == WINDOW


def test_margins_follow_what_was_let_out():
    assert margin_of({"label": "ill", "probability": "0.75"}) == pytest.approx(0.5)
    assert margin_of({"label": "a", "probabilities": ["0.5", "0.3", "0.2"]}) == pytest.approx(0.2)
    assert margin_of({"label": "ill"}) is None


class Book:
    """A journal that counts, or fails."""

    def __init__(self, *, fails=False):
        self.fails, self.written = fails, []

    async def append(self, body, *, event_id=None):
        if self.fails:
            raise LedgerUnavailableError("gone")
        self.written.append((event_id, body))


def storm(alarming, *, principal="p-1", rows=96):
    answering = SimpleNamespace(
        principal=Principal(id=principal, role="consumer"),
        served=SimpleNamespace(model="toy", version="a" * 64),
        encoded=[[n / 100, (n * 37 % 100) / 100, 0.3] for n in range(rows)],
        answers=[{"label": "ill"}] * rows,
        margins=(),
    )
    answered = SimpleNamespace(annotations={"ood": [{"out": True}] * rows})
    alarming.observe(answering, answered)


def run(act):
    async def go():
        act()

    asyncio.run(go())


def test_two_workers_that_see_the_same_name_one_alarm():
    books = [Book(), Book()]

    async def go():
        for book in books:
            alarming = Alarming(book, Monitoring(), clock=lambda: 1_000_000.0)
            storm(alarming)
            storm(alarming)  # within the hour: not again
            await alarming.settle()

    asyncio.run(go())
    (first,), (second,) = books[0].written, books[1].written
    assert first[0] == second[0]
    assert first[1].kind == "out_of_distribution"
    assert first[1].principal == "p-1"


def test_an_alarm_that_could_not_be_written_is_tried_again():
    book = Book(fails=True)

    async def go():
        alarming = Alarming(book, Monitoring(), clock=lambda: 1_000_000.0)
        storm(alarming)
        await alarming.settle()
        book.fails = False
        storm(alarming)
        await alarming.settle()

    asyncio.run(go())
    assert len(book.written) == 1


def test_memory_is_bounded_however_many_callers():
    alarming = Alarming(Book(), Monitoring())
    for number in range(2_000):
        storm(alarming, principal=f"p-{number}", rows=2)
    assert len(alarming._windows) == 512
    assert len(alarming._since) <= 512


def test_a_walk_through_the_api_becomes_an_entry_and_a_line(lab, as_role, caplog):
    rows = [{"age": age, "fever": True, "ward": "north"} for age in range(100)]
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        body = {"purpose": "triage", "rows": rows}
        answer = client.post("/v1/models/toy/predict", headers=as_role("consumer"), json=body)
        assert answer.status_code == 200
        metrics = client.get("/metrics", headers=as_role("operator")).text
    (entry,) = lab.entries("alarm.raised")
    assert (entry["body"]["kind"], entry["body"]["measure"]) == ("extraction", "share_of_single_steps")
    assert entry["body"]["principal"] == lab.entries("prediction")[0]["body"]["principal"]
    assert "affidavit_alarms_total" in metrics
    assert "extraction" in caplog.text


ANSWERS = {
    "labels": {"decimals": 6, "label_only": 1, "cache": 0},
    "no decimals": {"decimals": 0, "label_only": 0, "cache": 0},
    "remembered": {"decimals": 0, "label_only": 1, "cache": 1},
}


def restricted(lab, weights, answers):
    digest = lab.publish_charter(name="kept", answers=answers)
    version = lab.register(digest, model="kept", weights=weights)
    lab.move(version, digest, "candidate", "approved", model="kept")
    lab.move(version, digest, "approved", "live", model="kept")


def alarms_after(lab, headers, rows, at_once):
    with TestClient(create_app(lab.settings(), clock=lab.clock)) as client:
        for first in range(0, len(rows), at_once):
            body = {"purpose": "triage", "rows": rows[first : first + at_once]}
            reply = client.post("/v1/models/kept/predict", headers=headers, json=body)
            assert reply.status_code == 200, reply.text
    return [(entry["body"]["kind"], entry["body"]["measure"]) for entry in lab.entries("alarm.raised")]


@pytest.mark.parametrize(
    ("answers", "at_once"), [("labels", 16), ("labels", 128), ("no decimals", 16), ("remembered", 16)]
)
def test_rows_along_the_boundary_alarm_whatever_the_charter_lets_out(lab, as_role, answers, at_once):
    rows = [
        {"age": 30 + n % 60, "fever": n % 2 == 0, "ward": ("north", "south")[n // 60]} for n in range(120)
    ]
    restricted(lab, [0.0] * 7, ANSWERS[answers])
    found = alarms_after(lab, as_role("consumer"), rows, at_once)
    assert found == [("extraction", "share_near_boundary")]


def test_rows_far_from_the_boundary_alarm_nobody_under_labels_alone(lab, as_role):
    rows = [
        {"age": 30 + n % 60, "fever": n % 2 == 0, "ward": ("north", "south")[n // 60]} for n in range(120)
    ]
    restricted(lab, [0.0, 0.0, 0.0, 0.0, 5.0, 0.0, 0.0], ANSWERS["labels"])
    assert alarms_after(lab, as_role("consumer"), rows, 16) == []

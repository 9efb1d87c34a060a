"""A site that enrols anew under another population cannot pass its odometer off as a fresh one."""

from __future__ import annotations

import secrets

from audit.entries import ZERO_DIGEST
from audit.keys import SigningKey
from audit.verify import Verdict

SITES = "The sites and their keys"


def renamed(world, name):
    hospital = world.hospital(name)
    hospital.population, hospital.sequence, hospital.head = secrets.token_hex(16), 0, ZERO_DIGEST
    world.append(world._enrolment(hospital))


def judged(world, run):
    digest = world.train(run)
    index, opened = world.predict(digest, world.approve(digest, world.register(digest, run)))
    return world.report(world.evidence(index, opened=opened)), (index, opened)


def test_an_odometer_started_over_under_a_new_population_is_never_valid(make_world):
    world = make_world()
    world.train("run-0")
    renamed(world, "east")
    report, _ = judged(world, "run-1")
    step = report.step(SITES)
    assert (report.verdict, step.code) == (Verdict.INCOMPLETE, "site.population_changed"), report.text()
    assert "east" in step.detail


def test_a_renewed_enrolment_for_the_same_population_is_none_of_its_business(make_world):
    world = make_world()
    world.append(world._enrolment(world.hospital("east")))
    report, _ = judged(world, "run-1")
    assert report.verdict is Verdict.VALID, report.text()


def test_a_version_made_before_the_change_stays_valid(make_world):
    world = make_world()
    _, (index, opened) = judged(world, "run-1")
    renamed(world, "east")
    world.publish()
    report = world.report(world.evidence(index, opened=opened))
    assert report.verdict is Verdict.VALID, report.text()


def with_key(world, name, key):
    hospital = world.hospital(name)
    before, hospital.statement = hospital.statement, key or SigningKey.generate()
    world.append(world._enrolment(hospital))
    return before


def test_a_site_may_go_on_under_a_new_statement_key(make_world):
    world = make_world()
    world.train("run-0")
    with_key(world, "east", None)
    report, _ = judged(world, "run-1")
    assert report.verdict is Verdict.VALID, report.text()


def test_a_statement_key_that_was_replaced_does_not_come_back(make_world):
    world = make_world()
    world.train("run-0")
    stolen = with_key(world, "east", None)
    with_key(world, "east", stolen)
    report, _ = judged(world, "run-1")
    step = report.step(SITES)
    assert (report.verdict, step.code) == (Verdict.INVALID, "site.key_returned"), report.text()
    assert "east" in step.detail

"""A whole log is asked what no evidence file can be: is there a release that one of its files hides."""

from __future__ import annotations

import secrets
from dataclasses import replace

import pytest

from audit.entries import ZERO_DIGEST, SiteStatement, columns_of, decode_entry
from audit.ledger import Ledger
from audit.log_odometers import WALKED, check_log_odometers
from audit.merkle import hash_leaf
from audit.verify import Verdict, Word
from audit.verify.chain import FailError
from audit.whole_log import ODOMETERS as WHOLE_LOG
from audit.whole_log import verify_log
from tests.audit_verify.hospitals import NOW, ORIGIN
from tests.audit_verify.judging import in_round, once, without


def entries(world):
    for index, leaf in enumerate(world.log.leaves):
        entry = decode_entry(leaf)
        if entry.type in WALKED:
            yield index, hash_leaf(leaf).hex(), entry.body


def caught(world, code):
    with pytest.raises(FailError) as found:
        check_log_odometers(entries(world), ORIGIN)
    assert found.value.code == code, str(found.value)
    assert found.value.entry is not None
    return found.value


def stored(world, path):
    world.publish()
    with Ledger.create(path, ORIGIN) as ledger:
        for leaf in world.log.leaves:
            event_id = decode_entry(leaf).event_id
            ledger.append_wait(leaf, event_id=event_id, index_columns=columns_of(leaf))
        ledger.store_checkpoint(world.log.notes[-1])
    return verify_log(path, policy_text=world.policy, now=NOW)


def start_over(world, name="east"):
    hospital = world.hospital(name)
    hospital.sequence, hospital.head = 0, ZERO_DIGEST
    return hospital


def test_an_honest_log_counts_every_release_of_every_run(honest):
    outcome = check_log_odometers(entries(honest.world), ORIGIN)
    assert outcome.word is Word.PROVED
    assert outcome.detail.startswith("12 releases of 3 populations")


def test_a_log_without_a_release_is_in_order(make_world):
    assert "0 releases of 0" in check_log_odometers(entries(make_world()), ORIGIN).detail


def test_a_release_reported_as_undelivered_and_delivered_after_all_counts_once(make_world):
    world = make_world()
    world.train("run-1")
    world.lose_release(world.hospital("east"), "lost", 1)
    world.append(decode_entry(world.log.leaves[-1]).body)
    world.train("run-2")
    assert check_log_odometers(entries(world), ORIGIN).detail.startswith("25 releases of 3 populations")


def test_a_restart_that_one_file_hides_is_found_in_the_whole_log(make_world, tmp_path):
    world = make_world()
    world.train("run-0")
    start_over(world)
    digest = world.train("run-1")
    index, opened = world.predict(digest, world.approve(digest, world.register(digest, "run-1")))
    data = world.evidence(index, opened=opened)

    def of_east_before(i, body):
        return isinstance(body, SiteStatement) and (body.site, body.run) == ("east", "run-0")

    assert world.report(without(data, of_east_before)).verdict is Verdict.VALID
    report = stored(world, tmp_path / "log.db")
    step = report.step(WHOLE_LOG)
    assert (report.verdict, step.word, step.code) == (Verdict.INVALID, Word.FAIL, "odometer.sequence")
    assert decode_entry(world.log.leaves[step.entry]).body.run == "run-1"


def test_an_honest_log_file_is_valid(honest, tmp_path):
    report = stored(honest.world, tmp_path / "log.db")
    assert report.verdict is Verdict.VALID, report.text()
    assert report.step(WHOLE_LOG).word is Word.PROVED


def test_a_release_that_is_nowhere_in_the_log_leaves_a_gap(make_world):
    world = make_world(after={"site.statement": once(None, in_round(2, "north"))})
    world.train()
    assert "event 2 is nowhere in the log" in str(caught(world, "odometer.gap"))


def test_a_statement_on_another_past_breaks_the_chain(make_world):
    hook = once(lambda body: replace(body, previous_event="ab" * 32), in_round(3, "west"))
    world = make_world(before={"site.statement": hook})
    world.train()
    caught(world, "odometer.chain")


def test_one_round_is_not_released_twice(make_world):
    world = make_world()
    world.train("run-1")
    world.lose_release(world.hospital("west"), "run-1", 2)
    caught(world, "odometer.round_twice")


def test_two_sites_do_not_count_one_population(make_world):
    world = make_world()
    north, west = world.hospital("north"), world.hospital("west")
    west.population = north.population
    world.append(world._enrolment(west))
    caught(world, "site.population_changed")  # the same identity key, so this is said first
    world = make_world(before={"site.enrolled": one_population()})
    caught(world, "odometer.population_shared")


def one_population():
    shared = secrets.token_hex(16)
    return lambda world, body: replace(body, population=shared)


def test_a_release_in_the_name_of_another_site_s_population_is_named(make_world):
    world = make_world()
    world.train()
    west = world.hospital("west")
    west.population = world.hospital("north").population
    world.lose_release(west, "run-2", 1)
    caught(world, "odometer.population_shared")


def test_an_identity_key_does_not_move_to_other_people(make_world):
    world = make_world()
    world.train()
    start_over(world).population = secrets.token_hex(16)
    world.append(world._enrolment(world.hospital("east")))
    found = caught(world, "site.population_changed")
    assert found.entry == len(world.log.leaves) - 1


def test_a_release_for_people_whom_the_site_never_enrolled_is_named(make_world):
    world = make_world()
    world.train()
    start_over(world).population = secrets.token_hex(16)
    world.lose_release(world.hospital("east"), "run-2", 1)
    caught(world, "site.population_changed")


def test_a_renewed_enrolment_of_the_same_people_goes_on_counting(make_world):
    world = make_world()
    world.train("run-1")
    world.append(world._enrolment(world.hospital("east")))
    world.train("run-2")
    assert check_log_odometers(entries(world), ORIGIN).detail.startswith("24 releases of 3 populations")


def test_a_statement_that_its_site_never_signed_is_no_release(make_world):
    hook = once(lambda body: replace(body, update="ab" * 32), in_round(2, "east"))
    world = make_world(after={"site.statement": hook})
    world.train()
    caught(world, "statement.signature")


def test_a_release_before_any_enrolment_of_its_site_is_named(make_world):
    world = make_world()
    world.train()
    walked = [
        item for item in entries(world) if not (type(item[2]).__name__ == "SiteEnrolled" and item[0] == 1)
    ]
    with pytest.raises(FailError) as found:
        check_log_odometers(walked, ORIGIN)
    assert found.value.code == "site.not_enrolled"


def test_enrolments_of_another_log_are_none_here(honest):
    with pytest.raises(FailError) as found:
        check_log_odometers(entries(honest.world), "other.example/log")
    assert (found.value.code, found.value.entry) == ("site.other_log", 1)

"""Many rows under one root: each row is provable alone, and no path, number or row can be swapped or made up.

Canaries too: a version that an officer's signature gave a share of the requests answers; a shadow does not.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from audit.entries import RowCommitment
from audit.evidence import EvidenceError, read_evidence
from audit.row_tree import RowPathError, RowTree, verify_row
from audit.verify import Verdict
from tests.audit_verify.judging import ANSWER, APPROVALS, assert_caught

ROWS = [{"alpha": 3 + k / 7, "beta": 2.5, "gamma": k % 9} for k in range(11)]


@pytest.fixture(scope="module")
def answered(make_world):
    """One world with eleven rows answered in one entry: (world, leaf index, opened rows)."""
    world = make_world()
    digest = world.train()
    live = world.approve(digest, world.register(digest))
    return world, *world.predict(digest, live, rows=ROWS, tree=True)


def report(answered, opened):
    world, index, _ = answered
    return world.report(world.evidence(index, opened=opened))


def test_all_rows_and_each_row_alone_are_proved(answered):
    whole = report(answered, answered[2])
    assert whole.verdict is Verdict.VALID, whole.text()
    assert "11 of 11 rows opened" in whole.step(ANSWER).detail
    for row in (answered[2][0], answered[2][10]):
        alone = report(answered, [row])
        assert alone.verdict is Verdict.VALID, alone.text()
        assert "1 of 11 rows opened" in alone.step(ANSWER).detail


def test_unopened_rows_are_attested(answered):
    assert report(answered, None).step(ANSWER).code == "answer.not_opened"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda row, other: {**row, "row": other["row"]}, "answer.row_path"),
        (lambda row, other: {**row, "path": other["path"]}, "answer.row_path"),
        (lambda row, other: {**row, "path": ""}, "answer.row_path"),
        (
            lambda row, other: {**row, "path": row["path"] + "," + row["path"].split(",")[0]},
            "answer.row_path",
        ),
        (lambda row, other: {**row, "path": row["path"].replace(",", ";")}, "answer.row_path"),
        (lambda row, other: {**row, "path": ",".join(["A" * 44] * 21)}, "answer.row_path"),
        (lambda row, other: {**row, "row": "11"}, "answer.row_path"),
        (lambda row, other: {**row, "row": "-1"}, "answer.rows"),
        (lambda row, other: {**row, "row": "03"}, "answer.rows"),
        (lambda row, other: {**row, "row": "٣"}, "answer.rows"),
        (lambda row, other: {**row, "row": "9" * 400}, "answer.rows"),
        (lambda row, other: {**row, "output": other["output"]}, "answer.row_path"),
        (lambda row, other: {**row, "input": other["input"]}, "answer.row_path"),
        (lambda row, other: {**row, "input_salt": other["input_salt"]}, "answer.row_path"),
        (lambda row, other: {**row, "input_salt": "zz"}, "answer.commitment"),
        (lambda row, other: {**row, "input": "{"}, "answer.commitment"),
        (lambda row, other: {**row, "input": "[]"}, "answer.commitment"),
    ],
)
def test_row_that_is_not_the_entrys_is_caught(answered, change, code):
    row, other = answered[2][3], answered[2][4]
    assert_caught(report(answered, [change(row, other)]), ANSWER, code)


def test_one_row_opened_twice_is_caught(answered):
    assert_caught(report(answered, [answered[2][3], answered[2][3]]), ANSWER, "answer.rows")


def test_no_row_opened_is_caught(answered):
    assert_caught(report(answered, []), ANSWER, "answer.rows")


def test_row_without_its_path_is_caught(answered):
    bare = {name: value for name, value in answered[2][3].items() if name not in ("row", "path")}
    assert_caught(report(answered, [bare]), ANSWER, "answer.rows")


def test_half_a_place_is_no_evidence_file(answered):
    half = {name: value for name, value in answered[2][3].items() if name != "path"}
    world, index, _ = answered
    with pytest.raises(EvidenceError):
        read_evidence(world.evidence(index, opened=[half]))


def test_lie_about_one_row_of_many_is_caught(make_world):
    world = make_world()
    digest = world.train()
    from audit.models import model_file

    other = world.put(model_file(world.charter.layers, [0.4, -1.0, 2.0, 0.1, 0.0, 0.0, 0.0]))
    live = world.approve(digest, world.register(digest))
    index, opened = world.predict(digest, live, rows=ROWS, tree=True, answer_by=other)
    assert_caught(world.report(world.evidence(index, opened=opened[5:6])), ANSWER, "answer.other_model")


@pytest.mark.parametrize(
    "change",
    [
        {"rows": (RowCommitment(input="ab" * 32, output="cd" * 32),)},
        {"row_count": 0},
        {"row_count": 12},
        {"rows_root": "", "rows": ()},
    ],
)
def test_entry_that_holds_its_rows_in_two_ways_or_none_is_caught(make_world, change):
    world = make_world(before={"prediction": lambda _, body: replace(body, **change)})
    digest = world.train()
    live = world.approve(digest, world.register(digest))
    index, opened = world.predict(digest, live, rows=ROWS, tree=True)
    step = world.report(world.evidence(index, opened=opened)).step(ANSWER)
    assert step.code in ("answer.rows", "answer.row_path"), step


def test_every_size_of_tree_has_paths_that_hold_for_their_own_row_only():
    for count in range(1, 40):
        rows = [RowCommitment(input=f"{k:064x}", output=f"{k + 1:064x}") for k in range(count)]
        tree = RowTree(rows)
        for number in range(count):
            verify_row(rows[number], number, count, tree.path(number), tree.root)
            if count > 1:
                with pytest.raises(RowPathError):
                    verify_row(rows[number], (number + 1) % count, count, tree.path(number), tree.root)


def test_tree_of_the_most_rows_that_one_request_has_is_made_at_once():
    """Its paths once took time by the square of the rows: a second for a thousand, minutes for these."""
    rows = [RowCommitment(input=f"{k:064x}", output=f"{k + 1:064x}") for k in range(16_384)]
    tree = RowTree(rows)
    paths = [tree.path(number) for number in range(len(rows))]
    for number in (0, 1, 8_191, 8_192, 16_383):
        verify_row(rows[number], number, len(rows), paths[number], tree.root)


def test_canary_answers_by_an_officers_signature_and_a_shadow_does_not(make_world):
    for state, verdict in (("canary", Verdict.VALID), ("shadow", Verdict.INVALID)):
        world = make_world()
        digest = world.train()
        registration = world.register(digest)
        world.move(digest, registration, "candidate", "approved")
        moved = world.move(digest, registration, "approved", state)
        index, opened = world.predict(digest, moved)
        found = world.report(world.evidence(index, opened=opened))
        assert found.verdict is verdict, found.text()
        if verdict is Verdict.INVALID:
            assert_caught(found, APPROVALS, "prediction.version_not_live")


def test_candidate_cannot_become_a_canary_unapproved(make_world):
    world = make_world()
    digest = world.train()
    moved = world.move(digest, world.register(digest), "candidate", "canary")
    index, opened = world.predict(digest, moved)
    assert_caught(world.report(world.evidence(index, opened=opened)), APPROVALS, "approval.state")

"""Entries that rest on a view: written behind it, or not at all."""

from __future__ import annotations

import asyncio
import threading

import pytest

from audit.entries import IndexColumns
from audit.errors import StaleViewError
from audit.ledger import Guard, Ledger

TIME = "2026-01-01T00:00:00Z"


@pytest.fixture
def log(tmp_path):
    with Ledger.create(tmp_path / "log.db", "tests.example/guards") as log:
        yield log


def put(log, name, *, type="answer", guard=None, wait=True):
    future = log.append(
        name.encode(), event_id=name, index_columns=IndexColumns(type=type, actor="t", time=TIME), guard=guard
    )
    return future.result(10) if wait else future


def test_entry_is_written_while_its_view_stands(log):
    put(log, "a", type="rule")
    assert put(log, "b", guard=Guard(("rule",), 0)).leaf_index == 1
    assert put(log, "c", guard=Guard(("rule",), 0)).leaf_index == 2  # an answer between changes nothing


def test_entry_whose_view_has_passed_is_not_written(log):
    put(log, "a", type="rule")
    with pytest.raises(StaleViewError) as caught:
        put(log, "b", guard=Guard(("rule", "other"), -1))
    assert (caught.value.after, caught.value.newest) == (-1, 0)
    assert log.tree_size == 1
    assert put(log, "b", guard=Guard(("rule", "other"), 0)).leaf_index == 1


def test_same_event_again_finds_its_place_whatever_came_since(log):
    first = put(log, "a", guard=Guard(("rule",), -1))
    put(log, "r", type="rule")
    assert put(log, "a", guard=Guard(("rule",), -1)).leaf_index == first.leaf_index
    assert log.tree_size == 2


def test_one_batch_is_judged_in_its_own_order(log):
    """Queued before the sequencer wakes, so that they share a batch: the rule stands between them."""
    guard = Guard(("rule",), -1)
    before = put(log, "before", guard=guard, wait=False)
    rule = put(log, "rule", type="rule", wait=False)
    after = put(log, "after", guard=guard, wait=False)
    assert before.result(10).leaf_index == 0
    assert rule.result(10).leaf_index == 1
    with pytest.raises(StaleViewError):
        after.result(10)
    assert log.tree_size == 2


def test_from_a_loop_too(log):
    async def main():
        columns = IndexColumns(type="answer", actor="t", time=TIME)
        return await log.append_from_loop(
            b"x", event_id="x", index_columns=columns, guard=Guard(("rule",), -1)
        )

    put(log, "a", type="rule")
    with pytest.raises(StaleViewError):
        asyncio.run(main())
    assert log.tree_size == 1


def test_no_guarded_entry_ever_stands_behind_a_rule_that_it_did_not_see(tmp_path, log):
    """Two logs on one file, as two processes are: one writes rules, the other answers on its view."""
    other = Ledger.open(tmp_path / "log.db")
    refused = 0

    def rules():
        for number in range(12):
            put(other, f"rule-{number}", type="rule")

    thread = threading.Thread(target=rules)
    thread.start()
    seen, answered = -1, 0
    while thread.is_alive() or answered < 30:
        try:
            place = put(log, f"answer-{answered}-{refused}", guard=Guard(("rule",), seen))
        except StaleViewError:
            refused += 1
            seen = max(row.leaf_index for row in log.search(type="rule", newest_first=True, limit=1))
            continue
        newest = [row.leaf_index for row in log.search(type="rule", limit=100)]
        assert not [index for index in newest if seen < index < place.leaf_index]
        answered += 1
    thread.join()
    other.close()
    assert refused >= 1

"""Nodes in forked processes: the same answers, no wait for ever, and what became of them handed back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from federation import forked_grid
from federation.forked_grid import ForkedGrid, may_fork
from tests.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="simulations fork on Linux alone")


@pytest.fixture
def forked():
    """Make a grid whose nodes count their messages; yields (make, what was handed back)."""
    if not may_fork():
        pytest.skip("threads of gRPC or others run in this process; the file runs in one of its own instead")
    counts, returned, grids = {}, {}, []
    app = ClientApp()

    @app.query()
    def query(message, context):
        site, order = context.node_config["site"], message.content["order"]
        counts[site] = counts.get(site, 0) + 1
        if order.get("raise"):
            raise ValueError("patient 17 is the cause")
        if order.get("touch"):
            Path(order["touch"]).touch()
        if order.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(order.get("sleep") or 0)
        if order.get("stop"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if order.get("compute"):
            until = time.monotonic() + order["compute"]
            while time.monotonic() < until:
                pass
        size = order.get("size") or 1
        answer = ConfigRecord({"site": site, "pid": os.getpid(), "count": counts[site], "bytes": bytes(size)})
        return Message(RecordDict({"answer": answer}), reply_to=message)

    def make(count, processes=2, **options):
        grid = ForkedGrid(
            app,
            {f"s{i}": {} for i in range(count)},
            processes=processes,
            **{"leaving": lambda site: counts.get(site, 0), "returned": returned.__setitem__, **options},
        )
        grids.append(grid)
        return grid

    yield make, returned
    for grid in grids:
        grid.close()


def order(grid, site, **what):
    (node,) = (node.node_id for node in grid.get_nodes() if node.name == site)
    return Message(RecordDict({"order": ConfigRecord(what)}), node, "query")


def answers(grid, messages, timeout=60):
    replies = list(grid.send_and_receive(messages, timeout=timeout))
    return {r.content["answer"]["site"]: r.content["answer"] for r in replies if r.has_content()}, replies


def test_every_node_answers_from_a_child_and_its_state_comes_back(forked):
    make, returned = forked
    with make(5) as grid:
        for count in (1, 2):
            found, _ = answers(grid, [order(grid, f"s{i}") for i in range(5)])
            assert {site: answer["count"] for site, answer in found.items()} == dict.fromkeys(found, count)
            assert len(found) == 5
        pids = {answer["pid"] for answer in found.values()}
        assert len(pids) == 2
        assert os.getpid() not in pids
    assert returned == {f"s{i}": 2 for i in range(5)}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_exception_is_an_error_without_its_text(forked):
    make, _ = forked
    with make(2) as grid:
        found, (reply,) = answers(grid, [order(grid, "s0", **{"raise": 1})])
        assert (found, reply.error.code, reply.error.reason) == ({}, 2, "ValueError")
        assert answers(grid, [order(grid, "s0")])[0]["s0"]["count"] == 2


def test_a_child_that_is_killed_answers_with_errors_and_holds_nobody_up(forked):
    make, returned = forked
    with make(4) as grid:
        began = time.monotonic()
        found, replies = answers(grid, [order(grid, "s0", die=1), order(grid, "s1"), order(grid, "s2")])
        assert list(found) == ["s1"]  # s0 and s2 were of one process
        assert sorted(r.error.code for r in replies if r.has_error()) == [8, 8]
        _, (reply,) = answers(grid, [order(grid, "s2")])
        assert reply.error.code == 8
        assert answers(grid, [order(grid, "s3")])[0]["s3"]["count"] == 1
        assert time.monotonic() - began < 50, "nobody waited for the time-out"
    assert returned == {"s1": 1, "s3": 1}


def test_large_messages_both_ways_do_not_wait_for_each_other(forked):
    make, _ = forked
    with make(2, processes=1) as grid:
        filler = bytes(1 << 20)
        ids = []
        for _ in range(8):  # far more than a pipe holds, pushed while answers of a megabyte wait to be read
            ids += grid.push_messages([order(grid, "s0", size=1 << 20, filler=filler)])
        waiting, until = set(ids), time.monotonic() + 60
        while waiting and time.monotonic() < until:
            waiting -= {reply.metadata.reply_to_message_id for reply in grid.pull_messages(waiting)}
        assert not waiting


def test_replies_nobody_waits_for_do_not_hide_the_state(forked, tmp_path):
    make, returned = forked
    with make(2) as grid:
        grid.push_messages([order(grid, "s0", size=1 << 20, touch=str(tmp_path / "t")) for _ in range(4)])
        wait_until((tmp_path / "t").exists)
    assert set(returned) == {"s0", "s1"}
    assert returned["s0"] >= 1


def test_closing_drops_what_is_queued(forked):
    make, returned = forked
    with make(1, processes=1) as grid:
        grid.push_messages([order(grid, "s0", sleep=1) for _ in range(60)])
        began = time.monotonic()
    assert time.monotonic() - began < 40
    assert returned["s0"] < 60


def test_a_child_that_sleeps_over_its_messages_says_where_and_is_gone(forked, capfd):
    make, returned = forked
    with make(4, stall_s=1) as grid:
        began = time.monotonic()
        # s0 and s2 are of one process: one waits for what never comes, one of the other's computes meanwhile
        found, replies = answers(
            grid, [order(grid, "s0", sleep=600), order(grid, "s2"), order(grid, "s1", compute=2.5)]
        )
        assert time.monotonic() - began < 30
        assert list(found) == ["s1"], "one that computes is not too slow"
        assert sorted(r.error.code for r in replies if r.has_error()) == [8, 8]
        _, (reply,) = answers(grid, [order(grid, "s2")])
        assert reply.error.code == 8
    assert returned == {"s1": 1, "s3": 0}
    assert " in query" in capfd.readouterr().err, "the stack of the child"


def test_a_child_that_was_stopped_is_left_to_whoever_stopped_it(forked):
    make, _ = forked
    with make(1, processes=1, stall_s=1) as grid:
        ids = set(grid.push_messages([order(grid, "s0", stop=1)]))
        until = time.monotonic() + 2.5
        while time.monotonic() < until:
            assert not grid.pull_messages(ids)
        os.kill(grid._children[0].pid, signal.SIGCONT)
        wait_until(lambda: grid.pull_messages(ids))


def test_a_child_that_takes_no_more_bytes_is_gone(forked):
    make, returned = forked
    with make(1, processes=1, stall_s=1) as grid:
        os.kill(grid._children[0].pid, signal.SIGSTOP)
        began = time.monotonic()
        ids = set(grid.push_messages([order(grid, "s0", filler=bytes(8 << 20))]))
        (reply,) = grid.pull_messages(ids)
        assert reply.error.code == 8
        assert time.monotonic() - began < 30
    assert returned == {}


def test_a_child_that_died_unseen_is_found(forked):
    """Another process holds the child's end of the pipe, so that its death is no end of a file here."""
    make, _ = forked
    with make(1, processes=1) as grid:
        child = grid._children[0]
        os.kill(child.pid, signal.SIGKILL)
        grid._selector.unregister(child.connection)  # nothing is heard of it
        ids = set(grid.push_messages([order(grid, "s0")]))
        replies = []
        wait_until(lambda: replies.extend(grid.pull_messages(ids)) or replies)
        assert replies[0].error.code == 8


def test_a_child_that_cannot_read_what_it_is_asked_is_gone(forked):
    make, _ = forked
    with make(1, processes=1) as grid:
        child = grid._children[0]
        message = order(grid, "s0")
        ids = set(grid.push_messages([message]))
        child.connection.send_bytes(b"no pickle")
        replies = []
        wait_until(lambda: replies.extend(grid.pull_messages(ids)) or replies)
        ids = set(grid.push_messages([order(grid, "s0")]))
        wait_until(lambda: replies.extend(grid.pull_messages(ids)) or len(replies) == 2)
        assert replies[-1].error.code == 8


def test_what_is_asked_while_it_is_made_is_answered_before_the_last_is_made(forked, tmp_path):
    make, _ = forked
    with make(40) as grid:
        touched = [tmp_path / f"s{i}" for i in range(40)]

        def made():
            for number, path in enumerate(touched):
                if number == 30:
                    wait_until(touched[0].exists)
                yield order(grid, f"s{number}", touch=str(path))

        waiting = set(grid.push_messages(made()))
        assert len(waiting) == 40
        wait_until(lambda: waiting.difference_update(_answered(grid, waiting)) or not waiting)
        assert all(path.exists() for path in touched)


def _answered(grid, waiting):
    return {reply.metadata.reply_to_message_id for reply in grid.pull_messages(waiting)}


def test_a_child_rests_until_there_is_no_more_to_do(forked, tmp_path):
    rested = []
    make, returned = forked

    def rest():
        rested.append(1)
        (tmp_path / str(len(rested))).touch()
        return len(rested) < 5

    with make(1, processes=1, resting=rest, leaving=lambda site: len(rested)) as grid:
        answers(grid, [order(grid, "s0")])
        wait_until((tmp_path / "5").exists)
    assert returned["s0"] == 5
    assert rested == []


def test_one_whose_state_cannot_be_taken_keeps_nobody_from_handing_over_his(forked):
    make, _ = forked
    taken = []

    def take(site, state):
        if site == "s0":
            raise RuntimeError("no room")
        taken.append(site)

    grid = make(4, returned=take)
    pids = [child.pid for child in grid._children]
    with pytest.raises(RuntimeError, match="no room"):
        grid.close()
    assert taken == ["s1", "s3"]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_children_end_when_their_parent_is_gone(forked):
    make, returned = forked
    grid = make(2)
    (pid,) = {answer["pid"] for answer in answers(grid, [order(grid, "s0")])[0].values()}
    for child in grid._children:
        child.connection.close()  # as the end of this process would
        child.is_gone = True
    assert os.waitpid(pid, 0)[0] == pid
    assert returned == {}


BESIDE_GRPC = """
import grpc, pandas, torch
from federation.forked_grid import may_fork
pandas.DataFrame({"site": ["a"]}).to_parquet("/dev/null")  # pyarrow's allocator has a thread of its own
assert any(may_fork() for _ in range(20))
server = grpc.server(__import__("concurrent.futures").futures.ThreadPoolExecutor(1))
port = server.add_insecure_port("127.0.0.1:0")
server.start()
grpc.channel_ready_future(grpc.insecure_channel(f"127.0.0.1:{port}")).result(timeout=20)
assert not may_fork()
"""


def test_a_process_with_threads_of_grpc_is_not_forked():
    subprocess.run([sys.executable, "-c", BESIDE_GRPC], check=True, timeout=60)


BESIDE_POOLS = """
import os, numpy, torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from federation.forked_grid import ForkedGrid, may_fork

big = numpy.ones((500, 500))
expected = big @ big, torch.from_numpy(big) @ torch.from_numpy(big)
threads = len(os.listdir("/proc/self/task"))
assert threads > 1, "no pool was started: the test shows nothing"
assert any(may_fork() for _ in range(20))
assert len(os.listdir("/proc/self/task")) < threads
app = ClientApp()

@app.query()
def query(message, context):
    torch.set_num_threads(1)
    assert (big @ big == expected[0]).all() and (torch.from_numpy(big) @ torch.from_numpy(big) == 500).all()
    return Message(RecordDict(), reply_to=message)

with ForkedGrid(app, {"a": {}, "b": {}}, processes=2, leaving=str, returned=lambda *_: None) as grid:
    asked = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
    assert (big @ big == expected[0]).all()  # the pools start again here
    assert (torch.from_numpy(big) @ torch.from_numpy(big) == expected[1]).all()
    replies = grid.send_and_receive(asked, timeout=20)
    assert [reply.has_content() for reply in replies] == [True, True]
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="pools of threads need a second core")
def test_pools_of_numpy_and_torch_end_and_start_again():
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", BESIDE_POOLS], check=True, timeout=60, env=environment)


BESIDE_A_PRODUCT = """
import threading, time, numpy
from federation.forked_grid import may_fork

big, count, is_over = numpy.ones((700, 700)), 0, False

def work():
    global count
    while not is_over:
        big @ big
        count += 1

def goes_on():
    seen, until = count, time.monotonic() + 30
    while count < seen + 3:
        assert time.monotonic() < until, "whoever computes waits for a pool that has ended"
        time.sleep(0.01)

thread = threading.Thread(target=work, daemon=True)
thread.start()
goes_on()
for _ in range(4):
    may_fork()
    goes_on()
is_over = True
thread.join()
assert any(may_fork() for _ in range(20))
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="pools of threads need a second core")
def test_no_pool_ends_below_a_product():
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", BESIDE_A_PRODUCT], check=True, timeout=120, env=environment)


def test_a_thread_that_ends_between_two_counts_hides_no_other(monkeypatch):
    counts = iter([1, 0, 0, 0])  # a thread of Python's ended after the first
    monkeypatch.setattr(forked_grid, "_thread", SimpleNamespace(_count=lambda: next(counts)))
    monkeypatch.setattr(forked_grid, "_tasks", lambda: ["1", "9"])  # this one, and one of somebody else's
    monkeypatch.setattr(forked_grid, "_name_of", lambda task: "python")
    assert forked_grid._has_foreign_threads()


def test_all_of_this_runs_in_a_process_of_its_own_where_it_cannot_here():
    if may_fork():
        return  # it did
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout

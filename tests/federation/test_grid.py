"""The in-process grid is a Flower grid: real messages, real ClientApps, and faults when a test asks."""

from __future__ import annotations

import threading
import time

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from audit.canonical import canonical_bytes
from federation.errors import FederationError
from federation.exchange import Around, Exchange, Made, Request, read_answer, read_answers
from federation.grid import MANY_NODES, InProcessGrid
from tests.waiting import Moved


def echo_app(seen=None, together=None):
    app = ClientApp()

    @app.query()
    def query(message, context):
        if seen is not None:
            seen.append((context.node_config["site"], threading.get_ident()))
        if context.node_config.get("broken"):
            raise ValueError("patient 17 is the cause")
        header = message.content["header"]["header"]
        if b'"together"' in header:
            together.wait()
        body = b'{"enrolment":{"site":"%s"}}' % str(context.node_config["site"]).encode()
        content = RecordDict(
            {"header": ConfigRecord({"kind": "x", "header": body}), "blobs": ConfigRecord({"b": b"1"})}
        )
        return Message(content, reply_to=message)

    return app


def ask(grid, node, header=None, **arguments):
    message = Request(kind="hello", header=header or {}).message(node, "")
    return list(grid.send_and_receive([message], **arguments))


def test_it_is_a_grid_of_flowers_own_kind():
    with InProcessGrid(echo_app(), {"a": {}}) as grid:
        assert isinstance(grid, Grid)
        (node,) = grid.get_nodes()
        assert node.name == "a"
        assert list(grid.get_node_ids()) == [node.node_id]
        (reply,) = ask(grid, node.node_id, timeout=60)
        assert reply.metadata.src_node_id == node.node_id
        assert list(grid.pull_messages([reply.metadata.reply_to_message_id])) == []  # pulled once


def test_nodes_work_side_by_side():
    seen, together = [], threading.Barrier(3, timeout=60)  # each goes on when all three are at work
    with InProcessGrid(echo_app(seen, together), {name: {} for name in "abc"}) as grid:
        messages = [Request(kind="hello", header={"together": 1}).message(n, "") for n in grid.get_node_ids()]
        replies = list(grid.send_and_receive(messages, timeout=60))
        assert [reply.has_error() for reply in replies] == [False] * 3
    assert len({thread for _, thread in seen}) == 3


def test_a_failing_app_tells_its_kind_of_error_and_nothing_of_its_text():
    with InProcessGrid(echo_app(), {"a": {"broken": True}}) as grid:
        (reply,) = ask(grid, next(iter(grid.get_node_ids())), timeout=60)
    assert reply.has_error()
    assert reply.error.reason == "ValueError"
    assert read_answer("a", reply).failure == "node error 2"


def test_a_lost_message_ends_at_the_time_out():
    with InProcessGrid(echo_app(), {"a": {}}, fault=lambda site, message: None) as grid:
        assert ask(grid, next(iter(grid.get_node_ids())), timeout=0.3) == []


def test_a_message_to_nobody_is_lost():
    with InProcessGrid(echo_app(), {"a": {}}) as grid:
        assert ask(grid, 4242, timeout=0.1) == []


def test_a_delayed_message_arrives_late():
    with InProcessGrid(echo_app(), {"a": {}}, fault=lambda site, message: 0.15) as grid:
        node = next(iter(grid.get_node_ids()))
        started = time.monotonic()
        assert len(ask(grid, node, timeout=60)) == 1
        assert time.monotonic() - started >= 0.3  # there and back


def test_after_close_nothing_is_delivered():
    grid = InProcessGrid(echo_app(), {"a": {}})
    node = next(iter(grid.get_node_ids()))
    grid.close()
    assert ask(grid, node, timeout=0.1) == []


def test_an_exchange_knows_only_the_sites_it_asked_for():
    with InProcessGrid(echo_app(), {"a": {}, "b": {}}) as grid:
        exchange = Exchange(grid, discovery_s=60)
        assert set(exchange.discover(["a"])) == {"a"}
        assert exchange.sites == ("a",)


def test_an_exchange_gives_up_on_a_site_that_is_not_there():
    with InProcessGrid(echo_app(), {"a": {}}, workers=0) as grid:
        clock = Moved()
        exchange = Exchange(grid, discovery_s=30, monotonic=clock, sleep=clock.forward)
        assert set(exchange.discover(["a", "zz"])) == {"a"}
        assert clock() == pytest.approx(30, abs=1)
        answers = exchange.ask({"zz": Request(kind="hello", header={})}, timeout_s=0.2)
        assert answers["zz"][0].failure == "not connected"


def test_one_silent_site_does_not_hold_back_the_others_answers():
    silent = []

    def fault(site, message):
        return None if site == "b" and silent else 0.0

    with InProcessGrid(echo_app(), {"a": {}, "b": {}}, fault=fault, workers=0) as grid:
        clock = Moved()
        exchange = Exchange(grid, monotonic=clock, sleep=clock.forward)
        exchange.discover(["a", "b"])
        silent.append(True)
        answers = exchange.ask(dict.fromkeys("ab", Request(kind="hello", header={})), timeout_s=0.4)
    assert answers["a"][0].failure == ""
    assert answers["b"][0].failure == "timeout"


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"header": ConfigRecord({"header": b"{}", "blob-update": 3})},
        {"header": ConfigRecord({"header": b"{}", "blob-update": bytes(1 << 17)})},
        {"header": ConfigRecord({"header": b"{}", "blob-update": b"x"}), "blobs": ConfigRecord({})},
        {"header": ConfigRecord({"header": b"{}", "extra": b"x"})},
        {"header": ConfigRecord({"header": [b"{}"]})},
        {"header": ConfigRecord({"header": b"{}"}), "more": ConfigRecord({})},
        {"header": ConfigRecord({"header": "text"}), "blobs": ConfigRecord({})},
        {"header": ConfigRecord({"header": b"{"}), "blobs": ConfigRecord({})},
        {"header": ConfigRecord({"header": b"[]"}), "blobs": ConfigRecord({})},
        {"header": ConfigRecord({"header": b'{"a":1,"a":2}'}), "blobs": ConfigRecord({})},
        {"header": ConfigRecord({"header": b"{}"}), "blobs": ConfigRecord({"update": 3})},
        {"header": ConfigRecord({"header": b'{"error":"internal_error"}'}), "blobs": ConfigRecord({})},
    ],
)
def test_replies_outside_the_protocol_are_failures(content):
    with InProcessGrid(echo_app(), {"a": {}}) as grid:
        origin = Request(kind="hello", header={}).message(next(iter(grid.get_node_ids())), "")
    reply = Message(RecordDict(content), reply_to=origin)
    assert read_answer("a", reply).failure


def test_the_server_app_names_what_its_run_config_lacks():
    from flwr.app import Context

    from federation.server_app import app

    with (
        InProcessGrid(echo_app(), {"a": {}}) as grid,
        pytest.raises(FederationError, match="`home` and `run`"),
    ):
        app(grid=grid, context=Context(0, 0, {}, RecordDict(), {"home": "", "run": ""}))


def test_many_nodes_share_a_few_threads_and_each_answers_in_order():
    seen: dict[str, list[int]] = {}
    app = ClientApp()

    @app.query()
    def answer(message, context):
        number = message.content["n"]["n"]
        seen.setdefault(context.node_config["site"], []).append(number)
        return Message(RecordDict(), reply_to=message)

    before = threading.active_count()
    with InProcessGrid(app, {f"s{i}": {} for i in range(MANY_NODES + 20)}) as grid:
        assert threading.active_count() == before
        messages = [
            Message(RecordDict({"n": ConfigRecord({"n": number})}), node, "query")
            for number in range(3)
            for node in grid.get_node_ids()
        ]
        assert len(list(grid.send_and_receive(messages, timeout=60))) == len(messages)
    assert set(map(tuple, seen.values())) == {(0, 1, 2)}


@pytest.mark.parametrize("member", ["z", "a", "m"])
def test_a_header_of_which_the_rest_is_written_travels_as_the_header_itself(member):
    header = {"z": [1, {"b": "x"}], "a": {"y": None}, "m": "text"}
    around = Around.of({**header, member: None}, member)
    plain = Request(kind="hello", header=header).message(7, "")
    written = Request(kind="hello", header=header, around=around).message(7, "")
    assert written.content["header"]["header"] == plain.content["header"]["header"] == canonical_bytes(header)


def test_what_is_made_when_it_is_asked_for_is_made_for_known_names_alone():
    made = []
    questions = Made(["b", "a"], lambda name: made.append(name) or name.upper())
    assert (list(questions), len(questions)) == (["b", "a"], 2)
    assert ("a" in questions, "c" in questions) == (True, False)
    assert made == []
    assert (questions["a"], questions["a"], made) == ("A", "A", ["a", "a"])
    with pytest.raises(KeyError):
        questions["c"]


def both(*raws, **more):
    kinds = ["x"] * len(raws)
    return RecordDict({"header": ConfigRecord({"kind": kinds, "header": list(raws), **more})})


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        (both(b'{"a":1}', b'{"b":2}'), ["", ""]),
        (both(b'{"a":1}'), ["", "not answered"]),
        (both(), ["not answered"] * 2),
        (both(b'{"error":"x"}'), ["agent error x", "not answered"]),
        (both(b'{"a":1}', b"{"), ["", "the reply's header is not strict JSON"]),
        (both("text", "text"), ["the reply's header is no bytes"] * 2),
        (both(b'{"a":1}', bytes((4 << 20) + 1)), ["", "the reply's header is no bytes, or too many"]),
        (both(b"{}", b"{}", b"{}"), ["the reply holds more"] * 2),
        (RecordDict({**both(b"{}", b"{}"), "more": ConfigRecord({})}), ["the reply holds more"] * 2),
        (RecordDict({"header": ConfigRecord({"header": b"{}"})}), ["the reply holds one answer"] * 2),
        (
            RecordDict({"header": ConfigRecord({"header": b'{"error":"internal_error"}'})}),
            ["agent error internal_error"] * 2,
        ),
        (RecordDict(), ["the reply lacks its header"] * 2),
    ],
    ids=range(12),
)
def test_answers_to_two_questions_are_read_each_for_itself(content, wanted):
    with InProcessGrid(echo_app(), {"a": {}}) as grid:
        origin = Request(kind="hello", header={}).message(next(iter(grid.get_node_ids())), "")
    answers = read_answers("a", Message(content, reply_to=origin), 2)
    assert len(answers) == 2
    for answer, failure in zip(answers, wanted, strict=True):
        assert answer.failure.startswith(failure)
        assert bool(answer.failure) == bool(failure)

"""One question to several sites over a network that loses, delays, restarts and lies."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from federation import asking
from federation.asking import Asking
from federation.exchange import _is_trouble
from tests.waiting import Moved

NODES = {"north": 11, "south": 12}


class Net:
    """A grid whose nodes answer as `answers[site]` says for each time they are asked: a header, or None."""

    def __init__(self, **answers):
        self.answers, self.asked, self.replies = answers, dict.fromkeys(NODES, 0), {}
        self.activated = dict.fromkeys(NODES, "")
        self.rejects: set[str] = set()
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1

    def push_messages(self, messages):
        ids = []
        messages = iter(messages)
        first = next(messages, None)
        assert first is not None, (
            "SuperLink answers an empty push with 500, and Flower's grid then ends the run"
        )
        for message in (first, *messages):
            site = next(name for name, node in NODES.items() if node == message.metadata.dst_node_id)
            if site in self.rejects:
                self.rejects.discard(site)
                ids.append(None)
                continue
            turn, self.asked[site] = self.asked[site], self.asked[site] + 1
            name = f"{site}-{turn}"
            message.metadata.__dict__["_message_id"] = name
            ids.append(name)
            script = self.answers[site]
            said = script[min(turn, len(script) - 1)]
            if said is not None:
                self.replies[name] = self._reply(message, said)
        return ids

    def _reply(self, message, said):
        if isinstance(said, int):
            return Message(Error(said, "gone"), reply_to=message)
        content = RecordDict(
            {"header": ConfigRecord({"kind": "x", "header": said}), "blobs": ConfigRecord({})}
        )
        return Message(content, reply_to=message)

    def pull_messages(self, ids):
        return [self.replies.pop(name) for name in list(ids) if name in self.replies]

    def get_nodes(self):
        return [
            SimpleNamespace(node_id=node, last_activated_at=self.activated[site])
            for site, node in NODES.items()
        ]


def message(site):
    return Message(RecordDict({}), NODES[site], "query")


def ask(net, *, timeout_s=1.5, trouble_s=1.5):
    asked = Asking(
        net,
        site_of=lambda reply: next(
            (name for name, node in NODES.items() if node == reply.metadata.src_node_id), None
        ),
        is_trouble=_is_trouble,
        poll_s=0.002,
        timeout_s=timeout_s,
        trouble_s=trouble_s,
        pause_s=0.02,
        look_s=0.05,
        monotonic=(clock := Moved()),
        sleep=clock.forward,
    )
    found = dict(asked.ask([(site, message(site)) for site in NODES], message))
    return found, clock()


OK, RELAY = b'{"fine":1}', b'{"error":"internal_error"}'


def test_answers_end_the_wait_and_each_site_is_asked_once():
    net = Net(north=[OK], south=[OK])
    found, seconds = ask(net)
    assert sorted(found) == ["north", "south"]
    assert net.asked == {"north": 1, "south": 1}
    assert seconds < 0.5


@pytest.mark.parametrize("trouble", [5, 8, RELAY, b'{"error":"rate_limited"}'])
def test_trouble_that_passes_costs_a_pause_and_no_site(trouble):
    net = Net(north=[trouble, trouble, OK], south=[OK])
    found, seconds = ask(net)
    assert found["north"].content["header"]["header"] == OK
    assert net.asked["north"] == 3
    assert seconds < 1.2


def test_trouble_that_lasts_is_the_answer_and_does_not_take_the_whole_time():
    net = Net(north=[5], south=[OK])
    found, seconds = ask(net, timeout_s=20, trouble_s=0.2)
    assert found["north"].has_error()
    assert seconds < 5


def test_a_site_that_declines_is_not_asked_again():
    declined = b'{"error":"budget_exhausted"}'
    net = Net(north=[declined], south=[OK])
    found, _ = ask(net)
    assert found["north"].content["header"]["header"] == declined
    assert net.asked["north"] == 1


def test_silence_is_asked_again_at_half_time_and_then_left():
    net = Net(north=[None], south=[OK])
    found, seconds = ask(net, timeout_s=0.6)
    assert sorted(found) == ["south"]
    assert net.asked["north"] == 2
    assert 0.5 < seconds < 3


def test_a_node_that_was_activated_since_is_asked_at_once():
    net = Net(north=[None, OK], south=[OK])
    net.activated["north"] = datetime.fromtimestamp(time.time() + 3600, UTC).isoformat()
    found, seconds = ask(net, timeout_s=30)
    assert sorted(found) == ["north", "south"]
    assert seconds < 5


def test_a_node_that_was_activated_before_is_left_in_peace():
    net = Net(north=[None], south=[OK])
    net.activated["north"] = datetime.fromtimestamp(time.time() - 5, UTC).isoformat()
    ask(net, timeout_s=0.4)
    assert net.asked["north"] == 2  # at first, and at half time


def test_a_message_that_is_not_taken_is_pushed_again():
    net = Net(north=[OK], south=[OK])
    net.rejects.add("north")
    found, _ = ask(net)
    assert sorted(found) == ["north", "south"]


def test_a_second_answer_of_a_site_changes_nothing():
    net = Net(north=[5, OK], south=[OK])
    found, _ = ask(net)
    assert found["north"].content["header"]["header"] == OK


def test_a_node_without_a_time_is_no_node_that_came_back():
    assert asking._seconds("") == 0.0
    assert asking._seconds("1970-01-01T00:00:01") == 1.0
    assert asking._seconds("soon") == 0.0


class Twice(Net):
    """Goes over the messages several times, as Flower's grid does: to name them, and to send them."""

    def push_messages(self, messages):
        if not messages:
            return []
        named = [id(message) for message in messages]
        sent = list(messages)
        assert named == [id(message) for message in sent], "they are other messages, or none"
        return super().push_messages(messages)


def test_a_grid_may_go_over_the_messages_as_often_as_it_likes():
    net = Twice(north=[OK], south=[None, OK])
    assert sorted(ask(net)[0]) == ["north", "south"]
    assert net.asked == {"north": 1, "south": 2}


def test_messages_are_made_as_the_grid_sends_them():
    """A grid that sends one by one has the first under way before the last is made."""
    order = []

    class OneByOne(Net):
        def push_messages(self, messages):
            names = []
            for one in messages:
                order.append("sent")
                names += super().push_messages([one])
            return names

    net = OneByOne(north=[OK], south=[OK])
    asking = Asking(
        net,
        site_of=lambda reply: next(n for n, node in NODES.items() if node == reply.metadata.src_node_id),
        is_trouble=_is_trouble,
        poll_s=0.01,
        timeout_s=1.0,
        trouble_s=1.0,
    )

    def messages():
        for site in NODES:
            order.append("made")
            yield site, message(site)

    assert len(list(asking.ask(messages(), message))) == 2
    assert order == ["made", "sent"] * 2


def test_nobody_to_ask_is_no_question_to_the_grid():
    net = Net()
    asked = Asking(
        net, site_of=lambda _: None, is_trouble=_is_trouble, poll_s=0.01, timeout_s=1.0, trouble_s=1.0
    )
    assert list(asked.ask((), lambda site: pytest.fail(site))) == []
    assert net.asked == dict.fromkeys(NODES, 0)

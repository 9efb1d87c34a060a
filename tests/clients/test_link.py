"""The relay and its links: bytes go through, everything else becomes one closed code."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from clients.agent_server import served_agents
from clients.client_app import app, pack, unpack
from clients.errors import LinkError
from clients.inprocess import agent_of, live_agents
from clients.link import connect
from clients.socket_link import SocketLink


class Echo:
    """An agent that says what it heard, or fails as told."""

    def __init__(self, failure=None):
        self.failure, self.heard = failure, []

    def handle(self, kind, header, blobs):
        self.heard.append((kind, header, dict(blobs)))
        if self.failure:
            raise self.failure
        return header + b"!", {name: blob[::-1] for name, blob in blobs.items()}


@pytest.fixture
def ask():
    """Return `ask(content, message_type, node_config) -> reply content`, through the real ClientApp."""

    def ask(content, message_type="query", node_config=None):
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
        message = Message(content, 2, message_type)
        message.metadata.__dict__["_message_id"] = "message-1"
        context = Context(
            run_id=1,
            node_id=2,
            node_config=node_config or {"site": "alpha"},
            state=RecordDict(),
            run_config={},
        )
        return app(message, context)

    return ask


def code(reply):
    assert not reply.has_error()
    return json.loads(unpack(reply.content)[1])


def test_bytes_go_through_unread(ask):
    agent = Echo()
    with live_agents({"alpha": agent}):
        reply = ask(pack("round", b"\x00\xffheader", {"base_model": b"abc", "empty": b""}), "train")
    assert unpack(reply.content) == ("round", b"\x00\xffheader!", {"base_model": b"cba", "empty": b""})
    assert agent.heard == [("round", b"\x00\xffheader", {"base_model": b"abc", "empty": b""})]


@pytest.mark.parametrize(
    ("content", "message_type"),
    [
        (pack("round", b"{}", {}), "query"),
        (pack("hello", b"{}", {}), "train"),
        (pack("shell", b"{}", {}), "query"),
        (RecordDict(), "query"),
        (RecordDict({"header": ConfigRecord({"kind": "hello"}), "blobs": ConfigRecord()}), "query"),
        (RecordDict({"header": ConfigRecord({"kind": 1, "header": b""}), "blobs": ConfigRecord()}), "query"),
        (RecordDict({"header": ConfigRecord({"kind": "hello", "header": b"{}", "blob-a": "text"})}), "query"),
        (RecordDict({"header": ConfigRecord({"kind": "hello", "header": b"{}", "blob-A": b"x"})}), "query"),
        (RecordDict({"header": ConfigRecord({"kind": "hello", "header": b"{}", "more": b"x"})}), "query"),
        (
            RecordDict(
                {
                    "header": ConfigRecord({"kind": "hello", "header": b"{}"}),
                    "blobs": ConfigRecord({"a": "text"}),
                }
            ),
            "query",
        ),
    ],
)
def test_a_message_of_another_form_gets_one_code_and_reaches_no_agent(ask, content, message_type):
    agent = Echo()
    with live_agents({"alpha": agent}):
        assert code(ask(content, message_type)) == {"error": "internal_error"}
    assert agent.heard == []


def several(*asked, **more):
    kinds, headers = [kind for kind, _ in asked], [header for _, header in asked]
    return RecordDict({"header": ConfigRecord({"kind": kinds, "header": headers, **more})})


class Answering(Echo):
    """An agent that answers each kind as told."""

    def __init__(self, answers, blobs=None):
        super().__init__()
        self.answers, self.blobs = answers, blobs or {}

    def handle(self, kind, header, blobs):
        super().handle(kind, header, blobs)
        return self.answers[kind], self.blobs


def test_questions_in_one_message_are_asked_in_order(ask):
    agent = Answering({"cosign": b'{"a":1}', "masked.shares": b'{"b":2}'})
    with live_agents({"alpha": agent}):
        reply = ask(several(("cosign", b"x"), ("masked.shares", b"y")))
    assert agent.heard == [("cosign", b"x", {}), ("masked.shares", b"y", {})]
    assert list(reply.content["header"]["kind"]) == ["cosign", "masked.shares"]
    assert list(reply.content["header"]["header"]) == [b'{"a":1}', b'{"b":2}']
    assert set(reply.content) == {"header"}


@pytest.mark.parametrize("first", [b'{"error":"x"}', b'{"error":"x","refusal":{}}', b"[]"])
def test_after_an_answer_that_is_an_error_nothing_more_is_asked(ask, first):
    """The keys of the next round would delete the secrets of one that could not be opened."""
    agent = Answering({"masked.survivors": first, "masked.keys": b"{}"})
    with live_agents({"alpha": agent}):
        reply = ask(several(("masked.survivors", b"x"), ("masked.keys", b"y")))
    assert [kind for kind, _, _ in agent.heard] == ["masked.survivors"]
    assert list(reply.content["header"]["header"]) == [first]


@pytest.mark.parametrize(
    "content",
    [
        several(),
        several(("hello", b"{}")),
        several(*[("hello", b"{}")] * 5),
        several(("hello", b"{}"), ("round", b"{}")),
        several(("hello", b"{}"), ("shell", b"{}")),
        several(("hello", "text"), ("cosign", "text")),
        several(("hello", b"{}"), ("cosign", bytes((4 << 20) + 1))),
        several(("hello", b"{}"), ("cosign", b"{}"), **{"blob-a": b"x"}),
        RecordDict({**several(("hello", b"{}"), ("cosign", b"{}")), "blobs": ConfigRecord({"a": b"x"})}),
        RecordDict({"header": ConfigRecord({"kind": ["hello", "cosign"], "header": [b"{}"]})}),
        RecordDict({"header": ConfigRecord({"kind": ["hello", "cosign"], "header": b"{}"})}),
        RecordDict({"header": ConfigRecord({"kind": "hello", "header": [b"{}", b"{}"]})}),
        RecordDict({"header": ConfigRecord({"kind": [1, 2], "header": [b"{}", b"{}"]})}),
    ],
    ids=range(13),
)
@pytest.mark.parametrize("message_type", ["query", "train"])
def test_questions_of_another_form_reach_no_agent(ask, content, message_type):
    agent = Echo()
    with live_agents({"alpha": agent}):
        assert code(ask(content, message_type)) == {"error": "internal_error"}
    assert agent.heard == []


def test_rounds_are_never_asked_among_others(ask):
    agent = Echo()
    with live_agents({"alpha": agent}):
        assert code(ask(several(("round", b"{}"), ("round", b"{}")), "train")) == {"error": "internal_error"}
    assert agent.heard == []


@pytest.mark.parametrize(
    "agent",
    [
        Answering({"hello": b"{}", "cosign": b"{}"}, blobs={"a": b"x"}),
        Answering({"hello": b"{}", "cosign": b"no json"}),
        Answering({"hello": b"{}"}),
    ],
    ids=["blobs", "no json", "an exception"],
)
def test_an_agent_that_answers_otherwise_gives_one_code(ask, agent):
    with live_agents({"alpha": agent}):
        assert code(ask(several(("hello", b"{}"), ("cosign", b"{}")))) == {"error": "internal_error"}


def test_an_exception_beside_the_data_never_leaves_with_its_text(ask, caplog):
    secret = RuntimeError("patient 17 has row 4")
    with live_agents({"alpha": Echo(secret)}):
        reply = ask(pack("hello", b"{}", {}))
    assert code(reply) == {"error": "internal_error"}
    assert "patient" not in str(reply.content)
    assert "patient 17" in caplog.text  # on the site's own console


def test_a_node_without_an_agent_answers_with_one_code(ask):
    assert code(ask(pack("hello", b"{}", {}))) == {"error": "internal_error"}


def test_a_node_that_does_not_know_its_site_answers_with_one_code(ask):
    with live_agents({"alpha": Echo()}):
        assert code(ask(pack("hello", b"{}", {}), node_config={"partition-id": 0})) == {
            "error": "internal_error"
        }


def test_the_coordinator_cannot_choose_the_link(ask):
    """Run config comes from the coordinator; only the node's own configuration names the agent."""
    agent = Echo()
    with live_agents({"alpha": agent}):
        message = Message(pack("hello", b"{}", {}), 2, "query")
        message.metadata.__dict__["_message_id"] = "message-1"
        hostile = {"agent": "inprocess:os:system", "site": "beta"}
        context = Context(
            run_id=1, node_id=2, node_config={"site": "alpha"}, state=RecordDict(), run_config=hostile
        )
        assert unpack(app(message, context).content)[1] == b"{}!"


@pytest.mark.parametrize(
    "target",
    [
        "",
        "inprocess",
        "inprocess:nowhere.at.all:x",
        "inprocess:clients.inprocess:nothing",
        "http://x",
        "tcp:1",
    ],
)
def test_a_target_of_another_form_is_refused(target):
    with pytest.raises(LinkError):
        connect(target, "alpha")


def test_one_agent_a_site_lives_in_a_process():
    with live_agents({"alpha": Echo()}):
        with pytest.raises(LinkError, match="alpha"), live_agents({"alpha": Echo()}):
            pass
        assert agent_of("alpha")
    with pytest.raises(LinkError, match="no agent of site"):
        agent_of("alpha")


def test_a_socket_carries_the_same_bytes(tmp_path):
    agent = Echo()
    with served_agents(tmp_path / "s", {"alpha": agent}):
        link = connect(f"unix:{tmp_path / 's'}", "alpha")
        blob = bytes(range(256)) * 5000
        assert link.handle("round", b"h", {"a": blob, "b": b""}) == (b"h!", {"a": blob[::-1], "b": b""})
    with pytest.raises(LinkError, match="no answer"):
        SocketLink(str(tmp_path / "s"), "alpha").handle("hello", b"", {})


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\n",
        b"not json\n",
        b'{"kind":"x"}\n',
        b'{"kind":"x","header":99999999999,"blobs":{}}\n',
        b'{"kind":"x","header":5,"blobs":{}}\nab',
        b'{"kind":"x","header":0,"blobs":{"a":-1}}\n',
        b'{"kind":"x","header":true,"blobs":[]}\n',
        b"x" * 70000,
    ],
)
def test_a_socket_survives_garbage(tmp_path, sent):
    agent = Echo()
    with served_agents(tmp_path / "s", {"alpha": agent}):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(tmp_path / "s" / "alpha.sock"))
            with contextlib.suppress(ConnectionError):  # closed on us with bytes unread: an answer, too
                raw.sendall(sent)
                raw.shutdown(socket.SHUT_WR)
                assert raw.recv(100) == b""
        assert connect(f"unix:{tmp_path / 's'}", "alpha").handle("hello", b"h", {}) == (b"h!", {})
    assert len(agent.heard) == 1


def test_sockets_are_their_owners_alone(tmp_path):
    with served_agents(tmp_path / "s", {"alpha": Echo()}):
        assert (tmp_path / "s").stat().st_mode & 0o077 == 0


def test_the_relay_loads_neither_torch_nor_pandas_nor_the_agent(repository):
    code = "import clients.client_app, sys; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert not {"torch", "pandas", "clients.agent", "clients.loader"} & set(run.stdout.split())

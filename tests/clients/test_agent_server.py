"""The agent's door: who is let in, how often, how much; and what reaches the agent then."""

from __future__ import annotations

import json
import os
import pwd
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from clients.agent_server import AgentServer, Buckets, Limits, Peer
from clients.errors import LinkError
from clients.socket_link import SocketLink
from tests.waiting import wait_until

KNOCK = """
import contextlib, json, os, socket, sys
os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as s:
    s.connect(sys.argv[1])
    with contextlib.suppress(BrokenPipeError):  # turned away before it said anything
        s.sendall(b'{"kind":"hello","header":0,"blobs":{}}\\n')
    print(s.recv(1000).decode())
"""


class Echo:
    def __init__(self, wait=None):
        self.heard, self.wait = [], wait

    def handle(self, kind, header, blobs):
        self.heard.append(kind)
        if self.wait is not None:
            assert self.wait.wait(60)
        return b'{"heard":1}', {}


@pytest.fixture
def serve(tmp_path):
    """Return `serve(agent, **options) -> (server, link, refusals)`; all are closed at the end."""
    made = []

    def serve(agent, *, folder=tmp_path, site="alpha", **options):
        refusals = []
        server = AgentServer(
            agent,
            folder / f"{site}.sock",
            refused=lambda kind, code: refusals.append((kind, code)),
            **options,
        )
        server.start()
        made.append(server)
        return server, SocketLink(str(folder), site), refusals

    yield serve
    for server in made:
        server.close(timeout_s=2)


def code(link, kind="hello", **blobs):
    return json.loads(link.handle(kind, b"", blobs)[0]).get("error", "answered")


def test_the_socket_is_for_its_user_and_group_and_goes_when_the_server_does(serve, tmp_path):
    server, link, _ = serve(Echo())
    assert stat.S_IMODE((tmp_path / "alpha.sock").stat().st_mode) == 0o660
    assert code(link) == "answered"
    server.close()
    assert not (tmp_path / "alpha.sock").exists()
    with pytest.raises(LinkError, match="no answer"):
        link.handle("hello", b"", {})


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_may_write_is_not_used(tmp_path, mode):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(mode)
    with pytest.raises(LinkError, match="others may write"):
        AgentServer(Echo(), folder / "alpha.sock").start()


def test_a_second_agent_does_not_take_the_first_ones_place(serve, tmp_path):
    _, link, _ = serve(Echo())
    with pytest.raises(LinkError, match="another agent answers"):
        AgentServer(Echo(), tmp_path / "alpha.sock").start()
    assert code(link) == "answered"


def test_a_dead_agents_socket_is_replaced_and_any_other_file_is_not(serve, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "alpha.sock"))
    _, link, _ = serve(Echo())
    assert code(link) == "answered"
    (tmp_path / "beta.sock").write_text("precious")
    with pytest.raises(LinkError, match="no socket"):
        AgentServer(Echo(), tmp_path / "beta.sock").start()
    assert (tmp_path / "beta.sock").read_text() == "precious"


def test_a_path_too_long_for_a_socket_is_named(tmp_path):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    with pytest.raises(LinkError, match="choose a shorter"):
        AgentServer(Echo(), folder / "alpha.sock").start()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to knock as another user")
@pytest.mark.parametrize("listed", [False, True])
def test_another_user_is_let_in_only_where_site_yaml_lists_it(serve, listed):
    nobody = pwd.getpwnam("nobody").pw_uid
    with tempfile.TemporaryDirectory() as place:  # the tests' own folder is closed to others
        folder = Path(place)
        folder.chmod(0o711)
        agent = Echo()
        _, _, refusals = serve(agent, folder=folder, uids=frozenset({nobody} if listed else ()))
        (folder / "alpha.sock").chmod(0o666)  # as if the group were shared
        done = subprocess.run(
            [sys.executable, "-c", KNOCK, str(folder / "alpha.sock"), str(nobody)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ("peer_not_allowed" in done.stdout) is not listed
        assert agent.heard == (["hello"] if listed else [])
        assert refusals == ([] if listed else [("connect", "peer_not_allowed")])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to knock as another user")
def test_another_user_is_kept_out_by_the_sockets_mode_too(serve):
    nobody = pwd.getpwnam("nobody").pw_uid
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o711)
        serve(Echo(), folder=Path(place), uids=frozenset({nobody}))
        done = subprocess.run(
            [sys.executable, "-c", KNOCK, f"{place}/alpha.sock", str(nobody)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "PermissionError" in done.stderr


def test_one_process_that_floods_leaves_the_others_their_share():
    now = [0.0]
    buckets = Buckets(Limits(burst=5, per_second=1, user_burst=100, user_per_second=10), lambda: now[0])
    flooding, honest = Peer(10, 1000), Peer(11, 1000)
    assert sum(buckets.take(flooding) for _ in range(500)) == 5
    assert buckets.take(honest)
    now[0] = 2.0
    assert sum(buckets.take(flooding) for _ in range(500)) == 2


def test_many_processes_of_a_user_share_one_budget_and_no_other_users():
    buckets = Buckets(Limits(burst=5, per_second=1, user_burst=20, user_per_second=0), lambda: 0.0)
    assert sum(buckets.take(Peer(pid, 1000)) for pid in range(3000)) == 20
    assert buckets.take(Peer(7, 1001))


def test_who_floods_is_turned_away_before_the_agent_hears_it(serve):
    agent = Echo()
    _, link, refusals = serve(agent, limits=Limits(burst=3, per_second=0))
    assert [code(link) for _ in range(5)] == ["answered"] * 3 + ["rate_limited"] * 2
    assert agent.heard == ["hello"] * 3
    assert refusals == [("connect", "rate_limited")] * 2


def test_who_dawdles_is_hung_up_on_and_others_are_served_meanwhile(serve, tmp_path):
    _, link, refusals = serve(Echo(), limits=Limits(head_timeout_s=3))  # of which the honest one needs little
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(tmp_path / "alpha.sock"))
        slow.sendall(b'{"kind"')
        assert code(link) == "answered"
        slow.settimeout(60)
        assert slow.recv(10) == b""
    assert ("connect", "bad_request") in refusals


def test_a_body_that_trickles_is_hung_up_on(serve, tmp_path):
    agent = Echo()
    _, _, refusals = serve(agent, limits=Limits(frame_timeout_s=0.3))
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(tmp_path / "alpha.sock"))
        slow.sendall(b'{"kind":"round","header":1000,"blobs":{}}\nx')
        slow.settimeout(60)
        assert slow.recv(10) == b""
    assert (agent.heard, refusals) == ([], [("round", "bad_request")])


def test_more_bytes_than_there_is_room_for_are_not_read(serve):
    agent = Echo()
    _, link, _ = serve(agent, limits=Limits(bytes_in_flight=1000))
    assert code(link, blob=b"x" * 1001) == "rate_limited"
    assert code(link, blob=b"x" * 900) == "answered"
    assert code(link, blob=b"x" * 900) == "answered"  # the room is given back
    assert agent.heard == ["hello"] * 2


def test_more_connections_than_allowed_are_told_so(serve):
    wait = threading.Event()
    agent = Echo(wait)
    _, link, refusals = serve(agent, limits=Limits(connections=2))
    threads = [threading.Thread(target=code, args=(link,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(agent.heard) == 2)
    assert code(link) == "rate_limited"
    wait.set()
    for thread in threads:
        thread.join(60)
    assert refusals == [("connect", "rate_limited")]


def test_closing_lets_a_request_finish(serve):
    wait = threading.Event()
    agent = Echo(wait)
    server, link, _ = serve(agent)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(code(link)))
    asking.start()
    while not agent.heard:
        time.sleep(0.01)
    threading.Timer(0.2, wait.set).start()
    server.close(timeout_s=60)
    asking.join(60)
    assert answers == ["answered"]


def test_the_status_is_no_request_of_the_agent(serve):
    agent = Echo()
    _, link, _ = serve(agent, status=lambda: {"pid": 7})
    assert json.loads(link.handle("agent.status", b"", {})[0]) == {"pid": 7}
    _, link, refusals = serve(agent, site="beta")
    assert code(link, "agent.status") == "peer_not_allowed"
    assert agent.heard == []
    assert refusals == [("agent.status", "peer_not_allowed")]

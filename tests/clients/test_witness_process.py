"""`affidavit site serve-witness` as a process: the protocol over a socket, and callers who mean no good."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import uvicorn

from audit.checkpoints import Checkpoint, open_checkpoint, sign_checkpoint
from audit.keys import SigningKey
from audit.merkle import consistency_proof_of, hash_leaf, root_of
from audit.notes import NoteSigner
from audit.tlog_policy import Policy
from audit.watchers import Watchers
from audit.witness_request import MAX_REQUEST_BYTES, AddCheckpoint
from clients.home import SiteHome
from clients.witness_server import impatient_protocol
from federation.trust import federation_policy
from tests.ports import free_ports
from tests.waiting import wait_until

LEAVES = [hash_leaf(b"%d" % i) for i in range(30)]


def signed(log: NoteSigner, size: int) -> bytes:
    return sign_checkpoint(Checkpoint(log.verifier.name, size, root_of(LEAVES[:size])), log)


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """A site's witness on a free port; it has begun to listen."""
    base = tmp_path_factory.mktemp("homes")
    data = base / "rows.csv"
    data.write_text("a,b\n1,2\n")
    home = SiteHome.create(
        base / "sites" / "alpha", name="alpha", data=data, population="p", lifetime_epsilon="1",
        lifetime_delta="0.00001", auto_approve=False,
    )  # fmt: skip
    log = NoteSigner("hospital.example/log", SigningKey.generate())
    vkey = home.keys().witness_signer("alpha").vkey
    home.join(federation_policy(log.vkey, {"alpha": vkey}))
    (port,) = free_ports(1)
    command = [sys.executable, "-P", "-m", "affidavit", "site", "serve-witness", "alpha"]
    with (base / "witness.log").open("w") as errors:
        running = subprocess.Popen(
            [*command, "--port", str(port), "--prefix", "/w", "--home", str(base)], stderr=errors,
            env=os.environ,
        )  # fmt: skip
        try:
            until = time.monotonic() + 120
            while time.monotonic() < until and running.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            assert running.poll() is None
            yield SimpleNamespace(port=port, url=f"http://127.0.0.1:{port}/w", log=log, home=home, vkey=vkey)
        finally:
            running.terminate()
            running.wait(60)


def prove(old: int, new: int) -> list[bytes]:
    return consistency_proof_of(LEAVES[:new], old)


def post(process, body: bytes, path: str = "/add-checkpoint") -> tuple[int, bytes]:
    request = urllib.request.Request(process.url + path, data=body)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_log_offers_and_the_process_cosigns_and_shows(process):
    text = f"log {process.log.vkey}\nwitness alpha {process.vkey} {process.url}\nquorum alpha\n"
    watchers = Watchers(Policy.parse(text), process.log.verifier.name)
    assert watchers.seen() == []
    for size in (3, 9):
        (line,) = watchers.offer(
            signed(process.log, size), lambda old, new: consistency_proof_of(LEAVES[:new], old)
        )
        assert process.home.witness().tree_size == size, "on disk before the answer"
    (shown,) = watchers.seen()
    opened = open_checkpoint(
        shown, log=process.log.verifier, witnesses=[watchers.policy.witnesses[0].verifier], now=2**40
    )
    assert opened.checkpoint.tree_size == 9
    assert line in shown


def test_other_logs_and_too_much_are_refused_over_the_socket(process):
    size = process.home.witness().tree_size
    other = NoteSigner("other.example/log", SigningKey.generate())
    for body, status in (
        (AddCheckpoint(old_size=0, proof=(), note=signed(other, 3)).format(), 404),
        (b"x" * (MAX_REQUEST_BYTES + 1), 413),
        (b"\n\n\n", 400),
    ):
        assert post(process, body)[0] == status
    assert post(process, b"", "/../add-checkpoint")[0] == 404
    assert process.home.witness().tree_size == size


def test_callers_who_never_finish_keep_nobody_out(process):
    """Forty hold a connection and send a byte now and then; an honest request is answered meanwhile."""
    head = b"POST /w/add-checkpoint HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nold "
    slow = [socket.create_connection(("127.0.0.1", process.port), 5) for _ in range(40)]
    try:
        for connection in slow:
            connection.sendall(head)
        assert post(process, b"\n\n\n")[0] == 400
        slow[-1].setblocking(False)
        with pytest.raises(BlockingIOError):  # answered while they were there, not when they had been cut off
            slow[-1].recv(1)
    finally:
        for connection in slow:
            connection.close()


def test_head_that_never_ends_is_cut_off_so_that_no_crowd_can_stay():
    """The same server in this process, with half a second in place of ten."""

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    config = uvicorn.Config(
        app, port=0, log_config=None, lifespan="off", ws="none", limit_concurrency=5,
        http=impatient_protocol(0.5),
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        address = server.servers[0].sockets[0].getsockname()
        slow = [socket.create_connection(address, 5) for _ in range(8)]
        for number, connection in enumerate(slow):
            connection.sendall(b"GET / HTTP/1.1\r\nHo" if number % 2 else b"G")
        wait_until(lambda: ask(address) == 204)
        for connection in slow:
            connection.settimeout(60)
            assert connection.recv(100) == b"", "the server hung up"
            connection.close()
    finally:
        server.should_exit = True
        thread.join(60)


def ask(address) -> int:
    try:
        with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/", timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code

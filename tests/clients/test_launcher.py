"""The launcher of bundles: what it asks, what it leaves of the environment, and what it costs."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest

from clients.errors import LinkError
from clients.launcher import BundleNotApprovedError, check_bundle, install_stub
from clients.refusal_book import RefusalBook

HEAVY = {
    "torch",
    "pandas",
    "sqlalchemy",
    "pydantic",
    "clients.agent",
    "clients.ledger",
    "clients.home",
}


class Answers:
    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def handle(self, kind, header, blobs):
        self.asked.append((kind, json.loads(header), dict(blobs)))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer, {}


def test_the_bundles_own_bytes_are_what_is_asked_about():
    agent = Answers(b'{"approved":true}')
    check_bundle(agent, b"PK bundle")
    digest = hashlib.sha256(b"PK bundle").hexdigest()
    assert agent.asked == [("bundle.check", {"digest": digest}, {})]


@pytest.mark.parametrize(
    "answer",
    [
        b'{"approved":false}',
        b'{"approved":1}',
        b'{"approved":"true"}',
        b'{"error":"rate_limited"}',
        b"[]",
        b"",
        b"\xff",
        LinkError("nobody listens"),
    ],
)
def test_anything_but_a_plain_yes_is_a_no(answer):
    with pytest.raises(BundleNotApprovedError) as error:
        check_bundle(Answers(answer), b"PK bundle")
    assert str(error.value) == "bundle_not_approved"


def test_the_stub_starts_with_nothing_of_the_callers_environment(tmp_path):
    stub = install_stub(
        tmp_path / "bin with 'quotes'", agent="unix:/run/x y", site="alpha", scratch=tmp_path / "scratch"
    )
    assert (tmp_path / "scratch").stat().st_mode & 0o077 == 0
    # the same line, with `env` in Python's place: what a bundle would find
    command = stub.read_text().replace(sys.executable, "/usr/bin/env", 1).split(" -I -c ")[0]
    probe = tmp_path / "probe"
    probe.write_text(command + "\n")
    done = subprocess.run(
        ["/bin/sh", str(probe)],
        env={**os.environ, "AWS_SECRET": "hunter2", "PYTHONPATH": "/evil", "LD_PRELOAD": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    names = {line.partition("=")[0] for line in done.stdout.splitlines()}
    assert names == {
        "PATH", "LANG", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "AFFIDAVIT_AGENT",
    }  # fmt: skip
    assert "hunter2" not in done.stdout


def test_a_stub_called_by_hand_says_what_it_is_for(tmp_path):
    from clients.launcher import main

    with pytest.raises(SystemExit, match="install_stub"):
        main(["--token", "x"])


def test_neither_launcher_nor_relay_loads_what_the_agent_needs(repository):
    """A process a message: what it loads, it loads every time."""
    code = (
        "import time, sys; began = time.process_time(); import clients.launcher;"
        "own = time.process_time() - began; import clients.client_app, clients.socket_link;"
        "print(own, *sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    own, *modules = done.stdout.split()
    assert HEAVY & set(modules) == set()
    assert float(own) < 0.6, own


class TestRefusalBook:
    def make(self, **options):
        written, now = [], [0.0]
        book = RefusalBook(
            "alpha",
            lambda body, _: written.append(body),
            lambda body: body,
            monotonic=lambda: now[0],
            **options,
        )
        return book, written, now

    def test_the_first_refusals_are_entries_and_the_rest_a_sum(self):
        book, written, now = self.make(burst=3, window_s=60)
        for _ in range(10):
            book.refused("round", "bad_request")
        assert [body.count for body in written] == [1, 1, 1]
        now[0] = 61.0
        book.settle()
        assert [(body.kind, body.count) for body in written[3:]] == [("round", 7)]
        assert book.total == 10

    def test_kinds_that_an_attacker_invents_become_one_line(self):
        book, written, _ = self.make(burst=0)
        for number in range(5000):
            book.refused(f"kind-{number}", "bad_request")
        book.settle(now=True)
        assert len(written) <= 17
        assert sum(body.count for body in written) == 5000

    def test_what_is_written_is_short_and_printable(self):
        book, written, _ = self.make()
        book.refused("\x1b[2J" + "x" * 500 + "é", "bad_request")
        assert written[0].kind == "?[2J" + "x" * 36

    def test_nothing_is_written_before_the_window_ends(self):
        book, written, _ = self.make(burst=1)
        book.refused("a", "bad_request")
        book.refused("a", "bad_request")
        book.settle()
        assert len(written) == 1


RELATIVE = """
import os
from clients import launcher

for name in ("connect", "limit", "confine", "_tell", "allowance"):
    setattr(launcher, name, lambda *_, **__: None)
launcher._run_flower = lambda *_: print(os.environ["FLWR_HOME"], os.getcwd())
own = ["--agent", "unix:/x", "--site", "s", "--scratch", "scratch"]
launcher.main([*own, "--", "--runtime-api-address", "127.0.0.1:9"])
"""


def test_a_folder_named_from_where_the_relay_stands_is_the_same_after_the_message_moved(tmp_path, repository):
    (tmp_path / "scratch").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", RELATIVE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        check=True,
    )
    home, moved = done.stdout.split()
    assert home == moved
    assert home.startswith(str(tmp_path / "scratch" / "message-"))
    assert list((tmp_path / "scratch").iterdir()) == [], "the message's folder goes with it"

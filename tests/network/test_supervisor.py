"""Supervised processes: in their order, restarted, and held up by nobody they do not come after."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from clients.network.starting import Watched
from federation.network.errors import ProcessError
from federation.network.supervisor import Part, Supervisor

STAY = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


class Play:
    def __init__(self, parts: list[Part], folder: Path) -> None:
        self.events: list[tuple[str, str]] = []
        self.supervisor = Supervisor(
            parts, folder, on_event=lambda event: self.events.append((event.kind, event.name))
        )
        self.thread = threading.Thread(target=self.supervisor.run)

    def __enter__(self) -> Play:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.supervisor.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()

    def until(self, *event: str) -> None:
        deadline = time.monotonic() + 60
        while event not in self.events:
            assert time.monotonic() < deadline, self.events
            time.sleep(0.02)


def test_a_part_waits_for_those_it_comes_after_and_for_nobody_else(tmp_path):
    ready = threading.Event()
    parts = [
        Part(name="slow", command=STAY, ready=ready.is_set, after=()),
        Part(name="beside", command=STAY, after=()),
        Part(name="last", command=STAY),
    ]
    with Play(parts, tmp_path) as play:
        play.until("ready", "beside")
        time.sleep(0.3)
        assert ("started", "last") not in play.events
        ready.set()
        play.until("ready", "last")
        assert play.events.index(("ready", "slow")) < play.events.index(("started", "last"))


def test_what_waits_for_people_holds_nobody_up(tmp_path):
    parts = [
        Part(name="agent", command=STAY, begin=lambda: False),
        Part(name="watch", command=STAY),
    ]
    with Play(parts, tmp_path) as play:
        play.until("ready", "watch")
        assert play.events.count(("waiting", "agent")) == 1


def test_what_dies_is_started_again(tmp_path):
    parts = [
        Part(name="frail", command=[sys.executable, "-S", "-c", "raise SystemExit(3)"], backoff_s=(0.05, 0.1))
    ]
    with Play(parts, tmp_path) as play:
        deadline = time.monotonic() + 60
        while play.events.count(("started", "frail")) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_command_that_does_not_exist_is_named(tmp_path):
    supervisor = Supervisor([Part(name="gone", command=["/no/such/command"])], tmp_path)
    with pytest.raises(ProcessError, match=r"gone: cannot start /no/such/command"):
        supervisor.run()


def test_other_files_restart_those_that_started_under_the_old_ones(tmp_path):
    policy, key = tmp_path / "policy.txt", tmp_path / "statement.pem"
    key.write_text("one")
    watch = Watched(policy, key)
    begin = watch.begin("agent")
    assert not begin()
    policy.write_text("one")
    assert watch.outdated() == ()  # it has not started yet: nothing is out of date
    assert begin()
    assert watch.outdated() == ()
    for path in (policy, key):
        os.utime(path, ns=(1, 1))
        assert watch.outdated() == ("agent",)
        assert begin()
        assert watch.outdated() == ()

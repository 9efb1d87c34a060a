"""The supervisor: workers that hang, die young, or cannot start for a while; one that never lives."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import closing, contextmanager

import pytest

from server import metric_files, workers
from server.metric_room import RoomyDict
from server.settings import Settings
from server.workers import Supervisor, stopping_gently
from tests.server import worker_targets
from tests.server.load import Load, check_log, served
from tests.waiting import Moved


@contextmanager
def supervising(tmp_path, target, monotonic=time.monotonic, **changed):
    """Yield (supervisor, run): `run(until)` runs it in this thread until the condition holds."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    settings = Settings.model_validate({"coordinator_home": tmp_path, "workers": 1, **changed})
    with closing(socket.socket()) as listener:
        supervisor = Supervisor(settings, listener, "error", target, monotonic)

        def run(until):
            seen = []

            def watch():
                end = time.monotonic() + 60
                while time.monotonic() < end and not supervisor._stopping.is_set():
                    if until():
                        seen.append(True)
                        break
                    time.sleep(0.02)
                supervisor._stop(signal.SIGTERM, None)

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                code = supervisor.run()
            finally:
                supervisor._stopping.set()
                watcher.join()
            return code, bool(seen)

        try:
            yield run
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@pytest.fixture
def heard():
    """SIGHUP as a process finds it that nobody started with `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_hang_up_stops_the_supervisor_as_a_stop_does(tmp_path, heard):
    sent = []

    def until():
        if starts(tmp_path) and not sent:
            sent.append(os.kill(os.getpid(), signal.SIGHUP))
        return False

    with stopping_gently(), supervising(tmp_path, worker_targets.dies_after_the_first) as run:
        assert run(until) == (0, False)
    assert sent
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_hang_up_that_was_ignored_stays_so(heard):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stopping_gently():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_one_worker_stops_by_either_signal_and_ends_well(lab, heard, number):
    with served(lab.folder, environ={"AFFIDAVIT_LOG_LEVEL": "info", "AFFIDAVIT_WORKER": "3"}) as server:
        server.process.send_signal(number)
        assert server.process.wait(60) == 0
    told = (lab.folder.parent / "serve.err").read_text()
    assert "Finished server process" in told
    assert "AFFIDAVIT_WORKER is no setting" in told
    assert ("SIGHUP: the server stops" in told) is (number == signal.SIGHUP)


def test_metrics_of_ended_workers_are_put_together_once_nobody_reads(tmp_path):
    now, folder = Moved(1_000.0), tmp_path / "metrics"
    folder.mkdir()
    with closing(socket.socket()) as listener:
        supervisor = Supervisor(
            Settings.model_validate({"coordinator_home": tmp_path}),
            listener,
            "error",
            worker_targets.dies,
            now,
        )
        for pid in (11, 12):
            kept = RoomyDict(str(folder / f"counter_{pid}.db"))
            kept.write_value("a", 1.0, 0.0)
            kept.close()
            supervisor._ended.add(pid)
        process = Process()
        process.pid = 12  # a new worker bears the number of a dead one
        supervisor._workers[0] = workers._Worker(process, None, now(), now())
        with metric_files.reading(folder):
            supervisor._keep_metrics(folder)
        supervisor._keep_metrics(folder)
        assert sorted(path.name for path in folder.glob("*.db")) == ["counter_11.db", "counter_12.db"]
        now.forward(1.5)
        supervisor._keep_metrics(folder)
        assert sorted(path.name for path in folder.glob("*.db")) == ["counter_0.db", "counter_12.db"]


def starts(folder):
    return len(list(folder.glob("start-*")))


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(workers, "_FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(workers, "_LONGEST_PAUSE_S", 0.01)
    monkeypatch.setattr(workers, "_GIVE_UP_AFTER", 2)


def test_supervisor_gives_up_where_no_worker_was_ever_ready(tmp_path, hasty):
    with supervising(tmp_path, worker_targets.dies) as run:
        assert run(lambda: False) == (1, False)
    assert starts(tmp_path) == 2


def test_outage_in_which_no_worker_can_start_ends_with_the_outage(tmp_path, hasty):
    """More deaths in a row than it takes to give up, of workers that have been ready."""
    (tmp_path / "kill").touch()

    def until():
        if starts(tmp_path) >= 4:
            (tmp_path / "database").touch()
        return starts(tmp_path) >= 4 and _is_alive(tmp_path)

    with supervising(tmp_path, worker_targets.dies_after_the_first) as run:
        assert run(until) == (0, True)


def _is_alive(folder):
    newest = max(folder.glob("start-*"))
    try:
        os.kill(int(newest.name.rsplit("-", 1)[1]), 0)
    except ProcessLookupError:
        return False
    return True


def test_back_off_of_a_slot_is_bounded_and_killed_workers_start_at_once(tmp_path):
    now = Moved(1_000.0)
    supervisor = Supervisor(
        Settings.model_validate({"coordinator_home": tmp_path}),
        socket.socket(), "error", worker_targets.dies, now,
    )  # fmt: skip

    def pause(exitcode):
        pulse, other = supervisor._context.Pipe(duplex=False)
        other.close()
        supervisor._workers[0] = workers._Worker(Process(exitcode), pulse, now(), now())
        supervisor._bury(0, None)
        return supervisor._due.pop(0) - now()

    supervisor._due.clear()
    assert [pause(-signal.SIGKILL) < 0.3 for _ in range(50)] == [True] * 50
    pauses = [pause(1) for _ in range(40)]
    assert pauses[0] < 0.3
    assert max(pauses) < workers._LONGEST_PAUSE_S + 0.3
    assert pauses[-1] > 14
    supervisor._listener.close()


class Process:
    """A worker's process as the supervisor sees it."""

    pid, sentinel = None, 0

    def __init__(self, exitcode=None):
        self.exitcode, self.killed = exitcode, 0

    def join(self):
        pass

    def is_alive(self):
        return True

    def kill(self):
        self.killed += 1


def test_time_in_which_the_supervisor_itself_stood_still_is_no_silence_of_its_workers(tmp_path):
    now, silence_s = Moved(1_000.0), 15.0
    settings = Settings.model_validate({"coordinator_home": tmp_path, "worker_silence_s": silence_s})
    with closing(socket.socket()) as listener:
        supervisor = Supervisor(settings, listener, "error", worker_targets.dies, now)
        pulse, other = supervisor._context.Pipe(duplex=False)
        with pulse, other:
            process = Process()
            supervisor._workers[0] = workers._Worker(process, pulse, now(), now())
            for pause_s in (600.0, 3.0, 60.0):  # a machine that is moved to another host, a debugger
                now.forward(pause_s)
                supervisor._look()
                now.forward(0.1)
                supervisor._look()
            assert process.killed == 0
            for _ in range(20):  # turns of its own, without a word
                now.forward(0.8)
                supervisor._look()
            assert process.killed > 0
            seen = process.killed
            os.write(other.fileno(), b"r")
            supervisor._hear(supervisor._workers[0])
            supervisor._look()
            assert process.killed == seen


def test_silent_worker_is_killed_and_replaced(tmp_path, hasty):
    ahead_s = 0.0

    def hurried():
        """The time, which hurries while the first worker is frozen; the second has what it needs to start."""
        nonlocal ahead_s
        if (tmp_path / "frozen").exists() and starts(tmp_path) == 1:
            ahead_s += 0.3
        return time.monotonic() + ahead_s

    with supervising(tmp_path, worker_targets.freezes, hurried, worker_silence_s=30) as run:
        assert run(lambda: (tmp_path / "second").exists()) == (0, True)
    assert starts(tmp_path) == 2


@pytest.mark.soak  # two workers of their own, stopped until they are replaced
def test_worker_that_hangs_in_the_middle_of_its_work_is_replaced(lab):
    """It may hold the database's write lock: then nobody gets an answer until it is gone."""
    options = {"AFFIDAVIT_WORKER_SILENCE_S": "3"}
    with served(lab.folder, "--workers", "2", environ=options) as server:
        with Load(server.url, lab.tokens["consumer"], 4) as load:
            while len(load.told.answers) < 20:
                time.sleep(0.01)
            stuck = server.workers()
            for pid in stuck:  # one of them may be starting still
                os.kill(pid, signal.SIGSTOP)
            until = time.monotonic() + 60
            while set(stuck) & set(server.workers()):
                assert time.monotonic() < until, "nobody is replaced"
                time.sleep(0.05)
            at = len(load.told.answers)
            while len(load.told.answers) < at + 20:
                assert time.monotonic() < until, "no answers any more"
                time.sleep(0.02)
        told = load.told
    assert told.errors == []
    check_log(lab, told, exactly=False)

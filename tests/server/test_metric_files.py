"""Workers' metrics in files: on full disks, after deaths, beside another server, and while somebody reads."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from server import metric_files, metric_room
from server.metric_room import RoomyDict, read_file
from tests.server.test_full_disk import file_system, fill

WORKER = """
import sys
from server.monitoring import Monitoring
monitoring = Monitoring()
monitoring.predicted_rows.labels("toy").inc(int(sys.argv[1]))
monitoring.tree_size.set(int(sys.argv[1]))
monitoring.explain_seconds.observe(0.3)
monitoring.tallies.enter()
if len(sys.argv) > 2:
    print(monitoring.render().decode())
"""


@pytest.fixture
def full(monkeypatch):
    """Whether the disk has no room: a switch, and the moments at which it is asked."""

    class Disk:
        is_full, asked = False, 0

        def reserve(self, descriptor, start, size):
            self.asked += 1
            if self.is_full:
                raise OSError(28, "No space left on device")
            os.posix_fallocate(descriptor, start, size)

    disk = Disk()
    monkeypatch.setattr(metric_room, "reserve", disk.reserve)
    return disk


@pytest.fixture
def now(monkeypatch):
    moment = [1_000.0]
    monkeypatch.setattr(RoomyDict, "monotonic", staticmethod(lambda: moment[0]))
    return moment


def worker(environ, *arguments):
    """Run a worker to its end; return (its number, what it printed)."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments], env=environ, stdout=subprocess.PIPE, text=True
    )
    printed = process.communicate()[0]
    assert process.returncode == 0
    return process.pid, printed


def of(printed):
    lines = (line.rpartition(" ") for line in printed.splitlines() if line[:1] not in ("", "#"))
    return {name: float(value) for name, _, value in lines}


def databases(folder):
    return sorted(path.name for path in folder.glob("*.db"))


# room


def test_blocks_are_there_before_a_page_is_touched(tmp_path):
    kept = RoomyDict(str(tmp_path / "counter_1.db"))
    for number in range(3_000):  # the file grows twice
        kept.write_value(f'["{number}", "{"x" * 40}"]', float(number), 0.0)
    state = (tmp_path / "counter_1.db").stat()
    assert state.st_size > 1 << 17
    assert state.st_blocks * 512 >= state.st_size, "sparse: the next page may end the process"
    assert len(read_file(tmp_path / "counter_1.db")) == 3_000
    kept.close()


def test_without_room_for_its_file_a_metric_waits_and_then_says_all(tmp_path, full, now):
    full.is_full = True
    path = tmp_path / "counter_1.db"
    kept = RoomyDict(str(path))
    assert kept.read_value("a") == (0.0, 0.0)
    kept.write_value("a", 1.0, 0.0)
    assert list(tmp_path.iterdir()) == [], "no empty file, which nobody could read"
    asked = full.asked
    for count in range(100):
        kept.write_value("a", float(count), 0.0)
    assert full.asked == asked, "a full disk is not asked each time"
    full.is_full = False
    now[0] += 5
    kept.write_value("a", 101.0, 0.0)
    assert read_file(path) == {"a": (101.0, 0.0)}
    kept.close()


def test_without_room_to_grow_what_is_there_goes_on(tmp_path, full, now):
    path = tmp_path / "counter_1.db"
    kept = RoomyDict(str(path))
    kept.write_value("first", 1.0, 0.0)
    full.is_full = True
    for number in range(3_000):
        kept.write_value(f'["{number}", "{"x" * 40}"]', 1.0, 0.0)
    kept.write_value("first", 2.0, 0.0)
    held = read_file(path)
    assert held["first"] == (2.0, 0.0)
    assert 1 < len(held) < 3_000
    full.is_full = False
    now[0] += 5
    kept.write_value("late", 7.0, 0.0)
    assert read_file(path)["late"] == (7.0, 0.0)
    kept.close()


def test_file_system_that_reserves_nothing_is_written_to_instead(tmp_path, monkeypatch):
    def unable(descriptor, start, size):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unable)
    with (tmp_path / "x").open("w+b") as file:
        metric_room.reserve(file.fileno(), 0, 1 << 16)
    assert (tmp_path / "x").stat().st_size == 1 << 16


def test_worker_on_a_really_full_disk_lives(tmp_path):
    with file_system("tmpfs", tmp_path) as disk:
        environ = dict(os.environ)
        with closing(metric_files.prepare(disk / "metrics", environ)):
            fill(disk, 0)
            _, printed = worker(environ, "5", "print")
        assert 'affidavit_predicted_rows_total{model="toy"}' not in of(printed)


GROWING = """
import sys
from server.monitoring import Monitoring
monitoring = Monitoring()
print("made", flush=True)
sys.stdin.readline()
for number in range(3_000):
    monitoring.denials.labels(f"an action, number {number}", "policy").inc()
print("alive", flush=True)
"""


def test_worker_whose_disk_fills_while_it_counts_lives(tmp_path):
    with file_system("tmpfs", tmp_path) as disk:
        environ = dict(os.environ)
        with closing(metric_files.prepare(disk / "metrics", environ)):
            process = subprocess.Popen(
                [sys.executable, "-c", GROWING],
                env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            with process:
                assert process.stdout.readline() == "made\n"
                fill(disk, 0)
                assert process.communicate("go\n")[0] == "alive\n"
            assert process.returncode == 0


# starts


def test_second_start_leaves_the_metrics_of_the_first_alone_and_those_of_the_dead_go(tmp_path):
    environ, parent = dict(os.environ), tmp_path / "metrics"
    first = metric_files.prepare(parent, environ)
    worker(environ, "5")
    held = databases(first.path)
    assert held
    dead = parent / "start-of-a-killed-one"
    dead.mkdir()
    (dead / "held").touch()
    (dead / "counter_1.db").touch()
    (parent / "counter_7.db").touch()  # an earlier release's
    second = metric_files.prepare(parent, environ)
    assert second.path != first.path
    assert metric_files.folder_of(environ) == second.path
    assert databases(first.path) == held
    assert not dead.exists()
    assert databases(parent) == []
    second.close()
    first.close()
    assert [path.name for path in parent.iterdir()] == ["sweep.lock"]


def test_start_without_room_in_the_home_keeps_metrics_elsewhere(tmp_path):
    (tmp_path / "metrics").write_text("a file in its place")
    environ: dict[str, str] = {}
    made = metric_files.prepare(tmp_path / "metrics", environ)
    assert Path(environ["PROMETHEUS_MULTIPROC_DIR"]).is_dir()
    made.close()
    assert not made.path.exists()


# the dead


def test_counters_of_the_dead_stay_in_a_bounded_number_of_files(tmp_path):
    environ = dict(os.environ)
    made = metric_files.prepare(tmp_path / "metrics", environ)
    for _ in range(3):
        pid, _ = worker(environ, "5")
        assert metric_files.bury(made.path, {pid})
        files = databases(made.path)
        assert files == ["counter_0.db", "gauge_max_0.db", "gauge_mostrecent_0.db", "histogram_0.db"]
    _, printed = worker(environ, "4", "print")
    found = of(printed)
    assert found['affidavit_predicted_rows_total{model="toy"}'] == 19.0
    assert found["affidavit_explain_seconds_count"] == 4.0
    assert found['affidavit_explain_seconds_bucket{le="0.5"}'] == 4.0
    assert found["affidavit_log_tree_size"] == 5.0
    assert found["affidavit_http_requests_in_flight"] == 1.0
    made.close()


def counted(folder):
    return sum(value for path in folder.glob("counter_*.db") for value, _ in read_file(path).values())


def test_nobody_is_buried_while_somebody_reads_nor_without_room(tmp_path, full):
    for pid in (11, 12):
        kept = RoomyDict(str(tmp_path / f"counter_{pid}.db"))
        kept.write_value("a", float(pid), 0.0)
        kept.close()
    with metric_files.reading(tmp_path):
        assert not metric_files.bury(tmp_path, {11, 12})
        assert databases(tmp_path) == ["counter_11.db", "counter_12.db"]
    full.is_full = True
    assert not metric_files.bury(tmp_path, {11, 12})
    assert databases(tmp_path) == ["counter_11.db", "counter_12.db"]
    full.is_full = False
    assert metric_files.bury(tmp_path, {11})
    assert counted(tmp_path) == 23.0
    assert metric_files.bury(tmp_path, {12})
    assert (databases(tmp_path), counted(tmp_path)) == (["counter_0.db"], 23.0)


def test_who_reads_waits_for_who_buries(tmp_path):
    with (
        metric_files.reading(tmp_path),
        (tmp_path / "turn").open() as other,
        pytest.raises(BlockingIOError),
    ):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_damaged_file_of_the_dead_is_dropped_and_the_others_count(tmp_path):
    (tmp_path / "counter_11.db").write_bytes(b"\xff" * 64)
    (tmp_path / "counter_12.db").touch()
    kept = RoomyDict(str(tmp_path / "counter_13.db"))
    kept.write_value("a", 3.0, 0.0)
    kept.close()
    assert metric_files.bury(tmp_path, {11, 12, 13})
    assert (databases(tmp_path), counted(tmp_path)) == (["counter_0.db"], 3.0)


def test_gauges_of_the_dead_are_put_together_by_their_kind(tmp_path):
    for pid, value, when in ((11, 9.0, 20.0), (12, 5.0, 30.0)):
        for kind in ("max", "min", "sum", "mostrecent", "livesum"):
            kept = RoomyDict(str(tmp_path / f"gauge_{kind}_{pid}.db"))
            kept.write_value("a", value, when)
            kept.close()
    assert metric_files.bury(tmp_path, {11, 12})
    values = {path.name: read_file(path)["a"][0] for path in tmp_path.glob("*.db")}
    assert values == {
        "gauge_max_0.db": 9.0,
        "gauge_min_0.db": 5.0,
        "gauge_sum_0.db": 14.0,
        "gauge_mostrecent_0.db": 5.0,
    }


def test_folder_that_somebody_removed_harms_nobody(tmp_path):
    assert metric_files.bury(tmp_path / "gone", {1})
    environ = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "gone")}
    assert of(worker(environ, "5", "print")[1])['affidavit_predicted_rows_total{model="toy"}'] == 5.0

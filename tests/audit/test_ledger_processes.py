"""Several processes, killed processes and torn files: nothing acknowledged is ever lost."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from audit import merkle
from audit.fsck import fsck
from audit.ledger import Ledger

WRITER = """
import sys, json, time
from audit.entries import IndexColumns
from audit.ledger import Ledger
path, who, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
def entry(n):
    body = json.dumps({"actor": "tester", "event_id": f"{who}-{n}", "time": "t", "type": "test.event"},
                      separators=(",", ":")).encode()
    return body, IndexColumns(type="test.event", actor="tester", time="t")
with Ledger.open(path) as ledger:
    print("ready", flush=True)
    n = 0
    while n < count:
        futures = []
        for _ in range(1 + n % 7):
            body, columns = entry(n)
            futures.append((n, ledger.append(body, event_id=f"{who}-{n}", index_columns=columns)))
            n += 1
        for number, future in futures:
            print(number, future.result().leaf_index, flush=True)
"""

KILLER = """
import os, random, signal
for attempt in range(count):
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        ledger = Ledger.open(path)
        for n in range(10**9):
            name = f"w{attempt}-{n}"
            body = entry(n)[0].replace(f"{who}-{n}".encode(), name.encode())
            future = ledger.append(body, event_id=name, index_columns=entry(n)[1])
            if n % 5 == 0:  # so that some entries are always on their way
                os.write(write_end, f"{name} {future.result().leaf_index}\\n".encode())
    os.close(write_end)
    acks = open(read_end)
    for _ in range(random.randrange(1, 20)):
        print(acks.readline(), end="")
    time.sleep(random.uniform(0, 0.003))
    os.kill(pid, signal.SIGKILL)
    print(acks.read(), end="")
    acks.close()
    os.waitpid(pid, 0)
"""


def start_writer(path: Path, who: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), who, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_forked_child_appends_through_its_own_thread(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    """In a process of its own: forking a test runner that has threads would warn."""
    script = (
        "import os, sys, warnings\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        + WRITER.split("with Ledger.open")[0]
        + """
ledger = Ledger.open(path)
def add(name):
    return ledger.append(entry(0)[0], event_id=name, index_columns=entry(0)[1]).result(20).leaf_index
add("before")
pid = os.fork()
found = [add(f"{os.getpid()}-{n}") for n in range(20)]
if pid == 0:
    os._exit(0 if ledger.tree_size >= 21 else 1)
assert os.waitpid(pid, 0)[1] == 0
assert ledger.tree_size == 41, ledger.tree_size
ledger.close()
"""
    )
    Ledger.create(tmp_path / "log.db", log_tools.ORIGIN).close()
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "log.db"), "x", "0"], check=True, timeout=60)


def test_two_processes_share_one_log_without_a_gap(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    path = tmp_path / "log.db"
    Ledger.create(path, log_tools.ORIGIN).close()
    writers = [start_writer(path, who, 200) for who in ("a", "b")]
    acked = [
        line.split() for writer in writers for line in writer.communicate(timeout=60)[0].splitlines()[1:]
    ]
    assert [writer.returncode for writer in writers] == [0, 0]
    indices = sorted(int(index) for _, index in acked)
    assert indices == list(range(len(indices)))
    assert len(indices) >= 400
    report = fsck(path, columns_of=log_tools.columns_of)
    assert report.ok, report
    assert report.entries == len(indices)


def test_killed_writer_loses_nothing_that_was_acknowledged(
    tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    kill_writers(tmp_path / "log.db", log_tools, times=20)


@pytest.mark.soak
def test_five_hundred_killed_writers_lose_nothing(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    kill_writers(tmp_path / "log.db", log_tools, times=500)


def kill_writers(path: Path, log_tools: SimpleNamespace, times: int) -> None:
    """Fork writers from one process, to save its imports, and kill each while it appends."""
    Ledger.create(path, log_tools.ORIGIN).close()
    script = WRITER.split("with Ledger.open")[0] + KILLER
    command = [sys.executable, "-c", script, str(path), "x", str(times)]
    done = subprocess.run(command, check=True, timeout=30 + times, stdout=subprocess.PIPE, text=True)
    acked = {name: int(index) for name, index in (line.split() for line in done.stdout.splitlines())}
    report = fsck(path, columns_of=log_tools.columns_of)
    assert report.ok, report
    with Ledger.open(path) as ledger:
        stored = {s.event_id: s.leaf_index for n in range(0, ledger.tree_size, 900) for s in page(ledger, n)}
        assert len(stored) == ledger.tree_size
        assert {name: stored.get(name) for name in acked} == acked
    assert len(acked) >= times


def page(ledger: Ledger, start: int) -> list[SimpleNamespace]:
    found = ledger.search(after=start - 1, limit=900)
    return [SimpleNamespace(event_id=s.event_id, leaf_index=s.leaf_index) for s in found]


def test_torn_write_ahead_log_yields_a_consistent_prefix(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    """Power lost in the middle of a write: the file ends anywhere; what opens is some batch's exact end."""
    chooser = random.Random(9)
    with Ledger.create(tmp_path / "log.db", log_tools.ORIGIN) as ledger:
        sizes = [0, *(log_tools.fill(ledger, range(n, n + 3))[-1].tree_size for n in range(0, 30, 3))]
        hashes = ledger.leaf_hashes(0, 30)
        data, wal = (tmp_path / "log.db").read_bytes(), (tmp_path / "log.db-wal").read_bytes()
    seen = set()
    for number in range(40):
        path = tmp_path / f"torn-{number}.db"
        path.write_bytes(data)
        kept = chooser.randrange(len(wal))
        torn = wal[:kept] + (bytes(len(wal) - kept) if number % 2 else b"")
        path.with_name(f"{path.name}-wal").write_bytes(torn)
        with Ledger.open(path) as ledger:
            size = ledger.tree_size
            assert ledger.root_hash == ledger.root_at(size) == merkle.root_of(hashes[:size])
        report = fsck(path, columns_of=log_tools.columns_of)
        assert (report.ok, report.entries) == (True, size)
        seen.add(size)
    assert len(seen) > 3
    assert max(seen) <= sizes[-1]

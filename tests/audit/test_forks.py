"""A process that forks in the middle of its work: neither half waits for ever, and nothing is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

from audit.fsck import fsck
from audit.ledger import Ledger

# In a process of its own: forking a test runner that has threads would warn.
BEGIN = """
import contextlib, json, os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from audit import _forks, _store
from audit.entries import IndexColumns
from audit.errors import LedgerClosedError
from audit.ledger import Ledger

def add(name):
    body = json.dumps({"actor": "tester", "event_id": name, "time": "t", "type": "test.event"},
                      separators=(",", ":")).encode()
    columns = IndexColumns(type="test.event", actor="tester", time="t")
    return ledger.append(body, event_id=name, index_columns=columns).result(20)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

ledger = Ledger.open(sys.argv[1])
"""

BUSY = """
ledger._backfill._commits = 1  # the thread that copies is always at it
over = threading.Event()

def write(name):
    number = 0
    while not over.is_set():
        add(f"{name}-{number}")
        number += 1

def read():
    while not over.is_set():
        ledger.entries(0, 50)

threads = [threading.Thread(target=write, args=("a",)), threading.Thread(target=write, args=("b",)),
           threading.Thread(target=read)]
for thread in threads:
    thread.start()
statuses = []
for number in range(40):
    time.sleep(0.003)
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)  # where it would wait for ever
        add(f"child-{number}")
        os._exit(0)
    statuses.append(ended(pid))
over.set()
for thread in threads:
    thread.join()
ledger.close()
assert statuses == [0] * 40, statuses
"""

STAYING = """
_forks.PATIENCE_S = 0.05
add("before")
inside, over = threading.Event(), threading.Event()

def stay():
    with _store.reading(ledger._engine):
        inside.set()
        over.wait(20)

thread = threading.Thread(target=stay)
thread.start()
inside.wait(20)
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    refused = 0
    for use in (lambda: add("child"), lambda: ledger.tree_size, lambda: Ledger.open(sys.argv[1])):
        try:
            use()
        except LedgerClosedError as error:
            refused += "start a new process" in str(error)
    os._exit(refused)
assert ended(pid) == 3
over.set()
thread.join()
pid = os.fork()  # the next one is not harmed by the first
if pid == 0:
    signal.alarm(20)
    add("second-child")
    os._exit(0)
assert ended(pid) == 0
add("after")
ledger.close()
"""

INSIDE = """
add("before")
with _store.reading(ledger._engine) as connection:
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(LedgerClosedError):
            add("child")
            os._exit(1)
        os._exit(0)
assert ended(pid) == 0
add("after")
ledger.close()
"""


def run(script: str, path: Path, log_tools: SimpleNamespace, asked: list[str]) -> set[str]:
    """Return which of these event ids the log holds after the script, which must end well."""
    Ledger.create(path, log_tools.ORIGIN).close()
    subprocess.run([sys.executable, "-c", BEGIN + script, str(path)], check=True, timeout=90)
    report = fsck(path, columns_of=log_tools.columns_of)
    assert report.ok, report
    with Ledger.open(path) as ledger:
        return ledger.logged_events(asked)


def test_children_of_a_busy_process_append_and_end(tmp_path: Path, log_tools: SimpleNamespace) -> None:
    children = [f"child-{number}" for number in range(40)]
    assert run(BUSY, tmp_path / "log.db", log_tools, children) == set(children)


def test_fork_that_could_not_wait_says_so_in_the_child_alone(
    tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    asked = ["before", "child", "second-child", "after"]
    assert run(STAYING, tmp_path / "log.db", log_tools, asked) == {"before", "second-child", "after"}


def test_fork_from_inside_a_transaction_is_refused_the_log(
    tmp_path: Path, log_tools: SimpleNamespace
) -> None:
    asked = ["before", "child", "after"]
    assert run(INSIDE, tmp_path / "log.db", log_tools, asked) == {"before", "after"}

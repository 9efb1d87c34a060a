"""Two real workers whose disk is full: a file system of their own, filled to its last block, and freed again.

`test_outages` refuses writes by a limit on files; here the kernel says that no space is left, to each file at
another moment: the write-ahead log, the database that it is copied into, keys, counts, the signer's state.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from audit.entries import columns_of
from audit.fsck import fsck
from federation.coordinator import Coordinator
from tests.server.conftest import ROW, Clock
from tests.server.load import Load, check_log, served
from tests.server.test_outages import OPTIONS, PREDICT, Running, settled
from tests.waiting import wait_until

SIZE_MIB = 24
MAY_SAY = {"audit.ledger_unavailable", "audit.ledger_write", "audit.checkpoint_late"}


@contextmanager
def file_system(kind: str, folder: Path) -> Iterator[Path]:
    """A small file system of our own; skips where this process may not mount one."""
    place = folder / "disk"
    place.mkdir()
    if kind == "tmpfs":
        command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_MIB}m,mode=700", "affidavit-test", place]
    else:
        image = folder / "disk.img"
        with image.open("wb") as file:
            file.truncate(SIZE_MIB << 20)
        _may(["mkfs.ext4", "-q", "-m", "0", image])
        command = ["mount", "-o", "loop", image, place]
    _may(command)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def _may(command: list[str | Path]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"no file system of our own: {error}")
    if done.returncode:
        pytest.skip(f"no file system of our own: {done.stderr.strip()}")


def fill(disk: Path, left: int) -> Path:
    """Take all the space but `left` bytes; return the file that has it."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
    with ballast.open("r+b") as file:
        file.truncate(max(ballast.stat().st_size - left, 0))
    return ballast


@pytest.mark.slow  # two workers of their own, and a disk that is filled and freed three times
@pytest.mark.parametrize("kind", ["tmpfs", pytest.param("ext4", marks=pytest.mark.soak)])
def test_full_disk_ends_the_answers_until_there_is_room_and_loses_none(lab, tmp_path, kind):
    with file_system(kind, tmp_path) as disk:
        shutil.copytree(lab.folder, disk / "homes")
        own = copy.copy(lab)
        own.folder, own.clock = tmp_path / "served", Clock()
        own.folder.symlink_to(disk / "homes")  # what the server says goes beside it, not onto the full disk
        own.coordinator = Coordinator.open(own.folder / "coordinator", own.folder / "signer", clock=own.clock)
        token = own.tokens["consumer"]
        with served(own.folder, "--workers", "2", environ=OPTIONS) as server:
            running = Running(server, own)
            running.until(200, token)
            workers = server.workers()
            with Load(server.url, token, 4) as load:
                for left in (0, 4_096, 20_000):
                    at = len(load.told.answers)
                    wait_until(lambda at=at: len(load.told.answers) >= at + 20)
                    ballast, shed = fill(disk, left), load.told.shed
                    wait_until(lambda shed=shed: load.told.shed >= shed + 20, "it never was full")
                    answered, size = settled(lambda: len(load.told.answers)), count(own)
                    again = load.told.shed
                    wait_until(lambda again=again: load.told.shed >= again + 20)
                    assert (len(load.told.answers), count(own)) == (answered, size), "an answer without room"
                    status, headers, document = running.ask(token)
                    assert (status, document["code"] in MAY_SAY) == (503, True), document
                    assert int(headers["retry-after"]) >= 1
                    assert refused(running, token) in MAY_SAY, "a refusal is an entry too"
                    wait_until(lambda: not server.is_ready(), "nobody is told to ask elsewhere")
                    assert get(running, "/healthz") == 200, "a restart would not help"
                    assert get(running, "/metrics", own.tokens["operator"]) == 200
                    ballast.unlink()
                    wait_until(lambda answered=answered: len(load.told.answers) >= answered + 20)
                    running.until(200, token)  # both of them
                    wait_until(server.is_ready)
            told = load.told
            assert server.workers() == workers, "nobody had to be started again"
        assert (told.errors, told.broken) == ([], 0)
        assert {"audit.ledger_unavailable"} <= told.codes <= MAY_SAY, told.codes
        assert "full" in (tmp_path / "serve.err").read_text(), "the operator is told what is missing"
        check_log(own, told, exactly=False)
        own.coordinator.close()
        report = fsck(own.folder / "coordinator" / "log.db", columns_of=columns_of)
        assert report.ok, report


def refused(running, token) -> str:
    """Ask for a purpose that the rules forbid; return the code of the answer."""
    body = json.dumps({"purpose": "marketing", "rows": [ROW]})
    with contextlib.closing(running.connect()) as connection:
        connection.request("POST", PREDICT, body, {"Authorization": f"Bearer {token}"})
        return json.loads(connection.getresponse().read())["code"]


def get(running, path, token="") -> int:
    with contextlib.closing(running.connect()) as connection:
        connection.request("GET", path, headers={"Authorization": f"Bearer {token}"} if token else {})
        return connection.getresponse().status


def count(lab) -> int:
    return lab.coordinator.ledger.count(type="prediction")

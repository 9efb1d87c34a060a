"""The power goes at any moment: what was not synced is lost, wholly or in part, and in any order.

A writer's calls are recorded with their bytes. For every moment the files are made as a disk could hold
them then: all that was synced, any part of what was not. What had been acknowledged must be there.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from audit.fsck import fsck
from audit.ledger import Ledger
from tests.audit.test_bit_flips import columns_of
from tests.faults.jobs import COLUMNS, body_of
from tests.faults.nursery import NoTracingError, Nursery
from tests.soak_report import Report

ORIGIN = "hospital.example/power"
SECTOR = 512
NAMES = ["one", "two", "three"]
_CALL = re.compile(r"\d+ +(\w+)\((\d+)<((?:\\x[0-9a-f]{2})+|[^>]*)>(.*)\) += (-?\d+)")
_UNLINK = re.compile(r'\d+ +unlink\("((?:\\x[0-9a-f]{2})+)"\) += 0')
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the writer: "write", "cut" (a truncation), "unlink", "sync" or "ack"."""

    kind: str
    path: str
    at: int = 0
    data: bytes = b""


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def read_calls(trace: Path) -> list[Call]:
    calls: list[Call] = []
    for line in trace.read_text().splitlines():
        if removed := _UNLINK.match(line):
            calls.append(Call("unlink", _bytes(removed[1]).decode()))
            continue
        found = _CALL.match(line)
        assert found, f"not understood: {line[:120]}"
        name, path, rest = found[1], found[3], found[4]
        path = _bytes(path).decode() if path.startswith("\\x") else path
        texts = [_bytes(text) for text in _TEXT.findall(rest)]
        if name == "pwrite64":
            at = int(rest.rsplit(",", 1)[1])
            assert int(found[5]) == len(texts[0]), line[-80:]
            calls.append(Call("write", path, at, texts[0]))
        elif name == "ftruncate":
            calls.append(Call("cut", path, int(rest.lstrip(", "))))
        elif name in ("fsync", "fdatasync"):
            calls.append(Call("sync", path))
        elif name == "writev":
            calls.append(Call("ack", "", data=texts[0].strip()))
        else:
            raise AssertionError(f"a call that this test does not model: {line[:120]}")
    return calls


def surviving(calls: list[Call], draw: random.Random) -> Iterator[Call]:
    """Yield what a disk may hold of these calls: the synced ones, and some of the others, some torn."""
    synced: dict[str, int] = {call.path: number for number, call in enumerate(calls) if call.kind == "sync"}
    mood = draw.random()  # from a disk that kept nearly all to one that kept nearly nothing
    for number, call in enumerate(calls):
        if call.kind not in ("write", "cut", "unlink"):
            continue
        if number < synced.get(call.path, -1) or draw.random() < mood:
            yield call
        elif call.kind == "write" and draw.random() < 0.5:
            kept = SECTOR * draw.randrange(1 + len(call.data) // SECTOR)
            yield Call("write", call.path, call.at, call.data[:kept])


def lose_power(before: Path, calls: list[Call], moment: int, place: Path, draw: random.Random) -> None:
    """Make the folder as it may be found when the power went after `moment` calls."""
    shutil.copytree(before, place)
    (place / "log.db-shm").unlink(missing_ok=True)  # memory
    for call in surviving(calls[:moment], draw):
        path = place / Path(call.path).name
        if call.kind == "unlink":
            path.unlink(missing_ok=True)
            continue
        with path.open("r+b" if path.exists() else "w+b") as file:
            if call.kind == "cut":
                file.truncate(call.at)
            else:
                file.seek(call.at)
                file.write(call.data)
    for name in {Path(call.path).name for call in calls[:moment] if call.kind == "write"}:
        folder_synced = any(call.kind == "sync" and Path(call.path).name == "log" for call in calls[:moment])
        if not (before / name).exists() and not folder_synced and draw.random() < 0.5:
            (place / name).unlink(missing_ok=True)  # its name in the folder was not synced


def cut_power(nursery: Nursery, folder: Path, job: str, times: int, *, step: int = 1) -> tuple[int, int]:
    """Record one run; try `times` disks for every `step`th moment; return how many, and acks looked for."""
    live, before, trace = folder / "log", folder / "before", folder / "trace"
    live.mkdir()
    with Ledger.create(live / "log.db", ORIGIN) as ledger:
        for name in [f"old-{n}" for n in range(253)]:
            last = ledger.append(body_of(name), event_id=name, index_columns=COLUMNS)
        last.result(30)
    outcome = nursery.run(
        job, trace=trace, content=True, meanwhile=lambda: shutil.copytree(live, before),
        path=str(live / "log.db"), names=NAMES,
    )  # fmt: skip
    assert len(outcome.acks()) >= len(NAMES), outcome
    calls, draw, checked = read_calls(trace), random.Random(job), 0
    assert sum(call.kind == "ack" for call in calls) == len(NAMES)
    for moment in range(0, len(calls) + 1, step):
        acked = [call.data.decode().split()[1:] for call in calls[:moment] if call.kind == "ack"]
        for number in range(times):
            place = folder / f"{moment}-{number}"
            lose_power(before, calls, moment, place, draw)
            report = fsck(place / "log.db", columns_of=columns_of, origin=ORIGIN)
            assert report.ok, (moment, report)
            with Ledger.open(place / "log.db") as found:
                assert found.tree_size >= 253 + len(acked)
                for name, index in acked:
                    assert found.entry(int(index)) == body_of(name), f"{name} was lost at {moment}"
                    checked += 1
            shutil.rmtree(place)
    return len(range(0, len(calls) + 1, step)) * times, checked


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as made:
        yield made


JOBS = ["append", "open_and_append"]


def tried(nursery: Nursery, folder: Path, job: str, times: int, step: int = 1) -> tuple[int, int]:
    try:
        return cut_power(nursery, folder, job, times, step=step)
    except NoTracingError as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("job", JOBS)
def test_acknowledged_entry_outlives_a_power_cut(nursery: Nursery, tmp_path: Path, job: str) -> None:
    disks, checked = tried(nursery, tmp_path, job, 1, step=8)
    assert disks > 5
    assert checked > 1


@pytest.mark.soak
@pytest.mark.parametrize("job", JOBS)
def test_acknowledged_entry_outlives_a_power_cut_at_any_moment(
    nursery: Nursery, tmp_path: Path, report: Report, job: str
) -> None:
    disks, checked = tried(nursery, tmp_path, job, 15)
    report(
        "power",
        size=f"{job.replace('_', ' ')}: {disks:,} disks, 15 for each moment between two calls",
        result=f"each log whole; {checked:,} times an acknowledged entry looked for, 0 lost",
    )

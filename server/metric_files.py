"""Metrics of several workers as one: the files in which each leaves its own, and those that the dead left.

`prometheus_client` keeps values in files when PROMETHEUS_MULTIPROC_DIR names a folder **before it is
imported**. Whoever starts the workers calls `prepare` first, which makes a folder for this start alone, and
`bury` for the workers that ended; whichever worker is asked for /metrics adds up everybody's. Counters of
workers that ended go on counting, in one file for all of them; what they said of the moment (requests in
flight) does not. Who adds up and who buries take turns, so no counter is ever seen twice, or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
FOLDER: Final = "metrics"  # of the coordinator's home; worth nothing once the server stops
DEAD: Final = 0  # in place of a process's number
_STARTED: Final = "start-"
_HELD, _TURN, _SWEPT = "held", "turn", "sweep.lock"
_FILE = re.compile(r"(counter|summary|histogram|gauge_(?:max|min|sum|mostrecent))_([1-9][0-9]*)\.db")
_OF_THE_MOMENT = re.compile(r"gauge_live\w*_([1-9][0-9]*)\.db")
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MetricFolder:
    """The folder of one start, which is this process's as long as it lives."""

    path: Path
    _held: int

    def close(self) -> None:
        """Remove it, with what is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._held)


def prepare(parent: Path, environ: MutableMapping[str, str] | None = None) -> MetricFolder:
    """Make a folder of our own below `parent`, name it in the workers' environment, and remove those of
    starts that are no more. Where none can be made there, it lies among the temporary files.
    """
    environ = os.environ if environ is None else environ
    try:
        made = _folder_in(parent)
    except OSError as error:
        _logger.warning("%s: cannot keep the workers' metrics (%s); a temporary folder does", parent, error)
        path = Path(tempfile.mkdtemp(prefix="affidavit-metrics-"))
        made = MetricFolder(path, _hold(path))
    environ[VARIABLE] = str(made.path)
    return made


def _folder_in(parent: Path) -> MetricFolder:
    parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _locked(parent / _SWEPT, fcntl.LOCK_EX):
        _sweep(parent)
        path = Path(tempfile.mkdtemp(prefix=_STARTED, dir=parent))
        try:
            return MetricFolder(path, _hold(path))
        except OSError:
            shutil.rmtree(path, ignore_errors=True)
            raise


def _sweep(parent: Path) -> None:
    for path in parent.glob("*.db"):  # an earlier release's
        path.unlink(missing_ok=True)
    for path in parent.glob(f"{_STARTED}*"):
        try:
            held = _hold(path)
        except BlockingIOError:
            continue  # its supervisor lives
        except OSError:
            held = -1
        shutil.rmtree(path, ignore_errors=True)
        if held >= 0:
            os.close(held)


def _hold(path: Path) -> int:
    held = os.open(path / _HELD, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(held)
        raise
    return held


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


def folder_of(environ: MutableMapping[str, str] | None = None) -> Path | None:
    """Return the folder of the workers' files; None where there is one worker."""
    name = (os.environ if environ is None else environ).get(VARIABLE, "")
    return Path(name) if name else None


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Read the files while nobody buries: each counter is in one of them. Without room for the lock's own
    file they are read as they are.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(_locked(folder / _TURN, fcntl.LOCK_SH))
        yield


def bury(folder: Path, pids: Collection[int]) -> bool:
    """Move what workers that ended have counted into the file of the dead, and drop what they said of the
    moment.

    Never waits. False where that has to be tried again: somebody reads, or there is no room.
    """
    for path in folder.glob("gauge_live*.db"):
        found = _OF_THE_MOMENT.fullmatch(path.name)
        if found and int(found[1]) in pids:
            path.unlink(missing_ok=True)
    try:
        with _locked(folder / _TURN, fcntl.LOCK_EX | fcntl.LOCK_NB):
            for path in sorted(folder.glob("*.db")):
                found = _FILE.fullmatch(path.name)
                if found and int(found[2]) in pids:
                    _merge(path, folder / f"{found[1]}_{DEAD}.db", found[1])
    except FileNotFoundError:
        return True  # the folder is gone; so is what was to be done
    except OSError:
        return False
    return True


def _merge(path: Path, target: Path, kind: str) -> None:
    """Add a file's values to another's; OSError, and nothing has changed, where there is no room."""
    from server.metric_room import RoomyDict, read_file

    try:
        values = read_file(target) if target.exists() else {}
        for key, (value, when) in read_file(path).items():
            values[key] = _together(kind, values[key], (value, when)) if key in values else (value, when)
    except (RuntimeError, ValueError, struct.error):
        _logger.warning("%s: cannot be read; what it counted is lost", path)
        path.unlink(missing_ok=True)
        return
    made = target.with_name(f"{target.name}.merged")
    made.unlink(missing_ok=True)
    merged = RoomyDict(str(made))
    try:
        for key, (value, when) in values.items():
            merged.write_value(key, value, when)
        if not merged.holds(values):
            raise OSError(f"{made}: no room")
        made.rename(target)
    finally:
        merged.close()  # type: ignore[no-untyped-call]  # has no types
        made.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _together(kind: str, one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    if kind == "gauge_max":
        return max(one, other)
    if kind == "gauge_min":
        return min(one, other)
    if kind == "gauge_mostrecent":
        return max(one, other, key=lambda value: value[1])
    return one[0] + other[0], 0.0


def forget_dead(folder: Path) -> None:
    """Drop what every worker that is no more said of the moment, for a start without a supervisor."""
    for path in folder.glob("gauge_live*.db"):
        found = _OF_THE_MOMENT.fullmatch(path.name)
        if found and not _lives(int(found[1])):
            path.unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

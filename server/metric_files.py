"""Metrics of several workers as one: the files in which each leaves its own, and those that the dead left.

`prometheus_client` keeps values in files when PROMETHEUS_MULTIPROC_DIR names a folder **before it is
imported**. Whoever starts the workers calls `prepare` first and `forget` for each worker that ended;
whichever worker is asked for /metrics adds up everybody's. Counters of workers that ended go on counting;
what they said of the moment (requests in flight) does not.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping
from pathlib import Path
from typing import Final

VARIABLE: Final = "PROMETHEUS_MULTIPROC_DIR"
FOLDER: Final = "metrics"  # of the coordinator's home; worth nothing once the server stops
_OF_THE_MOMENT = re.compile(r"gauge_live\w*_([1-9][0-9]*)\.db")


def prepare(folder: Path, environ: MutableMapping[str, str] | None = None) -> Path:
    """Make the folder, empty it of an earlier start's files, and name it in the workers' environment."""
    environ = os.environ if environ is None else environ
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for path in folder.glob("*.db"):
        path.unlink(missing_ok=True)
    environ[VARIABLE] = str(folder)
    return folder


def folder_of(environ: MutableMapping[str, str] | None = None) -> Path | None:
    """Return the folder of the workers' files; None where there is one worker."""
    name = (os.environ if environ is None else environ).get(VARIABLE, "")
    return Path(name) if name else None


def forget(folder: Path, pid: int) -> None:
    """Drop what a worker that ended said of the moment."""
    for path in folder.glob("gauge_live*.db"):
        found = _OF_THE_MOMENT.fullmatch(path.name)
        if found and int(found[1]) == pid:
            path.unlink(missing_ok=True)


def forget_dead(folder: Path) -> None:
    """The same for every worker that is no more, for a start without a supervisor."""
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

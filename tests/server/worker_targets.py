"""What the supervisor's tests let it start in place of a worker: a module that is imported at once."""

from __future__ import annotations

import os
import time


def _noted(log_level, settings):
    """The folder of this test: each start leaves a file there."""
    folder = settings.coordinator_home
    number = len(list(folder.glob("start-*")))
    (folder / f"start-{number:03}-{os.getpid()}").touch()
    return folder, number


def dies(settings, listener, log_level, parent, pulse):
    _noted(log_level, settings)
    raise SystemExit(3)


def dies_after_the_first(settings, listener, log_level, parent, pulse):
    folder, number = _noted(log_level, settings)
    os.write(pulse.fileno(), b"r")
    while number == 0 or (folder / "database").exists():
        if number == 0 and (folder / "kill").exists():
            raise SystemExit(3)
        time.sleep(0.01)
        os.write(pulse.fileno(), b"r")
    raise SystemExit(3)


def freezes(settings, listener, log_level, parent, pulse):
    folder, number = _noted(log_level, settings)
    if number == 0:
        os.write(pulse.fileno(), b"r")
        (folder / "frozen").touch()
        time.sleep(600)
    while os.getppid() == parent:
        os.write(pulse.fileno(), b"r")
        (folder / "second").touch()
        time.sleep(0.05)

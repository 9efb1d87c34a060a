"""Runs `affidavit` commands for the network demo, each in a fork of this process, at its own machine.

A command is what people would type, `python -m affidavit …`, with its own arguments, output and exit code;
the fork only spares it the imports, which are most of a short command's time. What stays up for long starts
anew by itself (`site join` ends in `site up`), or is started as any process.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

from audit.console import CommandError

PRELOAD: Final = (
    "typer",
    "audit.ledger",
    "audit.commands",
    "clients.commands",
    "clients.network.joining",
    "clients.reviewing",
    "federation.commands",
    "federation.coordinator",
    "federation.network.membership",
    "federation.network.submit",
    "federation.service",
    "server.commands",
)
COMMAND_S: Final = 240.0
_STOP_S: Final = 30.0

Enter = Callable[[], None]


class Started:
    """One command that runs; `enter` took it to its machine."""

    def __init__(self, arguments: Sequence[str], pid: int) -> None:
        self.arguments, self.pid = tuple(arguments), pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def wait(self, timeout_s: float) -> int:
        """Raises TimeoutError when it still runs then."""
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(" ".join(self.arguments[:2]))
            time.sleep(0.02)
        return status

    def stop(self) -> None:
        """Ask it to end, and end its whole group when it does not."""
        if self.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        try:
            self.wait(_STOP_S)
        except TimeoutError:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self.wait(_STOP_S)


class Call:
    """One short command and what it printed."""

    def __init__(self, arguments: Sequence[str], enter: Enter) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - `result` closes it
        self._err = tempfile.TemporaryFile()  # noqa: SIM115 - likewise
        self._started = start(arguments, enter, self._out, self._err)

    def result(self) -> dict[str, Any]:
        """Return the JSON document that it printed last.

        Raises:
            CommandError: it failed, or took too long.
        """
        arguments = self._started.arguments
        try:
            code = self._started.wait(COMMAND_S)
        except TimeoutError as error:
            self._started.stop()
            raise CommandError(f"affidavit {error}: took too long", code="demo.failed") from error
        with self._out, self._err:
            out, err = _text(self._out), _text(self._err)
        if code != 0:
            raise CommandError(f"affidavit {' '.join(arguments[:2])}: {err.strip()}", code="demo.failed")
        document: dict[str, Any] = json.loads(out.splitlines()[-1])
        return document


def call_all(calls: Mapping[str, Call]) -> dict[str, dict[str, Any]]:
    """Return the results of commands that run side by side."""
    return {name: call.result() for name, call in calls.items()}


def start(arguments: Sequence[str], enter: Enter, out: IO[bytes], err: IO[bytes]) -> Started:
    """Run `affidavit` with these arguments in a fork that has a process group of its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_command(list(arguments), enter, out.fileno(), err.fileno())
    return Started(arguments, pid)


def preload() -> None:
    """Import what the commands would import, and make the bundle that all of them are asked about."""
    for name in PRELOAD:
        importlib.import_module(name)
    importlib.import_module("federation.network.bundle").build_bundle()


def _be_command(arguments: list[str], enter: Enter, out: int, err: int) -> None:
    code = 1
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (out, 1), (err, 2)):
            os.dup2(source, target)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        enter()
        sys.argv = ["affidavit", *arguments]
        runpy.run_module("affidavit", run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else int(left.code is not None)
    except BaseException:  # noqa: BLE001 - a fork must never return into the demo
        sys.excepthook(*sys.exc_info())
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def last_line(path: Path) -> str:
    """Return the last line of a log, for people."""
    return " ".join(path.read_text(encoding="utf-8").strip().splitlines()[-1:])

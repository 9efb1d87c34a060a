"""Processes that answer on one port: started, watched, restarted when they die, drained when told to stop.

All share one listening socket, so a connection that waits to be accepted outlives the worker that might have
taken it. The log's database orders what they write. A worker that dies young is started again more and more
slowly; when none ever becomes ready the supervisor gives up. On SIGTERM a worker turns unready first, goes on
for `drain_s`, and then finishes what it has; what is not acknowledged by then was not answered.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, Final

import uvicorn

from server import logs, metric_files
from server.settings import Settings
from server.wire import GatheringProtocol

_logger = logging.getLogger(__name__)

_YOUNG_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 15.0
_GIVE_UP_AFTER: Final = 6  # starts in a row of which none lived
_TURN_S: Final = 0.1
_LATE_S: Final = 10.0  # beyond its own limits, before a worker is killed


class DrainingServer(uvicorn.Server):
    """A uvicorn server that turns unready before it stops."""

    def __init__(self, config: uvicorn.Config, on_drain: Callable[[], None], drain_s: float) -> None:
        super().__init__(config)
        self._on_drain, self._drain_s = on_drain, drain_s
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal; stop at the second."""
        if self._draining or self._drain_s <= 0 or sig != signal.SIGTERM:
            self._on_drain()
            super().handle_exit(sig, frame)
            return
        self._draining = True
        self._on_drain()
        timer = threading.Timer(self._drain_s, super().handle_exit, (sig, frame))
        timer.daemon = True
        timer.start()


def run_worker(settings: Settings, listener: socket.socket, log_level: str) -> None:
    """Serve on `listener` until told to stop."""
    from server.app import create_app

    app = create_app(settings)

    def on_drain() -> None:
        context = getattr(app.state, "context", None)
        if context is not None:
            context.readiness.state = "draining"

    config = uvicorn.Config(
        app,
        log_config=None,
        log_level=log_level,
        access_log=False,
        proxy_headers=False,  # or a header would say who the peer is, whom `mtls_trusted_proxies` believes
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(settings.request_timeout_s) + 1,
        server_header=False,
        ws="none",
        http=GatheringProtocol,
        backlog=1024,
    )
    DrainingServer(config, on_drain, settings.drain_s).run(sockets=[listener])


def _spawned(settings: Settings, listener: socket.socket, log_level: str, parent: int) -> None:
    logs.configure(settings.log_format, log_level.upper())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the supervisor decides
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    run_worker(settings, listener, log_level)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


class Supervisor:
    """Keeps `settings.workers` workers alive until SIGTERM or SIGINT."""

    def __init__(self, settings: Settings, listener: socket.socket, log_level: str) -> None:
        self._settings, self._listener, self._log_level = settings, listener, log_level
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, tuple[SpawnProcess, float]] = {}  # slot -> process, when it started
        self._due: dict[int, float] = dict.fromkeys(range(settings.workers), 0.0)  # slot -> start then
        self._young_deaths = 0
        self._stopping = threading.Event()

    def run(self) -> int:
        """Return the exit code: 0 stopped, 1 no worker could be kept alive."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        folder = metric_files.folder_of()
        while not self._stopping.is_set() and self._young_deaths < _GIVE_UP_AFTER:
            now = time.monotonic()
            for slot, due in list(self._due.items()):
                if due <= now:
                    del self._due[slot]
                    self._workers[slot] = (self._start(), now)
            sentinels = {process.sentinel: slot for slot, (process, _) in self._workers.items()}
            for sentinel in wait(list(sentinels), timeout=_TURN_S):
                self._bury(sentinels[int(sentinel)], folder)  # type: ignore[arg-type] # sentinels are integers
            if any(time.monotonic() - begun > _YOUNG_S for _, begun in self._workers.values()):
                self._young_deaths = 0
        self._end()
        return 0 if self._stopping.is_set() else 1

    def _start(self) -> SpawnProcess:
        process = self._context.Process(
            target=_spawned,
            args=(self._settings, self._listener, self._log_level, os.getpid()),
            name="affidavit-worker",
        )
        process.start()
        return process

    def _bury(self, slot: int, folder: Any) -> None:
        process, begun = self._workers.pop(slot)
        process.join()
        lived_s = time.monotonic() - begun
        _logger.error("worker %s ended with %s after %.1f s", process.pid, process.exitcode, lived_s)
        if folder is not None and process.pid is not None:
            metric_files.forget(folder, process.pid)
        if lived_s < _YOUNG_S:
            self._young_deaths += (
                process.exitcode != -signal.SIGKILL
            )  # killed from outside says nothing of us
            pause_s = min(_FIRST_PAUSE_S * 2**self._young_deaths, _LONGEST_PAUSE_S)
        else:
            pause_s = 0.0
        self._due[slot] = time.monotonic() + pause_s

    def _end(self) -> None:
        limit_s = self._settings.drain_s + self._settings.request_timeout_s + _LATE_S
        until = time.monotonic() + limit_s
        for process, _ in self._workers.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process, _ in self._workers.values():
            process.join(max(until - time.monotonic(), 0.1))
            if process.is_alive():
                _logger.error("worker %s does not end; it is killed", process.pid)
                process.kill()
                process.join()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()

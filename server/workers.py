"""Processes that answer on one port: started, watched, restarted when they die, drained when told to stop.

All share one listening socket, so a connection that waits to be accepted outlives the worker that might have
taken it. The log's database orders what they write. A worker's event loop says each second that it runs; one
that falls silent is killed, and with it go the locks that it held. A worker that dies young is started again
more and more slowly, up to a bound; only where none was ever ready does the supervisor give up, so an outage
of the database, however long, ends with it. On SIGTERM a worker turns unready first, goes on for `drain_s`,
and then finishes what it has; what is not acknowledged by then was not answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType
from typing import Final

import uvicorn

from server import logs, metric_files
from server.errors import ServerError
from server.settings import Settings
from server.wire import Limits, protocol_within

_logger = logging.getLogger(__name__)

_YOUNG_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 15.0
_GIVE_UP_AFTER: Final = 6  # starts of which none was ever ready
_TURN_S: Final = 0.1
_SLEPT_S: Final = 1.0  # a turn of the supervisor that takes longer was not its own: the machine stood still
_STARTING: Final = b"s"
_READY: Final = b"r"
_START_S: Final = 600.0  # until a worker is ready
_COLLECT: Final = (10_000, 20, 20)  # a request makes hundreds of objects and leaves none behind
_BURY_AGAIN_S: Final = 1.0
_LATE_S: Final = 10.0  # beyond its own limits, before a worker is killed


class DrainingServer(uvicorn.Server):
    """A uvicorn server that turns unready before it stops, and says each second that its loop runs."""

    def __init__(
        self,
        config: uvicorn.Config,
        on_drain: Callable[[], None],
        drain_s: float,
        beat: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(config)
        self._on_drain, self._drain_s, self._beat = on_drain, drain_s, beat
        self._draining = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections; what the start left in memory stays, and is not looked through again."""
        await super().startup(sockets)
        gc.collect()
        gc.set_threshold(*_COLLECT)
        gc.freeze()  # else the collector stops every request for tens of milliseconds, now and then

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second, from the moment on which it takes connections."""
        if self._beat is not None and counter % 10 == 0:
            self._beat()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish what is under way; the loop runs meanwhile, and says so."""
        beating = asyncio.create_task(self._keep_beating())
        try:
            await super().shutdown(sockets)
        finally:
            beating.cancel()

    async def _keep_beating(self) -> None:
        while self._beat is not None:
            self._beat()
            await asyncio.sleep(1)

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


def limits_of(settings: Settings, refused: Callable[[str], None]) -> Limits:
    """What connections may cost a worker; each is a file, of which the log's databases need some too."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = settings.max_connections if files == resource.RLIM_INFINITY else files * 3 // 4
    return Limits(
        header_bytes=settings.max_header_bytes,
        header_s=settings.header_timeout_s,
        raw_body_bytes=8 * settings.max_body_bytes + settings.max_header_bytes,
        connections=min(settings.max_connections, room),
        refused=refused,
    )


def run_worker(
    settings: Settings, listener: socket.socket, log_level: str, beat: Callable[[], None] | None = None
) -> None:
    """Serve on `listener` until told to stop; `beat` is called each second while the event loop runs.

    Raises:
        Exception: what kept the application from starting.
    """
    from server.app import create_app

    app = create_app(settings)

    def on_drain() -> None:
        context = getattr(app.state, "context", None)
        if context is not None:
            context.readiness.state = "draining"

    def count_refusal(reason: str) -> None:
        context = getattr(app.state, "context", None)
        if context is not None:
            context.monitoring.shed.labels(reason).inc()

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
        http=protocol_within(limits_of(settings, count_refusal)),
        backlog=1024,
    )
    serving = DrainingServer(config, on_drain, settings.drain_s, beat)
    serving.run(sockets=[listener])
    if not serving.started:
        raise getattr(app.state, "start_error", None) or ServerError("the server did not start")


@contextmanager
def stopping_gently() -> Iterator[None]:
    """Let SIGTERM end this process with 0 once what is under way is done, and let SIGHUP do the same, unless
    whoever started us had it ignored (`nohup`).
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, _end_well)
    if before[signal.SIGHUP] is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _hang_up)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_well(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)  # uvicorn raises the signal again when it has finished


def _hang_up(number: int, frame: FrameType | None) -> None:
    _logger.warning("SIGHUP: the server stops, as at SIGTERM")
    signal.raise_signal(signal.SIGTERM)


def _spawned(
    settings: Settings, listener: socket.socket, log_level: str, parent: int, pulse: Connection
) -> None:
    logs.configure(settings.log_format, log_level.upper())
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the supervisor decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.set_blocking(pulse.fileno(), False)  # a supervisor that does not listen keeps nobody waiting
    ready = threading.Event()

    def starting() -> None:
        while not ready.wait(1):
            _say(pulse, _STARTING)

    def beat() -> None:
        ready.set()
        _say(pulse, _READY)

    threading.Thread(target=starting, daemon=True).start()
    try:
        run_worker(settings, listener, log_level, beat)
    except Exception as error:
        code = getattr(error, "code", type(error).__name__)
        _logger.error("worker %d cannot start: %s: %s", os.getpid(), code, error)
        raise SystemExit(1) from error


def _say(pulse: Connection, word: bytes) -> None:
    with contextlib.suppress(OSError):
        os.write(pulse.fileno(), word)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    pulse: Connection
    begun: float
    heard: float
    ready: float | None = None  # when its event loop was heard first


class Supervisor:
    """Keeps `settings.workers` workers alive until SIGTERM or SIGINT."""

    def __init__(
        self,
        settings: Settings,
        listener: socket.socket,
        log_level: str,
        target: Callable[..., None] = _spawned,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._listener, self._log_level = settings, listener, log_level
        self._target, self._monotonic = target, monotonic
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}  # by slot
        self._due: dict[int, float] = dict.fromkeys(range(settings.workers), 0.0)  # slot -> start then
        self._young_deaths: dict[int, int] = dict.fromkeys(self._due, 0)  # slot -> in a row
        self._was_ready = False
        self._looked = monotonic()
        self._ended: set[int] = set()  # workers whose metrics are not with those of the dead yet
        self._bury_again = 0.0
        self._stopping = threading.Event()

    def run(self) -> int:
        """Return the exit code: 0 stopped, 1 no worker ever became ready."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        folder = metric_files.folder_of()
        while not self._stopping.is_set() and not self._is_hopeless():
            now = self._monotonic()
            for slot, due in list(self._due.items()):
                if due <= now:
                    self._start(slot)
            pulses = [worker.pulse for worker in self._workers.values() if not worker.pulse.closed]
            ends = [worker.process.sentinel for worker in self._workers.values()]
            found = set(wait([*pulses, *ends], timeout=_TURN_S))
            for slot, worker in list(self._workers.items()):
                if worker.pulse in found:
                    self._hear(worker)
                if worker.process.sentinel in found:
                    self._bury(slot, folder)
            self._look()
            self._keep_metrics(folder)
        self._end()
        return 0 if self._stopping.is_set() else 1

    def _is_hopeless(self) -> bool:
        return not self._was_ready and sum(self._young_deaths.values()) >= _GIVE_UP_AFTER

    def _start(self, slot: int) -> None:
        pulse, its_end = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=self._target,
            args=(self._settings, self._listener, self._log_level, os.getpid(), its_end),
            name="affidavit-worker",
        )
        now = self._monotonic()
        try:
            process.start()
        except OSError as error:  # no memory, no room for another process: it may pass
            _logger.error("a worker cannot be started: %s", error)
            pulse.close()
            self._due[slot] = now + _LONGEST_PAUSE_S
            return
        finally:
            its_end.close()
        del self._due[slot]
        self._workers[slot] = _Worker(process, pulse, begun=now, heard=now)

    def _hear(self, worker: _Worker) -> None:
        said = os.read(worker.pulse.fileno(), 4_096)
        if not said:  # the other end is gone; its process ends too
            worker.pulse.close()
            return
        worker.heard = self._monotonic()
        if worker.ready is None and _READY in said:
            worker.ready, self._was_ready = worker.heard, True

    def _look(self) -> None:
        """Count who has lived; kill who fell silent, or does not become ready.

        Silence is counted while this process runs: where it was stopped itself, its workers probably were
        too, and what they said meanwhile is not read yet.
        """
        now = self._monotonic()
        slept_s, self._looked = now - self._looked, now
        for slot, worker in self._workers.items():
            if slept_s > _SLEPT_S:
                worker.heard, worker.begun = min(worker.heard + slept_s, now), worker.begun + slept_s
            if worker.ready is not None and now - worker.ready > _YOUNG_S:
                self._young_deaths[slot] = 0
            silent_s = now - worker.heard
            is_late = worker.ready is None and now - worker.begun > _START_S
            if (is_late or silent_s > self._settings.worker_silence_s) and worker.process.is_alive():
                what = "is not ready yet" if is_late else f"was silent for {silent_s:.1f} s"
                _logger.error("worker %s %s; it is killed", worker.process.pid, what)
                worker.process.kill()

    def _bury(self, slot: int, folder: Path | None) -> None:
        worker = self._workers.pop(slot)
        process, now = worker.process, self._monotonic()
        process.join()
        worker.pulse.close()
        _logger.error(
            "worker %s ended with %s after %.1f s", process.pid, process.exitcode, now - worker.begun
        )
        if folder is not None and process.pid is not None:
            self._ended.add(process.pid)
        if worker.ready is not None and now - worker.ready > _YOUNG_S:
            self._due[slot] = now
            return
        if process.exitcode != -signal.SIGKILL:  # killed from outside says nothing of us
            self._young_deaths[slot] += 1
        self._due[slot] = now + min(_FIRST_PAUSE_S * 2 ** self._young_deaths[slot], _LONGEST_PAUSE_S)

    def _keep_metrics(self, folder: Path | None) -> None:
        """Put what ended workers counted together, in one file however many there were."""
        if folder is None or not self._ended or self._monotonic() < self._bury_again:
            return
        alive = {worker.process.pid for worker in self._workers.values()}  # a number may come again
        if metric_files.bury(folder, self._ended - alive):
            self._ended.clear()
        else:
            self._bury_again = self._monotonic() + _BURY_AGAIN_S

    def _end(self) -> None:
        limit_s = self._settings.drain_s + self._settings.request_timeout_s + _LATE_S
        until = self._monotonic() + limit_s
        processes = [worker.process for worker in self._workers.values()]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in processes:
            process.join(max(until - self._monotonic(), 0.1))
            if process.is_alive():
                _logger.error("worker %s does not end; it is killed", process.pid)
                process.kill()
                process.join()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping.set()

"""Processes that belong together: started in their order, restarted with back-off, stopped in one go.

Each is the leader of a process group of its own, so that what it starts goes with it; and each dies with the
supervisor even when that is killed. Output goes to one file a process, kept between restarts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final

from federation.network.errors import ProcessError

MAX_LOG_BYTES: Final = 16 << 20
STOP_S: Final = 10.0

_PR_SET_PDEATHSIG: Final = 1
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One process: how to start it, and how to see that it serves."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] | None = None
    begin: Callable[[], bool] | None = None  # started only once this says so
    after: tuple[str, ...] | None = None  # started once these are ready; None: all that come before it
    backoff_s: tuple[float, float] = (0.5, 15.0)  # first, longest


@dataclass(frozen=True, slots=True, kw_only=True)
class PartEvent:
    """`kind` is started, ready, exited, waiting or stopped."""

    kind: str
    name: str
    pid: int = 0
    status: int | None = None
    wait_s: float = 0.0


@dataclass(slots=True)
class _Running:
    part: Part
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    due: float = 0.0
    wait_s: float = 0.0
    is_ready: bool = False
    told_waiting: bool = False
    restart: bool = False


class Supervisor:
    """Runs parts until `stop` is called or a signal comes."""

    def __init__(
        self,
        parts: Sequence[Part],
        logs: Path,
        *,
        on_event: Callable[[PartEvent], None] = lambda event: None,
        tick: Callable[[], None] | None = None,
    ) -> None:
        self._running = {part.name: _Running(part, wait_s=part.backoff_s[0]) for part in parts}
        self._logs, self._on_event, self._tick = logs, on_event, tick
        self._stopping = threading.Event()

    def stop(self) -> None:
        """End `run` soon; safe in a signal handler."""
        self._stopping.set()

    def restart(self, name: str) -> None:
        """Stop one part and start it at once, with the files it finds now."""
        self._running[name].restart = True

    @property
    def all_ready(self) -> bool:
        return all(running.is_ready for running in self._running.values())

    def pids(self) -> dict[str, int]:
        return {
            name: running.process.pid
            for name, running in self._running.items()
            if running.process is not None
        }

    def run(self) -> None:
        """Start the parts, each when those it comes after are ready, and keep them up.

        Raises:
            ProcessError: the folder of logs cannot be used, or a command does not exist.
        """
        self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            while not self._stopping.is_set():
                self._step()
                if self._tick is not None:
                    self._tick()
                self._stopping.wait(_POLL_S)
        finally:
            self._end()

    def install_signals(self) -> None:
        """Let SIGTERM and SIGINT stop the supervisor (main thread only)."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self.stop())

    def _step(self) -> None:
        now = time.monotonic()
        before: list[str] = []
        for running in self._running.values():
            part = running.part
            needed = tuple(before) if part.after is None else part.after
            before.append(part.name)
            if running.restart:
                running.restart = False
                self._terminate(running)
                running.due = 0.0
            if running.process is None:
                if now < running.due or not all(self._holds_nobody_up(name) for name in needed):
                    continue
                if part.begin is not None and not part.begin():
                    if not running.told_waiting:
                        running.told_waiting = True
                        self._on_event(PartEvent(kind="waiting", name=part.name))
                    continue
                self._start(running)
            status = running.process.poll() if running.process is not None else None
            if status is not None:
                self._exited(running, status, now)
            elif not running.is_ready and (part.ready is None or part.ready()):
                running.is_ready = True
                pid = running.process.pid if running.process is not None else 0
                self._on_event(PartEvent(kind="ready", name=part.name, pid=pid))

    def _holds_nobody_up(self, name: str) -> bool:
        """Whether those that come after it may start: it is ready, or waits for people."""
        running = self._running[name]
        return running.is_ready or (running.process is None and running.told_waiting)

    def _start(self, running: _Running) -> None:
        part = running.part
        with self._log(part.name) as log:
            try:
                running.process = subprocess.Popen(
                    list(part.command),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **part.environment},
                    start_new_session=True,
                    preexec_fn=_begin_child,
                )
            except OSError as error:
                raise ProcessError(
                    f"{part.name}: cannot start {part.command[0]}: {error.strerror}"
                ) from error
        running.started, running.is_ready = time.monotonic(), False
        self._on_event(PartEvent(kind="started", name=part.name, pid=running.process.pid))

    def _exited(self, running: _Running, status: int, now: float) -> None:
        if running.process is not None:
            _signal_group(running.process, signal.SIGKILL)
        first, longest = running.part.backoff_s
        running.wait_s = first if now - running.started > 60 else min(running.wait_s * 2, longest)
        running.due = now + running.wait_s
        running.process, running.is_ready = None, False
        self._on_event(PartEvent(kind="exited", name=running.part.name, status=status, wait_s=running.wait_s))

    def _terminate(self, running: _Running) -> None:
        process = running.process
        if process is None:
            return
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=STOP_S)
        _signal_group(process, signal.SIGKILL)
        process.wait()
        running.process, running.is_ready = None, False
        self._on_event(PartEvent(kind="stopped", name=running.part.name, pid=process.pid))

    def _end(self) -> None:
        """Tell all to stop at once, the last started first, then wait for each."""
        for running in reversed(self._running.values()):
            if running.process is not None:
                _signal_group(running.process, signal.SIGTERM)
        for running in reversed(self._running.values()):
            self._terminate(running)

    def _log(self, name: str) -> IO[bytes]:
        path = self._logs / f"{name}.log"
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            os.replace(path, path.with_suffix(".log.1"))
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return os.fdopen(descriptor, "ab")


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


_libc: Final = ctypes.CDLL(None, use_errno=True)


def _begin_child() -> None:
    """In the child: die with the supervisor, and leave no core dump, whose memory may hold keys."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

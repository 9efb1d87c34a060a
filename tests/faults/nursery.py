"""Processes to break: one Python that has everything imported forks a child for each job.

A child prepares, waits, and goes on when it is told to; meanwhile strace may take hold of it, or afterwards
SIGKILL find it at a random moment. Forking costs milliseconds, importing would cost a second.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

WRITES: Final = ("pwrite64", "fdatasync", "fsync", "ftruncate", "unlink", "write", "rename", "link")
_PR_SET_PTRACER: Final = 0x59616D61


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: what it said, and by which signal (0: it ended by itself)."""

    said: tuple[str, ...]
    signal: int

    def acks(self) -> list[str]:
        return [line.removeprefix("ack ") for line in self.said if line.startswith("ack ")]

    def raw(self) -> list[str]:
        return [line for line in self.said if line.startswith("raw ")]


class NoTracingError(Exception):
    """This machine lets nobody trace a process, or has no strace; the message says which."""


class Nursery:
    """The process that forks; use as a context."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.nursery"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(30)

    def run(
        self, job: str, *, inject: str = "", trace: Path | None = None, content: bool = False,
        kill_after: tuple[int, float] | None = None, meanwhile: Callable[[], object] | None = None,
        **arguments: Any,
    ) -> Outcome:  # fmt: skip
        """Run a job to its end.

        Args:
            inject: strace's words for a fault. trace: where to write the calls, with what was written if
            `content`. kill_after: kill it so many lines and seconds after it goes on. meanwhile: called when
            the job is prepared and waits.
        """
        started = self._ask({"job": job, "arguments": arguments})
        pid, early = started["pid"], started["early"]
        if early:  # it ended before it was ready
            return Outcome(tuple(early["said"]), early["signal"])
        if meanwhile is not None:
            meanwhile()
        with attached(pid, inject, trace, content=content) if inject or trace else _nobody():
            done = self._ask({"kill_after": kill_after})
        return Outcome(tuple(done["said"]), done["signal"])

    def count(self, job: str, trace: Path, **arguments: Any) -> Counter[str]:
        """Return how often each system call that writes occurs in a job, in the thread that makes most."""
        outcome = self.run(job, trace=trace, **arguments)
        assert not outcome.raw(), outcome
        threads: dict[str, Counter[str]] = {}
        for line in trace.read_text().splitlines():
            found = re.match(r"(\d+) +(\w+)\(", line)
            if found:
                threads.setdefault(found[1], Counter())[found[2]] += 1
        most: Counter[str] = Counter()
        for counted in threads.values():
            most |= counted
        return most

    def _ask(self, message: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


@contextmanager
def _nobody() -> Iterator[None]:
    yield


@contextmanager
def attached(pid: int, inject: str, trace: Path | None, *, content: bool = False) -> Iterator[None]:
    """Trace every thread of a process, and those it starts.

    Raises:
        NoTracingError: it cannot be traced.
    """
    strace = shutil.which("strace")
    if strace is None:
        raise NoTracingError("strace is not installed; it breaks the system calls")
    calls = ",".join(WRITES) + ",writev" * content
    command = [strace, "-f", "-qq", "-p", str(pid), "-e", f"trace={calls}"]
    command += ["-y", "-xx", "-s", "1000000"] if content else []
    command += ["-o", str(trace or os.devnull)] + (["-e", f"inject={inject}"] if inject else [])
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 20
        while not _is_traced(pid):
            if tracer.poll() is not None or time.monotonic() > deadline:
                tracer.kill()
                assert tracer.stderr is not None
                raise NoTracingError(f"strace cannot attach: {tracer.stderr.read().strip()[:200]}")
            time.sleep(0.001)
        yield
    finally:
        if tracer.poll() is None:
            try:
                tracer.wait(20)
            except subprocess.TimeoutExpired:
                tracer.kill()
                tracer.wait()
        assert tracer.stderr is not None
        tracer.stderr.close()


def _is_traced(pid: int) -> bool:
    for task in Path(f"/proc/{pid}/task").iterdir():
        if "\nTracerPid:\t0\n" in (task / "status").read_text():
            return False
    return True


def serve() -> None:
    """The nursery's own side: fork, prepare, tell, wait, report."""
    from tests.faults import jobs

    libc = ctypes.CDLL(None)
    for line in sys.stdin:
        asked = json.loads(line)
        out_read, out_write = os.pipe()
        go_read, go_write = os.pipe()
        ready_read, ready_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            for descriptor in (0, 1, out_read, go_write, ready_read):
                os.close(descriptor)
            libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)  # strace is not our parent

            jobs.run(asked["job"], asked["arguments"], out_write, partial(_wait, ready_write, go_read))
            os._exit(0)
        for descriptor in (out_write, go_read, ready_write):
            os.close(descriptor)
        early = None if os.read(ready_read, 1) else _ended(pid, out_read)
        _tell({"pid": pid, "early": early})
        if early is None:
            kill_after = json.loads(sys.stdin.readline())["kill_after"]
            os.write(go_write, b"g")
            heard = b""
            if kill_after is not None:
                heard = _heard(out_read, kill_after[0])
                time.sleep(kill_after[1])
                os.kill(pid, signal.SIGKILL)
            _tell(_ended(pid, out_read, heard))
        for descriptor in (out_read, go_write, ready_read):
            os.close(descriptor)


def _wait(ready: int, go: int) -> None:
    os.writev(ready, [b"r"])
    os.read(go, 1)


def _heard(out: int, lines: int) -> bytes:
    """Read until so many lines were said, or no more come."""
    said = b""
    while said.count(b"\n") < lines and (more := os.read(out, 1 << 16)):
        said += more
    return said


def _ended(pid: int, out: int, heard: bytes = b"") -> dict[str, Any]:
    said = bytearray(heard)
    while more := os.read(out, 1 << 16):
        said += more
    _, status = os.waitpid(pid, 0)
    whole = said[: said.rfind(b"\n") + 1].decode()
    return {"said": whole.splitlines(), "signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}


def _tell(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def every(counted: Counter[str], kinds: Sequence[str]) -> Iterator[str]:
    """Yield an injection for every kind of fault at every occurrence."""
    for call in WRITES:
        for number in range(1, counted[call] + 1):
            for kind in kinds:
                yield f"{call}:{kind}:when={number}"


if __name__ == "__main__":
    serve()

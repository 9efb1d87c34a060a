"""The relay kept warm: one process that has Flower imported, and a fork of it for each message.

Flower's SuperNode starts `flwr-clientapp` by PATH for every message, and importing Flower is nearly all that
such a process does. `write_stub` puts a script of that name first in the SuperNode's PATH; it hands its
arguments to this process, which forks, and it ends with the fork's status. The fork runs what a cold start
would have run; where nobody listens the stub starts that itself. A fork ends when its stub does.

This process holds no data, no key and no model, and runs no bundle's code itself.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import random
import selectors
import shlex
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

STUB: Final = "flwr-clientapp"
PRELOAD: Final = (
    "flwr.supernode.runtime.run_clientapp",
    "flwr.supernode.cli.flwr_clientapp",
    "flwr.clientapp",
    "flwr.app",
)
KEPT_ENVIRONMENT: Final = (
    "PATH", "LANG", "FLWR_HOME", "FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION",
)  # fmt: skip
MAX_REQUEST_BYTES: Final = 1 << 16

_STUB_TEXT: Final = """\
#!/bin/sh
# Made by affidavit: hands a message's process over to the warm relay, or starts it cold.
exec {python} -I -S {client} {socket} {cold} "$@"
"""
_CLIENT_TEXT: Final = """\
import json, os, signal, socket, sys
target, cold, arguments = sys.argv[1], sys.argv[2], sys.argv[3:]
link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
try:
    link.connect(target)
    link.sendall(json.dumps(arguments).encode() + b"\\n")
except OSError:
    os.execv(cold, [cold, *arguments])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
status = link.recv(16)
sys.exit(int(status) if status else 1)
"""


def write_stub(folder: Path, socket_path: Path, cold: Path) -> Path:
    """Write the stub into `folder`, which belongs first in the SuperNode's PATH; return its path."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    client = folder / "hand_over.py"
    client.write_text(_CLIENT_TEXT, encoding="utf-8")
    stub = folder / STUB
    names: dict[str, str | Path] = {
        "python": sys.executable,
        "client": client,
        "socket": socket_path,
        "cold": cold,
    }
    stub.write_text(
        _STUB_TEXT.format(**{key: shlex.quote(str(Path(value).absolute())) for key, value in names.items()}),
        encoding="utf-8",
    )
    stub.chmod(0o700)
    return stub


class WarmRelay:
    """Listens on a Unix socket; `start` runs in each fork and gets the arguments of its message."""

    def __init__(self, path: Path, start: Callable[[list[str]], None]) -> None:
        self._path, self._start = path, start
        self._selector = selectors.DefaultSelector()
        self._forks: dict[int, tuple[int, socket.socket]] = {}  # pidfd -> pid, stub
        self._stubs: dict[int, int] = {}  # the stub's descriptor -> pidfd
        self._stopping = False

    def serve(self) -> None:
        """Answer until SIGTERM or SIGINT."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            listener.bind(str(self._path))
        finally:
            os.umask(before)
        listener.listen(32)
        self._selector.register(listener, selectors.EVENT_READ)
        try:
            while not self._stopping:
                for key, _ in self._selector.select(timeout=1.0):
                    if key.fileobj is listener:
                        self._accept(listener)
                    elif isinstance(key.fileobj, int):
                        self._ended(key.fileobj)
                    else:
                        self._left(key.fd)
        finally:
            self._path.unlink(missing_ok=True)
            for pid, _ in self._forks.values():
                _kill(pid)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _accept(self, listener: socket.socket) -> None:
        stub, _ = listener.accept()
        stub.settimeout(5.0)
        try:
            arguments = _arguments(stub)
        except (OSError, ValueError):
            stub.close()
            return
        pid = os.fork()
        if pid == 0:
            self._be_fork(listener, arguments)
        pidfd = os.pidfd_open(pid)
        self._forks[pidfd], self._stubs[stub.fileno()] = (pid, stub), pidfd
        self._selector.register(pidfd, selectors.EVENT_READ)
        self._selector.register(stub, selectors.EVENT_READ)

    def _be_fork(self, listener: socket.socket, arguments: list[str]) -> None:
        status = 1
        try:
            listener.close()
            self._selector.close()
            for _, other in self._forks.values():
                other.close()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(
                    number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler
                )
            random.seed()
            numpy: Any = sys.modules.get("numpy")
            if numpy is not None:
                numpy.random.seed()
            self._start(arguments)
            status = 0
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:  # noqa: BLE001 - a fork must never return into the server's loop
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(Exception):
                importlib.import_module("atexit")._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status & 0xFF)

    def _ended(self, pidfd: int) -> None:
        pid, stub = self._forks.pop(pidfd)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        _, status = os.waitpid(pid, 0)
        self._forget(stub)
        with contextlib.suppress(OSError):
            stub.sendall(str(os.waitstatus_to_exitcode(status) & 0xFF).encode())
        stub.close()

    def _left(self, descriptor: int) -> None:
        """The stub is gone: its fork has nobody left to work for."""
        pidfd = self._stubs.get(descriptor)
        if pidfd is None:
            return
        pid, stub = self._forks[pidfd]
        self._forget(stub)
        _kill(pid)

    def _forget(self, stub: socket.socket) -> None:
        if self._stubs.pop(stub.fileno(), None) is not None:
            self._selector.unregister(stub)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def _arguments(stub: socket.socket) -> list[str]:
    data = b""
    while not data.endswith(b"\n"):
        part = stub.recv(4096)
        if not part or len(data) > MAX_REQUEST_BYTES:
            raise ValueError("no request")
        data += part
    found = json.loads(data)
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError("a request is a list of arguments")
    return found


def flower_itself(arguments: list[str]) -> None:
    """Run Flower's own `flwr-clientapp`, in a process whose packages are none of ours."""
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    root = str(Path(__file__).resolve().parents[2])
    sys.path[:] = [entry for entry in sys.path if entry != root or "site-packages" in root]
    for name in [
        name for name in sys.modules if name.partition(".")[0] in ("audit", "clients", "federation")
    ]:
        del sys.modules[name]
    sys.argv = [STUB, *arguments]
    flwr_clientapp()


def confined(options: list[str]) -> Callable[[list[str]], None]:
    """Return what runs a message's bundle under `clients.launcher`: only if approved, and confined."""
    launcher = importlib.import_module("clients.launcher")

    def start(arguments: list[str]) -> None:
        launcher.main([*options, "--", *arguments])

    return start


def main() -> None:
    parser = argparse.ArgumentParser(prog="affidavit-relay")
    parser.add_argument("socket", type=Path)
    for name in ("--agent", "--site", "--scratch"):
        parser.add_argument(name, required=True)
    given = parser.parse_args()
    Path(given.scratch).mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
    os.environ.clear()
    os.environ.update(kept)
    for name in PRELOAD:
        importlib.import_module(name)
    start: Callable[[list[str]], None] = flower_itself
    if importlib.util.find_spec("clients.launcher") is not None:
        options = ["--agent", given.agent, "--site", given.site, "--scratch", given.scratch]
        start = confined(options)
    os.environ["AFFIDAVIT_AGENT"] = given.agent
    WarmRelay(given.socket, start).serve()


if __name__ == "__main__":
    main()

"""The agent behind a Unix socket: the same calls and bytes as in-process, from a relay in another process.

The folder of sockets belongs to the site's user alone (mode 0700); whoever may open a socket may speak to
the agent, which trusts no relay in any case. One request a connection: a line of JSON that gives kind and
sizes, then the bytes.
"""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from clients.errors import LinkError
from clients.link import MAX_BLOB_BYTES, MAX_HEADER_BYTES, AgentLink

_logger = logging.getLogger(__name__)

MAX_HEAD_BYTES: Final = 1 << 16
MAX_BLOBS: Final = 8
ANSWER_TIMEOUT_S: Final = 600.0
READ_TIMEOUT_S: Final = 30.0


class SocketLink:
    """The relay's end."""

    def __init__(self, folder: str, site: str) -> None:
        self._path = Path(folder) / f"{site}.sock"

    def handle(self, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
        """Ask the agent.

        Raises:
            LinkError: nobody listens, or the answer is malformed or late.
        """
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(ANSWER_TIMEOUT_S)
            try:
                connection.connect(str(self._path))
                _send(connection, kind, header, blobs)
                _, answer, answer_blobs = _receive(connection)
            except OSError as error:
                raise LinkError(f"no answer from the agent at {self._path}: {error}") from error
        return answer, answer_blobs


@contextmanager
def served_agents(folder: Path, agents: Mapping[str, AgentLink]) -> Iterator[None]:
    """Listen on `<folder>/<site>.sock` for each agent for the time of the block.

    Raises:
        LinkError: a socket cannot be made there.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    listeners: list[tuple[socket.socket, threading.Thread]] = []
    try:
        for site, agent in agents.items():
            path = folder / f"{site}.sock"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listener.bind(str(path))
                listener.listen(16)
            except OSError as error:
                listener.close()
                raise LinkError(f"cannot listen on {path}: {error}") from error
            thread = threading.Thread(
                target=_serve, args=(listener, agent), name=f"agent-{site}", daemon=True
            )
            thread.start()
            listeners.append((listener, thread))
        yield
    finally:
        for listener, thread in listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(timeout=5)
        for site in agents:
            (folder / f"{site}.sock").unlink(missing_ok=True)


def _serve(listener: socket.socket, agent: AgentLink) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # the listener was closed
        with connection:
            connection.settimeout(READ_TIMEOUT_S)
            try:
                kind, header, blobs = _receive(connection)
                answer, answer_blobs = agent.handle(kind, header, blobs)
                _send(connection, "answer", answer, answer_blobs)
            except (OSError, LinkError) as error:
                _logger.warning("a relay's connection failed: %s", error)


def _send(connection: socket.socket, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> None:
    head = {"kind": kind, "header": len(header), "blobs": {name: len(blob) for name, blob in blobs.items()}}
    connection.sendall(json.dumps(head).encode() + b"\n" + header)
    for blob in blobs.values():
        connection.sendall(blob)


def _receive(connection: socket.socket) -> tuple[str, bytes, dict[str, bytes]]:
    with connection.makefile("rb") as stream:
        line = stream.readline(MAX_HEAD_BYTES)
        kind, size, sizes = _head(line)
        header = _exactly(stream, size)
        return kind, header, {name: _exactly(stream, length) for name, length in sizes.items()}


def _head(line: bytes) -> tuple[str, int, dict[str, int]]:
    try:
        head = json.loads(line)
        kind, size, sizes = head["kind"], head["header"], head["blobs"]
        fits = (
            isinstance(kind, str)
            and type(size) is int
            and 0 <= size <= MAX_HEADER_BYTES
            and len(sizes) <= MAX_BLOBS
            and all(type(length) is int and 0 <= length <= MAX_BLOB_BYTES for length in sizes.values())
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LinkError("the other end speaks another protocol") from error
    if not fits:
        raise LinkError("the other end sends too much")
    return kind, size, sizes


def _exactly(stream: Any, size: int) -> bytes:
    data: bytes = stream.read(size)
    if len(data) != size:
        raise LinkError(f"the connection ended {size - len(data)} bytes early")
    return data

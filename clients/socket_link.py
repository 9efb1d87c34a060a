"""The relay's end of an agent's Unix socket, and the frames that both ends speak.

One request a connection: a line of JSON that gives kind and sizes, then the header's bytes, then each
blob's. Everything has a cap, and a whole frame has one deadline, however slowly its bytes trickle in. The
agent's end is `clients.agent_server`; this module is also in the Flower bundle, and needs no agent.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from clients.errors import LinkError
from clients.link import MAX_BLOB_BYTES, MAX_HEADER_BYTES

MAX_HEAD_BYTES: Final = 1 << 16
MAX_BLOBS: Final = 8
MAX_FRAME_BYTES: Final = 1280 << 20  # header and blobs together
ANSWER_TIMEOUT_S: Final = 600.0
CONNECT_TIMEOUT_S: Final = 10.0
FRAME_TIMEOUT_S: Final = 30.0
SLOWEST_BYTES_PER_S: Final = 8 << 20  # what a frame may take beyond that
_CHUNK: Final = 1 << 20


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
                self._connect(connection)
                try:
                    send_frame(connection, kind, header, blobs)
                except (BrokenPipeError, ConnectionResetError) as error:
                    return _parting_word(connection, error)
                frame = Frame(connection, ANSWER_TIMEOUT_S)
                head = frame.head()
                return frame.body(head)
            except OSError as error:
                raise LinkError(f"no answer from the agent at {self._path}: {error}") from error

    def _connect(self, connection: socket.socket) -> None:
        """Connect, and stand in line while others are let in."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        while True:
            try:
                connection.connect(str(self._path))
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.05)
            else:
                return


@dataclass(frozen=True, slots=True)
class FrameHead:
    """What the first line of a frame announces."""

    kind: str
    header_size: int
    blob_sizes: Mapping[str, int]

    @property
    def size_bytes(self) -> int:
        return self.header_size + sum(self.blob_sizes.values())


class Frame:
    """One frame as it comes in. `head()` first, then `body(head)`; each has a deadline as a whole."""

    def __init__(self, connection: socket.socket, timeout_s: float) -> None:
        self._connection, self._timeout_s = connection, timeout_s
        self._left = b""

    def head(self) -> FrameHead:
        """Read the first line.

        Raises:
            LinkError: it is of another protocol, announces too much, or comes too slowly.
        """
        deadline = time.monotonic() + self._timeout_s
        line = bytearray()
        while b"\n" not in line:
            if len(line) > MAX_HEAD_BYTES:
                raise LinkError("the other end speaks another protocol")
            piece = self._receive(deadline, 4096)
            if not piece:
                raise LinkError("the other end speaks another protocol")
            line += piece
        first, _, rest = bytes(line).partition(b"\n")
        self._left = rest
        return _head(first)

    def body(self, head: FrameHead) -> tuple[bytes, dict[str, bytes]]:
        """Read the header and the blobs that `head` announced.

        Raises:
            LinkError: they end early or come too slowly.
        """
        deadline = time.monotonic() + self._timeout_s + head.size_bytes / SLOWEST_BYTES_PER_S
        header = self._exactly(head.header_size, deadline)
        return header, {name: self._exactly(size, deadline) for name, size in head.blob_sizes.items()}

    def within(self, timeout_s: float) -> Frame:
        """Set the deadline of what is read next."""
        self._timeout_s = timeout_s
        return self

    def _exactly(self, size: int, deadline: float) -> bytes:
        data = bytearray(self._left[:size])
        self._left = self._left[size:]
        while len(data) < size:
            piece = self._receive(deadline, min(_CHUNK, size - len(data)))
            if not piece:
                raise LinkError(f"the connection ended {size - len(data)} bytes early")
            data += piece
        return bytes(data)

    def _receive(self, deadline: float, size: int) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise LinkError("the other end is too slow")
        self._connection.settimeout(left)
        try:
            return self._connection.recv(size)
        except TimeoutError as error:
            raise LinkError("the other end is too slow") from error


def send_frame(connection: socket.socket, kind: str, header: bytes, blobs: Mapping[str, bytes]) -> None:
    """Send one frame; the socket's own time-out holds for each part.

    Raises:
        OSError: the other end is gone or takes nothing.
    """
    sizes = {name: len(blob) for name, blob in blobs.items()}
    head = json.dumps({"kind": kind, "header": len(header), "blobs": sizes}).encode()
    connection.sendall(head + b"\n" + header)
    for blob in blobs.values():
        connection.sendall(blob)


def _parting_word(connection: socket.socket, error: OSError) -> tuple[bytes, dict[str, bytes]]:
    """An agent that declines to read a request says why, then closes."""
    try:
        frame = Frame(connection, 1.0)
        return frame.body(frame.head())
    except (OSError, LinkError):
        raise error from None


def _head(line: bytes) -> FrameHead:
    try:
        head = json.loads(line)
        kind, size, sizes = head["kind"], head["header"], head["blobs"]
        fits = (
            isinstance(kind, str)
            and len(kind) <= 100
            and type(size) is int
            and 0 <= size <= MAX_HEADER_BYTES
            and len(sizes) <= MAX_BLOBS
            and all(type(length) is int and 0 <= length <= MAX_BLOB_BYTES for length in sizes.values())
            and size + sum(sizes.values()) <= MAX_FRAME_BYTES
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LinkError("the other end speaks another protocol") from error
    if not fits:
        raise LinkError("the other end sends too much")
    return FrameHead(kind, size, dict(sizes))

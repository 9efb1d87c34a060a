"""What is written within a turn leaves in one piece, whole and in order, and never later than the turn."""

from __future__ import annotations

import asyncio
import socket
import struct
import time

import uvicorn
import uvloop

from server.wire import GatheringProtocol, GatheringTransport


class Recorder:
    """A transport that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def write(self, data: bytes) -> None:
        self.told.append(data)

    def close(self) -> None:
        self.told.append("close")

    def abort(self) -> None:
        self.told.append("abort")

    def set_protocol(self, protocol: object) -> None:
        self.told.append("protocol")

    def is_closing(self) -> bool:
        return False


def played(play) -> list[object]:
    async def run() -> list[object]:
        recorder = Recorder()
        await play(GatheringTransport(recorder, asyncio.get_running_loop()))
        await asyncio.sleep(0)
        return recorder.told

    return asyncio.run(run())


def test_writes_of_one_turn_are_one_and_of_two_turns_two():
    async def play(wire):
        wire.write(b"head")
        wire.write(b"body")
        await asyncio.sleep(0)
        wire.write(b"more")

    assert played(play) == [b"headbody", b"more"]


def test_close_sends_what_was_written_first():
    async def play(wire):
        wire.write(b"last")
        wire.close()

    assert played(play) == [b"last", "close"]


def test_abort_sends_nothing_more():
    async def play(wire):
        wire.write(b"lost")
        wire.abort()

    assert played(play) == ["abort"]


def test_another_protocol_finds_an_empty_wire():
    async def play(wire):
        wire.write(b"101")
        wire.set_protocol(asyncio.Protocol())
        assert wire.is_closing() is False

    assert played(play) == [b"101", "protocol"]


async def application(scope, receive, send):
    if scope["type"] != "http":
        return
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"x-path", scope["path"].encode())]}
    )
    for number in range(3):
        await send({"type": "http.response.body", "body": b"%d" % number * 70_000, "more_body": number < 2})
        await asyncio.sleep(0.01 if scope["path"] == "/slow" else 0)


def test_answers_in_parts_over_a_pipelined_connection_are_whole():
    """uvicorn itself over the wire: three requests sent at once, answers larger than any buffer."""

    async def run() -> bytes:
        config = uvicorn.Config(
            application, http=GatheringProtocol, lifespan="off", log_config=None, ws="none"
        )
        server = uvicorn.Server(config)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            head = "GET {} HTTP/1.1\r\nHost: x\r\n{}\r\n"
            asked = [head.format(path, "") for path in ("/a", "/slow")]
            writer.write("".join([*asked, head.format("/c", "Connection: close\r\n")]).encode())
            data = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            server.should_exit = True
            await serving
        return data

    data = asyncio.run(run())
    places = [data.index(path) for path in (b"x-path: /a", b"x-path: /slow", b"x-path: /c")]
    assert places == sorted(places)
    assert data.count(b"0" * 70_000) == data.count(b"1" * 70_000) == data.count(b"2" * 70_000) == 3


def test_connection_that_breaks_keeps_nobody_elses_answer():
    """Under uvloop a write to a connection that was reset raises; others write in the same turn."""

    async def run() -> list[bytes]:
        go_on = asyncio.Event()

        async def gathered(scope, receive, send):
            await go_on.wait()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ok"})

        config = uvicorn.Config(
            gathered, http=GatheringProtocol, lifespan="off", log_config=None, ws="none",
            timeout_keep_alive=120,
        )  # fmt: skip
        server = uvicorn.Server(config)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            serving = asyncio.create_task(server.serve(sockets=[listener]))
            while not server.started:
                await asyncio.sleep(0.01)
            callers = [socket.create_connection(listener.getsockname()) for _ in range(4)]
            for caller in callers:
                caller.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            await asyncio.sleep(0.1)
            callers[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            callers[0].close()
            go_on.set()
            answers = []
            for caller in callers[1:]:
                caller.settimeout(10)
                answers.append(await asyncio.to_thread(caller.recv, 4_096))
                caller.close()
            server.should_exit = True
            await serving
        return answers

    for runner in (asyncio.Runner(), asyncio.Runner(loop_factory=uvloop.new_event_loop)):
        begun = time.monotonic()
        with runner:
            answers = runner.run(run())
        assert [answer[:15] for answer in answers] == [b"HTTP/1.1 200 OK"] * 3
        assert time.monotonic() - begun < 60, "it waited for the connections to be closed"

"""A quiet connection is closed when uvicorn would close it, and a busy one never; the clock here skips.

Each test plays with uvicorn's own protocol too, which sets a timer after each answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections import Counter

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.wire import GatheringProtocol
from tests.server.skipping import run

KEEP_S = 2
NEAR_S = 0.3  # uvicorn itself looks about every tenth of a second

pytestmark = pytest.mark.parametrize("protocol", [GatheringProtocol, HttpToolsProtocol])


class Application:
    """Answers its path, after as many seconds as the path says or when the gate opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.waiting = 0

    async def __call__(self, scope, receive, send) -> None:
        path = scope["path"]
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        if path.startswith("/after/"):
            await asyncio.sleep(float(path.rsplit("/", 1)[1]))
        elif path.startswith("/gate"):
            self.waiting += 1
            await self.gate.wait()
        said = path.encode() + b" " + body
        headers = [(b"content-length", b"%d" % len(said))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": said})


@contextlib.asynccontextmanager
async def served(protocol, keep_s: float = KEEP_S):
    """uvicorn over a socket: gives the application and a way to connect."""
    application = Application()
    config = uvicorn.Config(
        application, http=protocol, lifespan="off", log_config=None, ws="none", timeout_keep_alive=keep_s
    )
    server = uvicorn.Server(config)
    opened = []
    # named as TCP: asyncio asks for no delay (TCP_NODELAY) only where a socket says that it is
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(512)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)

        async def connect() -> Client:
            opened.append(Client(*await asyncio.open_connection(*listener.getsockname())))
            return opened[-1]

        try:
            yield application, connect
        finally:
            for client in opened:
                client.writer.close()
            server.should_exit = True
            await serving


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def ask(self, path: str, body: bytes = b"") -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        self.writer.write(head.encode() + body)

    async def answer(self) -> bytes:
        head = await self.reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        size = re.search(rb"content-length: ([0-9]+)", head)
        assert size is not None
        return await self.reader.readexactly(int(size[1]))

    async def asked(self, path: str) -> bytes:
        self.ask(path)
        return await self.answer()

    async def quiet_s(self) -> float:
        """How long it is until the server closes; nothing comes before."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        assert await self.reader.read() == b""
        return loop.time() - begun


def is_timeout(seconds: float) -> bool:
    return KEEP_S - 1e-6 <= seconds <= KEEP_S + NEAR_S


def test_idle_connection_is_closed_after_the_timeout_and_not_before(protocol):
    async def main():
        async with served(protocol) as (_, connect):
            client, loop = await connect(), asyncio.get_running_loop()
            asked_at = loop.time()
            assert await client.asked("/a") == b"/a "
            await client.quiet_s()
            return loop.time() - asked_at

    assert is_timeout(run(main(), sockets=True))


@pytest.mark.parametrize("pause_s", [0.25, 1.1, 1.7])
def test_connection_that_asks_again_and_again_is_kept_until_it_stops(protocol, pause_s):
    async def main():
        async with served(protocol) as (_, connect):
            client, loop = await connect(), asyncio.get_running_loop()
            begun = loop.time()
            while loop.time() - begun < 4 * KEEP_S:
                assert await client.asked("/again") == b"/again "
                await asyncio.sleep(pause_s)
            asked_at = loop.time()
            assert await client.asked("/last") == b"/last "
            await client.quiet_s()
            return loop.time() - asked_at

    assert is_timeout(run(main(), sockets=True))


@pytest.mark.parametrize("before", [0, 1, 3])
def test_request_that_takes_longer_than_the_timeout_is_not_cut(protocol, before):
    async def main():
        async with served(protocol) as (_, connect):
            client, loop = await connect(), asyncio.get_running_loop()
            for _ in range(before):
                await client.asked("/a")
                await asyncio.sleep(0.5)
            begun = loop.time()
            assert await client.asked("/after/7") == b"/after/7 "
            assert loop.time() - begun >= 7 - 1e-6
            await client.quiet_s()
            return loop.time() - begun

    assert is_timeout(run(main(), sockets=True) - 7)


def test_request_that_begins_just_before_the_timeout_is_answered(protocol):
    async def main():
        async with served(protocol) as (_, connect):
            client = await connect()
            for _ in range(3):
                await client.asked("/a")
                await asyncio.sleep(KEEP_S - NEAR_S)
                assert await client.asked("/after/1.5") == b"/after/1.5 "
                await asyncio.sleep(KEEP_S - NEAR_S)

    run(main(), sockets=True)


def test_request_that_arrives_slowly_is_not_taken_for_quiet(protocol):
    async def main():
        async with served(protocol) as (_, connect):
            client = await connect()
            await client.asked("/a")
            for part in (
                b"POST /slow HT",
                b"TP/1.1\r\nHost: x\r\nContent-",
                b"Length: 2\r\n\r\n",
                b"h",
                b"i",
            ):
                await asyncio.sleep(1.2)
                client.writer.write(part)
            assert await client.answer() == b"/slow hi"
            return await client.quiet_s()

    assert KEEP_S - NEAR_S <= run(main(), sockets=True) <= KEEP_S + NEAR_S  # since the answer was read


def test_each_connection_is_closed_in_its_own_time(protocol):
    async def main():
        async with served(protocol) as (_, connect):
            clients, loop = [await connect() for _ in range(8)], asyncio.get_running_loop()

            async def one(number: int, client: Client) -> float:
                for _ in range(number):
                    await asyncio.sleep(0.7)
                    await client.asked("/a")
                asked_at = loop.time()
                await client.asked("/last")
                await client.quiet_s()
                return loop.time() - asked_at

            return await asyncio.gather(*(one(*pair) for pair in enumerate(clients)))

    assert all(map(is_timeout, run(main(), sockets=True)))


def test_connection_that_never_asks_is_closed_as_a_quiet_one_is(protocol):
    """uvicorn's own protocol would keep it for ever."""

    async def main():
        async with served(protocol) as (_, connect):
            client, loop = await connect(), asyncio.get_running_loop()
            begun = loop.time()
            if protocol is HttpToolsProtocol:
                await asyncio.sleep(3 * KEEP_S)
                assert await client.asked("/a") == b"/a "
                return KEEP_S
            await client.quiet_s()
            return loop.time() - begun

    assert is_timeout(run(main(), sockets=True))


def test_pipelined_requests_are_all_answered_in_order_and_the_connection_kept(protocol):
    async def main():
        async with served(protocol) as (_, connect):
            client = await connect()
            for turn in range(3):
                paths = [f"/{turn}/{number}" for number in range(40)]
                paths[7:7] = ["/after/1", "/after/3"]
                for path in paths:
                    client.ask(path, path.encode())
                assert [await client.answer() for _ in paths] == [f"{path} {path}".encode() for path in paths]
                await asyncio.sleep(KEEP_S - 2 * NEAR_S)
            await client.asked("/a")
            return await client.quiet_s()

    assert KEEP_S - NEAR_S <= run(main(), sockets=True) <= KEEP_S + NEAR_S  # since the answer was read


def test_many_connections_that_are_answered_in_one_turn_get_each_its_own(protocol):
    async def main():
        async with served(protocol) as (application, connect):
            clients = [await connect() for _ in range(120)]
            for turn in range(2):
                application.waiting = 0
                application.gate.clear()
                for number, client in enumerate(clients):
                    client.ask(f"/gate/{turn}/{number}", b"%d," % number * (1 + number * 20))
                while application.waiting < len(clients):
                    await asyncio.sleep(0.01)
                application.gate.set()
                for number, client in enumerate(clients):
                    body = b"%d," % number * (1 + number * 20)
                    assert await client.answer() == f"/gate/{turn}/{number} ".encode() + body

    run(main(), sockets=True)


def test_connection_that_leaves_takes_its_timer_along(protocol):
    async def main():
        async with served(protocol) as (_, connect):
            loop = asyncio.get_running_loop()
            for _ in range(20):
                client = await connect()
                await client.asked("/a")
                client.writer.close()
                await client.writer.wait_closed()
            await asyncio.sleep(0.5)
            return armed_by(loop, protocol)

    assert run(main(), sockets=True) == 0


def test_connection_that_asks_often_has_at_most_one_timer(protocol):
    async def main():
        async with served(protocol) as (_, connect):
            client, loop, counts = await connect(), asyncio.get_running_loop(), Counter()
            for number in range(100):
                await client.asked("/a" if number % 10 else "/after/0.5")
                counts[armed_by(loop, protocol)] += 1
            set_in_all = sum(
                getattr(called, "__self__", None).__class__ is protocol for _, called in loop.timers
            )
            return counts, set_in_all

    counts, set_in_all = run(main(), sockets=True)
    assert counts == {1: 100}
    assert set_in_all <= 10 if protocol is GatheringProtocol else set_in_all == 100


def armed_by(loop, protocol) -> int:
    callbacks = {
        called for _, called in loop.timers if isinstance(getattr(called, "__self__", None), protocol)
    }
    return sum(map(loop.armed, callbacks))

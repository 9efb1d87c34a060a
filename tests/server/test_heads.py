"""What a connection may cost before anybody knows who asks: size, number, time of heads, and connections.

The protocol itself is played with, on a transport that writes nothing and a clock that skips.
"""

from __future__ import annotations

import asyncio
import json
import resource

import httptools
import pytest
import uvicorn
from uvicorn.server import ServerState

from server.settings import Settings
from server.wire import GatheringProtocol, Limits, protocol_within
from server.workers import limits_of
from tests.server.skipping import run

KEEP_S, HEAD_S = 15, 10
LIMITS = {"header_bytes": 4_096, "header_fields": 20, "header_s": HEAD_S, "raw_body_bytes": 10_000}
GET = b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


class Wire(asyncio.Transport):
    """A transport to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.said, self.closed_at, self.reads = b"", None, True

    def write(self, data):
        self.said += data

    def close(self):
        if self.closed_at is None:
            self.closed_at = asyncio.get_running_loop().time()

    def is_closing(self):
        return self.closed_at is not None

    def pause_reading(self):
        self.reads = False

    def resume_reading(self):
        self.reads = True


class Door:
    """A worker's connections; each answer waits for the gate where the path says so."""

    def __init__(self, **limits) -> None:
        self.refused, self.asked, self.gate = [], [], asyncio.Event()
        self.config = uvicorn.Config(
            self.answer, http=GatheringProtocol, lifespan="off", log_config=None, ws="none",
            timeout_keep_alive=KEEP_S, interface="asgi3",
        )  # fmt: skip
        self.state = ServerState()
        self.kind = protocol_within(Limits(**{**LIMITS, **limits}, refused=self.refused.append))
        self.begun = asyncio.get_running_loop().time()

    def connect(self):
        protocol = self.kind(self.config, self.state, {}, _loop=asyncio.get_running_loop())
        wire = Wire()
        protocol.connection_made(wire)
        return protocol, wire

    async def answer(self, scope, receive, send):
        self.asked.append(scope)
        body, more = b"", True
        while more and scope["path"] != "/early":
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        if scope["path"] == "/gate":
            await self.gate.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    def seconds(self, wire):
        return None if wire.closed_at is None else wire.closed_at - self.begun


async def turns(count=6):
    for _ in range(count):
        await asyncio.sleep(0)


def played(play, **limits):
    async def main():
        return await play(Door(**limits))

    return run(main())


def code_of(said: bytes) -> tuple[int, str]:
    """Status and code of a refusal, which is a problem document of its length and ends the connection."""
    head, _, body = said.partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    fields = dict(line.split(": ") for line in lines[1:])
    document = json.loads(body)
    assert int(fields["content-length"]) == len(body)
    assert (fields["connection"], fields["affidavit-code"]) == ("close", document["code"])
    assert int(lines[0].split()[1]) == document["status"]
    assert ("retry-after" in fields) == (document["status"] == 503)
    return document["status"], document["code"]


TOO_LARGE = (431, "request.head_too_large")
HEADS = {
    "a long value": b"GET /a HTTP/1.1\r\nX: " + b"a" * 4_096,
    "a long name": b"GET /a HTTP/1.1\r\n" + b"a" * 4_096,
    "a long path": b"GET /" + b"a" * 4_096,
    "many fields": b"GET /a HTTP/1.1\r\n" + b"a: b\r\n" * 22,
    "a long value, ended": b"GET /a HTTP/1.1\r\nX: " + b"a" * 4_096 + b"\r\n\r\n",
    "many fields, ended": b"GET /a HTTP/1.1\r\n" + b"a: b\r\n" * 22 + b"\r\n",
    "a long path, ended": b"GET /" + b"a" * 4_096 + b" HTTP/1.1\r\n\r\n",
    "a little each": b"GET /a HTTP/1.1\r\n" + b"".join(b"%d: %s\r\n" % (k, b"x" * 300) for k in range(19)),
    "blank lines": b"\r\n" * 3_000,
}


@pytest.mark.parametrize("before", [b"", GET, GET + GET, POST % 3 + b"abc"], ids=["", "1", "2", "body"])
@pytest.mark.parametrize("piece", [1, 7, 1_000, 1_000_000])
@pytest.mark.parametrize("head", HEADS)
def test_head_beyond_the_limits_is_refused_and_reaches_nobody(head, piece, before):
    async def play(door):
        protocol, wire = door.connect()
        if before:
            protocol.data_received(before)
            await turns(12)
            wire.said = b""
        asked, data = len(door.asked), HEADS[head]
        for start in range(0, len(data), piece):
            if wire.is_closing():
                break
            protocol.data_received(data[start : start + piece])
        else:
            start = len(data)
        await turns()
        assert wire.is_closing()
        assert len(door.asked) == asked
        assert start <= 4_096 + 2 * piece + 200, "it went on reading"
        return code_of(wire.said), door.refused

    assert played(play) == (TOO_LARGE, ["head"])


@pytest.mark.parametrize("piece", [1, 7, 100, 1_000_000])
def test_head_and_body_within_the_limits_are_answered_in_whatever_pieces(piece):
    """Among them bodies far longer than a head may be, and the next head in the same piece."""
    head = b"POST /a HTTP/1.1\r\n" + b"".join(b"%d: %s\r\n" % (k, b"x" * 190) for k in range(19))
    chunked = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"3\r\nabc\r\n" * 900 + b"0\r\n\r\n"
    data = (head + b"Content-Length: 9000\r\n\r\n" + b"x" * 9_000) * 2 + chunked + GET

    async def play(door):
        protocol, wire = door.connect()
        for start in range(0, len(data), piece):
            protocol.data_received(data[start : start + piece])
            if start % 500 < piece:
                await turns()
        await turns(20)
        assert not wire.is_closing()
        return len(door.asked), wire.said.count(b"HTTP/1.1 200"), door.refused

    assert played(play) == (4, 4, [])


def test_many_small_requests_in_one_piece_are_no_large_head():
    async def play(door):
        protocol, wire = door.connect()
        protocol.data_received(GET * 400 + GET[:9])
        await turns(3_000)
        protocol.data_received(GET[9:])
        await turns()
        assert not wire.is_closing()
        return wire.said.count(b"HTTP/1.1 200"), door.refused

    assert played(play) == (401, [])


@pytest.mark.parametrize(
    ("begun", "then"),
    [
        (b"G", b"ET"),
        (b"GET /", b"x"),
        (GET[:-2], b"X"),
        (GET[:-1], b""),
        (b"\r\n", b"\r"),
        (b"\r\n\r\n", b""),
    ],
    ids=repr,
)
@pytest.mark.parametrize("before", [0, 1, 3])
def test_head_that_does_not_end_is_given_up_in_its_own_time(begun, then, before):
    """Counted from its first byte; a byte now and then gains nothing."""

    async def play(door):
        protocol, wire = door.connect()
        for _ in range(before):
            protocol.data_received(GET)
            await turns()
            await asyncio.sleep(2)
        wire.said = b""
        door.begun = asyncio.get_running_loop().time()
        protocol.data_received(begun)
        await asyncio.sleep(HEAD_S - 1)
        assert not wire.is_closing()
        if then:
            protocol.data_received(then)
        await asyncio.sleep(100)
        return door.seconds(wire), code_of(wire.said), door.refused, len(door.asked) - before

    assert played(play) == (HEAD_S, (408, "request.timeout"), ["head_late"], 0)


def test_connection_without_a_request_is_closed_without_a_word():
    async def play(door):
        _, wire = door.connect()
        await asyncio.sleep(100)
        return door.seconds(wire), wire.said, door.refused

    assert played(play) == (KEEP_S, b"", [])


def test_answered_connection_that_sends_blank_lines_is_not_kept():
    async def play(door):
        protocol, wire = door.connect()
        protocol.data_received(GET)
        await turns()
        for _ in range(30):
            if wire.is_closing():
                break
            await asyncio.sleep(1)
            protocol.data_received(b"\r\n")
        return door.seconds(wire)

    assert played(play) == 1 + HEAD_S


def test_late_head_behind_an_answer_that_takes_its_time_waits_for_that_answer():
    async def play(door):
        protocol, wire = door.connect()
        protocol.data_received(GET.replace(b"/a", b"/gate") + GET[:9])
        await asyncio.sleep(5 * HEAD_S)
        assert not wire.is_closing()
        door.gate.set()
        await turns()
        assert wire.said.endswith(b"ok")
        wire.said, door.begun = b"", asyncio.get_running_loop().time()
        await asyncio.sleep(100)
        return door.seconds(wire), code_of(wire.said)

    assert played(play) == (HEAD_S, (408, "request.timeout"))


def test_head_that_ends_in_time_is_answered_however_long_the_answer_takes():
    async def play(door):
        protocol, wire = door.connect()
        late = GET.replace(b"/a", b"/gate")
        protocol.data_received(late[:10])
        await asyncio.sleep(HEAD_S - 1)
        protocol.data_received(late[10:])
        await asyncio.sleep(5 * HEAD_S)
        door.gate.set()
        await turns()
        return wire.said.endswith(b"ok"), wire.is_closing(), door.refused

    assert played(play) == (True, False, [])


def test_body_that_nobody_waits_for_any_more_is_read_until_the_connection_would_be_quiet():
    async def play(door):
        protocol, wire = door.connect()
        protocol.data_received(b"POST /early HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        await turns()
        assert wire.said.endswith(b"ok")
        said = wire.said
        while not wire.is_closing():
            protocol.data_received(b"x" * 9_000)
            await asyncio.sleep(1)
        return wire.said == said, door.seconds(wire), door.refused

    assert played(play) == (True, KEEP_S, [])


def test_next_head_after_such_a_body_in_the_same_piece_is_answered():
    async def play(door):
        protocol, wire = door.connect()
        protocol.data_received(b"POST /early HTTP/1.1\r\nContent-Length: 50000\r\n\r\n")
        await turns()
        protocol.data_received(b"x" * 50_000 + GET[:9])
        protocol.data_received(GET[9:])
        await turns()
        return wire.said.count(b"HTTP/1.1 200"), wire.is_closing(), door.refused

    assert played(play) == (2, False, [])


CHUNKED = b"POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "flood",
    [
        CHUNKED + b"0\r\nX: " + b"a" * 20_000,
        CHUNKED + b"0\r\n" + b"a: b\r\n" * 3_000,
        CHUNKED + b"1;x=" + b"a" * 20_000,
        CHUNKED + b"1\r\nx\r\n" * 3_000,
    ],
    ids=["long trailer", "many trailers", "chunk extension", "tiny chunks"],
)
def test_chunks_that_are_mostly_frame_are_cut_off(flood):
    async def play(door):
        protocol, wire = door.connect()
        read = 0
        for start in range(0, len(flood), 500):
            if wire.is_closing():
                break
            protocol.data_received(flood[start : start + 500])
            read = start + 500
        await turns()
        return read < 12_000, wire.is_closing(), door.refused

    assert played(play) == (True, True, ["body"])


@pytest.mark.parametrize("piece", [5, 1_000])
def test_trailers_are_no_headers(piece):
    data = CHUNKED + b"2\r\nhi\r\n0\r\nAuthorization: Bearer x\r\nX-Client-Cert: y\r\n\r\n" + GET

    async def play(door):
        protocol, _ = door.connect()
        for start in range(0, len(data), piece):
            protocol.data_received(data[start : start + piece])
        await turns(12)
        return [list(scope["headers"]) for scope in door.asked]

    assert played(play) == [[(b"transfer-encoding", b"chunked")], [(b"host", b"x")]]


def test_connection_beyond_those_of_a_worker_is_told_to_come_back():
    async def play(door):
        kept = [door.connect() for _ in range(3)]
        protocol, over = door.connect()
        await turns()
        assert over.is_closing()
        assert not any(wire.is_closing() for _, wire in kept)
        said = code_of(over.said)
        protocol.connection_lost(None)
        kept[0][0].connection_lost(None)
        again, wire = door.connect()
        again.data_received(GET)
        await turns()
        return said, wire.said.endswith(b"ok"), door.refused, len(door.state.connections)

    assert played(play, connections=3) == ((503, "server.overloaded"), True, ["connections"], 3)


def test_connection_that_leaves_takes_its_timer_along_whatever_it_waited_for():
    async def play(door):
        loop, protocols = asyncio.get_running_loop(), []
        for sent in (b"", b"GET /", GET, GET + b"GET", CHUNKED):
            protocol, _ = door.connect()
            if sent:
                protocol.data_received(sent)
            await turns()
            protocol.connection_lost(None)
            protocols.append(protocol)
        return sum(loop.armed(protocol._look) for protocol in protocols)

    assert played(play) == 0


def test_whole_requests_set_no_timer_of_their_own():
    async def play(door):
        protocol, wire = door.connect()
        for _ in range(50):
            protocol.data_received(GET)
            await turns()
        timers = [called for _, called in asyncio.get_running_loop().timers if called == protocol._look]
        return wire.said.count(b"HTTP/1.1 200"), len(timers)

    assert played(play) == (50, 1)


def test_what_is_no_http_is_told_so_as_before():
    async def play(door):
        protocol, wire = door.connect()
        protocol.data_received(b"\x16\x03\x01 hello\r\n\r\n")
        await turns()
        return wire.said.split(b"\r\n")[0], wire.is_closing(), door.refused

    assert played(play) == (b"HTTP/1.1 400 Bad Request", True, [])


def test_the_parser_says_what_this_rests_on():
    """That it calls for trailers as for headers, and makes an error of ours one of its own."""
    seen = []

    class Listener:
        def on_header(self, name, value):
            seen.append(name)

        def on_headers_complete(self):
            seen.append("complete")

        def on_message_complete(self):
            raise LookupError

    parser = httptools.HttpRequestParser(Listener())
    with pytest.raises(httptools.HttpParserError):
        parser.feed_data(CHUNKED + b"0\r\nA: b\r\n\r\n")
    assert seen == [b"Transfer-Encoding", "complete", b"A"]


def test_worker_takes_its_limits_from_the_settings_and_its_files(monkeypatch):
    settings = Settings(max_header_bytes=8_192, header_timeout_s=3, max_connections=500, max_body_bytes=2_048)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1_000_000, 1_000_000))
    limits = limits_of(settings, lambda reason: None)
    assert (limits.header_bytes, limits.header_s, limits.connections) == (8_192, 3, 500)
    assert limits.raw_body_bytes == 8 * 2_048 + 8_192
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert limits_of(settings, lambda reason: None).connections == 192
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert limits_of(settings, lambda reason: None).connections == 500

"""Questions to the sites' agents over a Flower grid: short time-outs, one repetition, no answer trusted.

One protocol for every kind of message: a kind, a header of strict JSON and blobs, in one record where they
are small (`federation.pieces`). A repeated request is the same bytes, and an agent
answers it with the same bytes, so a lost message costs nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from flwr.app import ConfigRecord, Message
from flwr.serverapp import Grid

from audit.canonical import JsonValue, canonical_around, canonical_bytes, parse_strict
from audit.errors import AuditError
from federation.asking import TROUBLE, Asking
from federation.pieces import PiecesError, message_content, read_blobs

TRAIN_KINDS: Final = frozenset({"round"})
TROUBLE_S: Final = 20.0  # for how long a node or relay in trouble is asked again
LOOK_S: Final = 0.5
HELLO_AGAIN_S: Final = 5.0
MAX_HEADER_BYTES: Final = 4 << 20
_CODE_BYTES: Final = 256  # an answer that holds a code and nothing else


T = TypeVar("T")


class Made(Mapping[str, T]):
    """A mapping whose values are made when they are asked for, anew each time.

    For a round's questions: the first site is at work before the last one's is written.
    """

    def __init__(self, names: Iterable[str], make: Callable[[str], T]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names


@dataclass(frozen=True, slots=True)
class Around:
    """What the canonical bytes of headers have before and after the one member in which they differ."""

    member: str
    before: bytes
    after: bytes

    @classmethod
    def of(cls, header: Mapping[str, JsonValue], member: str) -> Around:
        """Write the rest of `header` once, for all that are told the same but for `member`."""
        before, after = canonical_around(header, member)
        return cls(member, before, after)

    def write(self, header: Mapping[str, JsonValue]) -> bytes:
        """Return the canonical bytes of `header`, of which all but the member is as `of` was given it."""
        return self.before + canonical_bytes(header[self.member]) + self.after


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One message to one site."""

    kind: str
    header: Mapping[str, JsonValue]
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    records: Mapping[str, ConfigRecord] | None = None  # the blobs ready to travel, made once for all sites
    around: Around | None = None  # the rest of the header, written once for all sites

    def message(self, node_id: int, group_id: str) -> Message:
        header = canonical_bytes(self.header) if self.around is None else self.around.write(self.header)
        content = message_content(self.kind, header, self.blobs, self.records)
        kind = "train" if self.kind in TRAIN_KINDS else "query"
        return Message(content, node_id, kind, group_id=group_id)


@dataclass(frozen=True, slots=True)
class Several:
    """Questions to one site in one message, without blobs; one is asked once those before were answered."""

    requests: tuple[Request, ...]

    def message(self, node_id: int, group_id: str) -> Message:
        headers = [canonical_bytes(request.header) for request in self.requests]
        content = message_content([request.kind for request in self.requests], headers, {})
        return Message(content, node_id, "query", group_id=group_id)


Question = Request | Several


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one site sent back; `failure` is "" or why nothing usable came."""

    site: str
    header: Mapping[str, Any] = field(default_factory=dict)
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    failure: str = ""


def read_answer(site: str, reply: Message, read: Callable[[bytes], Any] = parse_strict) -> Answer:
    """Read a reply strictly; anything else than a proper one becomes a failure.

    `read` does with a header what `parse_strict` does; it may know what to expect.
    """
    if reply.has_error():
        return Answer(site=site, failure=f"node error {reply.error.code}")
    header_record = reply.content.get("header")
    if not isinstance(header_record, ConfigRecord):
        return Answer(site=site, failure="the reply lacks its header")
    try:
        blobs = read_blobs(reply.content)
    except PiecesError as error:
        return Answer(site=site, failure=f"{error.code}: {error}")
    return _read_header(site, header_record.get("header"), blobs, read)


def read_answers(site: str, reply: Message, count: int) -> list[Answer]:
    """Read a reply to `count` questions asked together; those after one that failed have a failure too."""
    record = None if reply.has_error() else reply.content.get("header")
    raws = record.get("header") if isinstance(record, ConfigRecord) else None
    if not isinstance(raws, list):
        answer = read_answer(site, reply)
        failure = answer.failure or "the reply holds one answer to several questions"
        return [Answer(site=site, failure=failure)] * count
    if len(raws) > count or set(reply.content) != {"header"}:
        return [Answer(site=site, failure="the reply holds more than its questions")] * count
    answers = [_read_header(site, raw, {}) for raw in raws]
    return answers + [Answer(site=site, failure="not answered")] * (count - len(answers))


def _read_header(
    site: str, raw: object, blobs: Mapping[str, bytes], read: Callable[[bytes], Any] = parse_strict
) -> Answer:
    if not isinstance(raw, bytes) or len(raw) > MAX_HEADER_BYTES:
        return Answer(site=site, failure="the reply's header is no bytes, or too many")
    try:
        header = read(raw)
    except AuditError as error:
        return Answer(site=site, failure=f"the reply's header is not strict JSON: {error}")
    if not isinstance(header, dict):
        return Answer(site=site, failure="the reply's header is no object")
    if isinstance(header.get("error"), str):
        return Answer(site=site, header=header, failure=f"agent error {header['error'][:40]}")
    return Answer(site=site, header=header, blobs=blobs)


class Exchange:
    """Asks several sites at once and waits no longer than it must."""

    def __init__(
        self,
        grid: Grid,
        *,
        poll_s: float = 0.01,
        discovery_s: float = 30.0,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._grid, self._poll_s, self._discovery_s = grid, poll_s, discovery_s
        self._monotonic, self._sleep = monotonic, sleep
        self._nodes: dict[str, int] = {}
        self._sites: dict[int, str] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites found so far."""
        return tuple(sorted(self._nodes))

    def discover(self, wanted: Iterable[str]) -> dict[str, Answer]:
        """Ask every node who it is until all `wanted` sites have answered, or the time is up.

        Returns:
            The hello answers by the name the node claims; the caller checks the claim.
        """
        missing, found = set(wanted), dict[str, Answer]()
        deadline, looked = self._monotonic() + self._discovery_s, -math.inf
        asked, ids = dict[int, float](), set[str]()
        while missing and (now := self._monotonic()) < deadline:
            if now - looked >= min(LOOK_S, self._discovery_s / 4):
                looked = now
                due = [
                    node
                    for node in self._grid.get_node_ids()
                    if node not in self._sites and now - asked.get(node, -HELLO_AGAIN_S) >= HELLO_AGAIN_S
                ]
                asked |= dict.fromkeys(due, now)
                hello = Request(kind="hello", header={})
                messages = [hello.message(node, "hello") for node in due]
                ids |= set(filter(None, self._grid.push_messages(messages))) if messages else set()
            replies = list(self._grid.pull_messages(ids)) if ids else []
            for reply in replies:
                ids.discard(reply.metadata.reply_to_message_id)
                answer = read_answer("?", reply)
                enrolment = answer.header.get("enrolment")
                name = enrolment.get("site") if isinstance(enrolment, dict) else None
                if isinstance(name, str) and name in missing and not answer.failure:
                    self._connect(name, reply.metadata.src_node_id)
                    found[name] = answer
                    missing.discard(name)
            if missing and not replies:
                self._sleep(self._poll_s)
        return found

    def ask(
        self,
        requests: Mapping[str, Request],
        *,
        timeout_s: float,
        group_id: str = "",
        trouble_s: float = TROUBLE_S,
    ) -> dict[str, tuple[Answer, Message | None]]:
        """Send each site its request; return one answer a site within `timeout_s`.

        A site that stays silent, asked again, has the failure "timeout"; one in trouble is asked again for
        `trouble_s`.
        """
        replies = self._replies(requests, timeout_s, group_id, trouble_s)
        answers: dict[str, tuple[Answer, Message | None]] = {}
        for site in requests:
            reply = replies.get(site)
            answers[site] = (self._silence(site) if reply is None else read_answer(site, reply), reply)
        return answers

    def ask_several(
        self, requests: Mapping[str, Sequence[Request]], *, timeout_s: float, group_id: str = ""
    ) -> dict[str, list[Answer]]:
        """Send each site its questions in one message; return, for each site, one answer to each of them."""
        asked: dict[str, Question] = {
            site: several[0] if len(several) == 1 else Several(tuple(several))
            for site, several in requests.items()
        }
        replies = self._replies(asked, timeout_s, group_id)
        answers: dict[str, list[Answer]] = {}
        for site, several in requests.items():
            reply, count = replies.get(site), len(several)
            if reply is None:
                answers[site] = [self._silence(site)] * count
            else:
                answers[site] = [read_answer(site, reply)] if count == 1 else read_answers(site, reply, count)
        return answers

    def _replies(
        self,
        requests: Mapping[str, Question],
        timeout_s: float,
        group_id: str,
        trouble_s: float = TROUBLE_S,
    ) -> dict[str, Message]:
        connected = {site: request for site, request in requests.items() if site in self._nodes}
        messages = [self.message(site, connected[site], group_id) for site in sorted(connected)]
        collected = self.collect(
            messages, connected, timeout_s=timeout_s, group_id=group_id, trouble_s=trouble_s
        )
        return {site: reply for reply in collected if (site := self.site_of(reply)) is not None}

    def _silence(self, site: str) -> Answer:
        return Answer(site=site, failure="timeout" if site in self._nodes else "not connected")

    def message(self, site: str, request: Question, group_id: str = "") -> Message:
        """Return the message that carries `request` to `site`."""
        return request.message(self._nodes[site], group_id)

    def messages(self, requests: Mapping[str, Request], group_id: str = "") -> Mapping[str, Message]:
        """Return the messages that carry `requests`, each made when it is asked for."""
        return Made(requests, lambda site: self.message(site, requests[site], group_id))

    def nodes_of(self, sites: Iterable[str]) -> dict[int, str]:
        """Return the sites by their nodes' ids."""
        return {self._nodes[site]: site for site in sites}

    def site_of(self, reply: Message) -> str | None:
        """Return the site whose node a reply says it comes from."""
        return self._sites.get(reply.metadata.src_node_id)

    def collect(
        self,
        messages: Iterable[Message],
        requests: Mapping[str, Question],
        *,
        timeout_s: float,
        group_id: str = "",
        trouble_s: float = TROUBLE_S,
        on_reply: Callable[[str], None] = lambda site: None,
    ) -> list[Message]:
        """Return at most one reply a site; see `stream`."""
        options: dict[str, Any] = {"timeout_s": timeout_s, "group_id": group_id, "trouble_s": trouble_s}
        return list(self.stream(messages, requests, on_reply=on_reply, **options))

    def stream(
        self,
        messages: Iterable[Message],
        requests: Mapping[str, Question],
        *,
        timeout_s: float,
        group_id: str = "",
        trouble_s: float = TROUBLE_S,
        on_reply: Callable[[str], None] = lambda site: None,
    ) -> Iterator[Message]:
        """Push `messages` as they are made, ask again as `federation.asking` says, yield one reply a site as
        it comes.
        """
        first = ((site, message) for message in messages if (site := self._addressee(message)) is not None)
        asking = Asking(
            self._grid,
            site_of=self.site_of,
            is_trouble=_is_trouble,
            poll_s=self._poll_s,
            timeout_s=timeout_s,
            trouble_s=min(timeout_s, trouble_s),
            monotonic=self._monotonic,
            sleep=self._sleep,
        )
        for site, reply in asking.ask(first, lambda site: self.message(site, requests[site], group_id)):
            on_reply(site)
            yield reply

    def _connect(self, site: str, node_id: int) -> None:
        """Note which node a site answers from; of several sites at one node the first found speaks for it."""
        self._nodes[site] = node_id
        self._sites.setdefault(node_id, site)

    def _addressee(self, message: Message) -> str | None:
        return self._sites.get(message.metadata.dst_node_id)


def _is_trouble(reply: Message) -> bool:
    """Whether the site's node, relay or agent is in trouble that may pass; no agent's own decision is."""
    if reply.has_error():
        return True
    record = reply.content.get("header")
    raw = record.get("header") if isinstance(record, ConfigRecord) else None
    last = raw[-1] if isinstance(raw, list) and raw else raw
    if not isinstance(last, bytes) or len(last) > _CODE_BYTES:
        return False  # more than a code: an answer is read once, when it counts, and a large one is large
    return _read_header("?", last, {}).header.get("error") in TROUBLE


def header_text(header: Mapping[str, JsonValue]) -> str:
    """Return a header as text, for logs and tests."""
    return json.dumps(header, sort_keys=True)

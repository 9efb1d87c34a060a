"""One question to several sites, asked again until each has answered or the time is up.

A message can be lost with the process that had it, and a site's agent, relay or node can be on its way back
after a crash. So a question is repeated at half time to who is silent, at once to a node that came back
since, and after a growing pause to who reports trouble: a node that is away, a relay without its agent. An
agent answers the same question with the same bytes, so a repetition costs nothing. Trouble is an answer only
when it lasts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Final

from flwr.app import Message
from flwr.serverapp import Grid

TROUBLE: Final = frozenset({"internal_error", "rate_limited"})
FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 8.0
LOOK_AT_NODES_S: Final = 2.0


@dataclass(slots=True)
class _Question:
    site: str
    node_id: int
    message: Callable[[], Message]
    pause_s: float
    asked: float = 0.0  # time.time() of the last push: nodes' times are compared with it
    due: float | None = None  # monotonic; when to ask again
    trouble: Message | None = None


class _Again:
    """Messages made as they are first looked at, and the same ones as often as they are looked at again.

    A grid in this process sends each as it comes; Flower's own goes over them several times.
    """

    def __init__(self, messages: Iterator[Message]) -> None:
        self._coming, self._made = messages, list[Message]()

    def __iter__(self) -> Iterator[Message]:
        yield from self._made
        for message in self._coming:
            self._made.append(message)
            yield message


class Asking:
    """The open questions of one round, or of one step of a preparation."""

    def __init__(
        self,
        grid: Grid,
        *,
        site_of: Callable[[Message], str | None],
        is_trouble: Callable[[Message], bool],
        poll_s: float,
        timeout_s: float,
        trouble_s: float,
        pause_s: float = FIRST_PAUSE_S,
        look_s: float = LOOK_AT_NODES_S,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`trouble_s`: for how long a site that reports trouble is asked again, first after `pause_s`;
        `look_s`: how often to see which nodes came back.
        """
        self._monotonic, self._sleep = monotonic, sleep
        self._pause_s, self._look_s = pause_s, look_s
        self._grid, self._site_of, self._is_trouble = grid, site_of, is_trouble
        self._poll_s, self._timeout_s, self._trouble_s = poll_s, timeout_s, trouble_s
        self._open: dict[str, _Question] = {}
        self._ids: set[str] = set()

    def ask(
        self, messages: Iterable[tuple[str, Message]], again: Callable[[str], Message]
    ) -> Iterator[tuple[str, Message]]:
        """Push (site, message) as they come, a site once; yield (site, reply) as answers come, each site
        once; `again(site)` makes its message anew.
        """
        self._open = {}
        self._push(self._first(messages, again))
        began = looked = self._monotonic()
        half = began + self._timeout_s / 2
        while self._open:
            found = list(self._grid.pull_messages(self._ids)) if self._ids else []
            for reply in found:
                self._ids.discard(reply.metadata.reply_to_message_id)
                site = self._site_of(reply)
                if site in self._open and self._is_answer(self._open[site], reply, began):
                    del self._open[site]
                    yield site, reply
            now = self._monotonic()
            if now >= began + self._timeout_s:
                break
            if now >= half:
                half = began + 2 * self._timeout_s
                self._hurry(list(self._open.values()), now)
            if now - looked >= self._look_s:
                looked = now
                self._hurry(self._came_back(), now)
            self._push_due(now)
            if not found:
                self._sleep(self._poll_s)
        for question in list(self._open.values()):
            if question.trouble is not None:
                yield question.site, question.trouble

    def _first(
        self, messages: Iterable[tuple[str, Message]], again: Callable[[str], Message]
    ) -> Iterator[tuple[_Question, Message]]:
        for site, message in messages:
            question = _Question(site, message.metadata.dst_node_id, partial(again, site), self._pause_s)
            self._open[site] = question
            yield question, message

    def _is_answer(self, question: _Question, reply: Message, began: float) -> bool:
        if not self._is_trouble(reply):
            return True
        question.trouble = reply
        now = self._monotonic()
        question.due = now + question.pause_s
        question.pause_s = min(2 * question.pause_s, _LONGEST_PAUSE_S)
        return question.due >= began + min(self._trouble_s, self._timeout_s)

    def _hurry(self, questions: list[_Question], now: float) -> None:
        for question in questions:
            question.due = now

    def _push_due(self, now: float) -> None:
        due = [
            question for question in self._open.values() if question.due is not None and question.due <= now
        ]
        if due:
            self._push((question, question.message()) for question in due)

    def _push(self, asked: Iterable[tuple[_Question, Message]]) -> None:
        coming = iter(asked)
        first = next(coming, None)
        if first is None:
            return  # SuperLink takes no empty push
        moment, questions = time.time(), list[_Question]()

        def messages() -> Iterator[Message]:
            for question, message in chain([first], coming):
                questions.append(question)
                yield message

        pushed = list(self._grid.push_messages(_Again(messages())))
        for question, name in zip(questions, pushed, strict=False):
            question.asked, question.due = moment, None
            if name:
                self._ids.add(name)
            else:  # not taken: the node is not known at the moment
                question.due = self._monotonic() + question.pause_s
                question.pause_s = min(2 * question.pause_s, _LONGEST_PAUSE_S)

    def _came_back(self) -> list[_Question]:
        """Return the questions whose node was activated after they were asked: what it had is lost."""
        nodes = {node.node_id: _seconds(node.last_activated_at) for node in self._grid.get_nodes()}
        return [
            question
            for question in self._open.values()
            if question.due is None and nodes.get(question.node_id, 0.0) > question.asked
        ]


def _seconds(stamp: str) -> float:
    """Return a node's ISO time as POSIX seconds, 0 where it has none."""
    try:
        moment = datetime.fromisoformat(stamp)
    except ValueError:
        return 0.0
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()

"""Asking sites whose people have to decide: the same request again, until they did or the time is up."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from flwr.app import Message

from federation.exchange import Answer, Exchange, Request

WAITING: Final = "waiting_for_site"
PATIENCE_S: Final = 900.0
_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 10.0

Answers = dict[str, tuple[Answer, Message | None]]


def is_waiting(answer: Answer) -> bool:
    """Whether the site's people have yet to decide."""
    return answer.header.get("error") == WAITING


def ask_patiently(
    exchange: Exchange,
    requests: Mapping[str, Request],
    *,
    timeout_s: float,
    patience_s: float = PATIENCE_S,
    waiting: Callable[[tuple[str, ...]], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
    monotonic: Callable[[], float] = time.monotonic,
) -> Answers:
    """Ask, and ask those again that answer `waiting_for_site`, ever less often, for `patience_s` in all.

    `waiting` is told of the sites that are waited for, each time they change. A site that is still waiting
    at the end keeps that answer. An agent that was killed is in trouble until it is there again, on a busy
    machine for longer than a round should wait: before the first round nothing is lost by waiting.
    """
    answers: Answers = exchange.ask(requests, timeout_s=timeout_s, trouble_s=timeout_s)
    deadline, pause = monotonic() + patience_s, _FIRST_PAUSE_S
    told: tuple[str, ...] = ()
    while True:
        undecided = tuple(sorted(site for site in requests if is_waiting(answers[site][0])))
        if undecided != told and waiting is not None and undecided:
            waiting(undecided)
        told = undecided
        left = deadline - monotonic()
        if not undecided or left <= 0:
            return answers
        sleep(min(pause, left))
        pause = min(pause * 1.6, _LONGEST_PAUSE_S)
        again = {site: requests[site] for site in undecided}
        answers |= exchange.ask(again, timeout_s=timeout_s, trouble_s=timeout_s)

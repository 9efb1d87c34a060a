"""Rows of requests that arrive together go through the model together, where that pays.

Alone, a request runs at once. In a crowd, the rows that gather within one turn of the event loop share one
run, up to a limit, if runs of this model are long enough for the sharing to cost less than it saves; that
is measured as the model runs. No timer: nobody waits for a companion that may not come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from server.answer_cache import AnswerCache
from server.warm import WarmModel

WORTH_S: Final = 0.00005  # a run of one row under this is cheaper than the hand-over
MAX_ROWS: Final = 256
_INLINE_ROWS: Final = 16  # more rows than this are computed beside the event loop
_SMOOTH: Final = 0.1

_Key = tuple[int, int | None, asyncio.AbstractEventLoop]
Rows = Sequence[Sequence[float]]
Outputs = list[list[float]]


@dataclass(slots=True)
class _Gathering:
    warm: WarmModel
    site: int | None
    waiting: list[tuple[Rows, asyncio.Future[Outputs]]] = field(default_factory=list)
    rows: int = 0


class Batching:
    """Runs models for the requests of a worker; those of one event loop share runs."""

    def __init__(
        self, cache: AnswerCache | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._cache = cache
        self._clock = clock
        self._cost_s: dict[int, float] = {}  # by model in memory: seconds of a run of one row, smoothed
        self._gathering: dict[_Key, _Gathering] = {}
        self.in_flight = 0  # requests between arrival and answer
        self.shared_runs = 0

    async def run(self, warm: WarmModel, encoded: Rows, site: int | None, asker: str = "") -> Outputs:
        """Return the model's outputs for these rows; those of a moment ago to the same asker where the
        charter allows it.
        """
        key = None if self._cache is None else self._cache.key(warm, encoded, site, asker)
        if key is None or self._cache is None:
            return await self._computed(warm, encoded, site)
        kept = self._cache.get(key)
        if kept is None:
            kept = await self._computed(warm, encoded, site)
            self._cache.put(key, kept)
        return kept

    async def _computed(self, warm: WarmModel, encoded: Rows, site: int | None) -> Outputs:
        if len(encoded) > _INLINE_ROWS:
            return await asyncio.to_thread(warm.forward, encoded, site)
        cost_s = self._cost_s.get(id(warm))
        if self.in_flight < 2 or cost_s is None or cost_s < WORTH_S:
            return self._alone(warm, encoded, site)
        loop = asyncio.get_running_loop()
        key = (id(warm), site, loop)  # a future is woken by its own loop alone
        gathering = self._gathering.get(key)
        if gathering is None or gathering.rows + len(encoded) > MAX_ROWS:
            gathering = self._gathering[key] = _Gathering(warm, site)
            loop.call_soon(self._together, key, gathering)
        future: asyncio.Future[Outputs] = loop.create_future()
        gathering.waiting.append((encoded, future))
        gathering.rows += len(encoded)
        return await future

    def _alone(self, warm: WarmModel, encoded: Rows, site: int | None) -> Outputs:
        begun = self._clock()
        outputs = warm.forward(encoded, site)
        self._learn(warm, (self._clock() - begun) / max(len(encoded), 1))
        return outputs

    def _learn(self, warm: WarmModel, taken_s: float) -> None:
        before = self._cost_s.get(id(warm), taken_s)
        if len(self._cost_s) > 256:
            self._cost_s.clear()
        self._cost_s[id(warm)] = before + _SMOOTH * (taken_s - before)

    def _together(self, key: _Key, gathering: _Gathering) -> None:
        if self._gathering.get(key) is gathering:
            del self._gathering[key]
        rows = [row for encoded, _ in gathering.waiting for row in encoded]
        begun = self._clock()
        try:
            outputs = gathering.warm.forward(rows, gathering.site)
        except Exception as error:  # noqa: BLE001 - each of those who share the run hears of it
            for _, future in gathering.waiting:
                if not future.done():
                    future.set_exception(error)
            return
        taken_s = self._clock() - begun
        if taken_s < self._cost_s.get(id(gathering.warm), 0.0):
            # All of them took less than one was thought to: a hiccup must not have the model shared for ever.
            self._learn(gathering.warm, taken_s)
        self.shared_runs += len(gathering.waiting) > 1
        start = 0
        for encoded, future in gathering.waiting:
            if not future.done():
                future.set_result(outputs[start : start + len(encoded)])
            start += len(encoded)

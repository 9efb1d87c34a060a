"""Requests that arrive in one turn of the event loop are answered together: each step for all, then the next.

Nothing is shared but the processor: every request has its own decision, salts, entry and receipt, as if it
had come alone. A step that has just run for one request runs for the next in two thirds of the time, because
its code and its data are still in the caches; the runs of a model are one run, and one signature covers the
receipts. What would have to wait for anything (a model that is not in memory, a refusal's entry, a vault) is
no matter for a crowd: such a request is sent back, and `server.service` goes its way with it alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from audit.entries import RowCommitment
from audit.errors import AuditError, StaleViewError
from audit.ledger import AppendRequest, Guard, Sequenced
from audit.prediction_form import PredictionForm
from audit.principal import Decision, Principal, Question
from server.answers import (
    Answered,
    Asked,
    Commitments,
    Opened,
    commit_row,
    commit_rows,
    encode,
    entry_of,
)
from server.errors import MalformedRequestError, RowContractError, ServerError
from server.hooks import Annotation, Answering, with_fields
from server.journal import ACTOR, Journal
from server.live import ServedVersion
from server.quotas import Taken
from server.warm import WarmModel

if TYPE_CHECKING:
    from server.service import PredictService

_logger = logging.getLogger(__name__)

MAX_ROWS: Final = 16  # of one request; more take their time
MAX_CROWD: Final = 64  # requests; the others of the turn are the next crowd
_LARGE: Final = 32  # as many gain no more by another
_ALONE: Final = 2  # in two answers
_EMPTY_TURNS: Final = 4
_HELD_S: Final = 0.02  # a commit takes a few milliseconds; where it takes longer, its crowd is not waited for
_FORMS: Final = 256  # of callers and versions, whose entries' text is kept
SENT_BACK: Final = object()
"""What a request is told that must be answered alone: nothing was done for it."""


@dataclass(slots=True, eq=False)
class Job:
    """One request on its way through the steps. It waits for its own entry (`audit.ledger.LoopWaiter`)."""

    principal: Principal
    read: Callable[[], Asked]
    tell: Callable[[Answered], Any]
    taken: Taken = field(default_factory=lambda: Taken(True))
    is_read: bool = False
    refused: ServerError | None = None  # what is wrong with what it asks
    is_chosen: bool = False
    is_decided: bool = False
    asked: Asked = field(init=False)
    served: ServedVersion = field(init=False)
    guard: Guard = field(init=False)
    crowd: Crowd = field(init=False)
    future: asyncio.Future[Any] = field(init=False)
    context: contextvars.Context = field(init=False)
    question: Question = field(init=False)
    decision: Decision = field(init=False)
    warm: WarmModel = field(init=False)
    site: int | None = field(init=False)
    plain: list[dict[str, Any]] = field(init=False)
    encoded: list[list[float]] = field(init=False)
    answers: tuple[dict[str, Any], ...] = field(init=False)
    margins: tuple[float | None, ...] = field(init=False)
    answering: Answering = field(init=False)
    added: Annotation = field(init=False)
    commitments: RowCommitment | Commitments = field(init=False)
    opened: Opened = field(init=False)
    entry: AppendRequest = field(init=False)
    begun: float = field(init=False)
    sequenced: Sequenced = field(init=False)

    # `audit.ledger.LoopWaiter`

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.future.get_loop()

    def done(self) -> bool:
        return self.future.done()

    def set_result(self, sequenced: Sequenced, /) -> None:
        self.sequenced = sequenced
        self.crowd.durable(self)

    def set_exception(self, exception: Exception, /) -> None:
        self.crowd.failed(self, exception)


class _Together:
    """The requests whose entries were queued together, as far as they are waited for."""

    __slots__ = ("_journal", "_waiting")

    def __init__(self, jobs: list[Job], journal: Journal) -> None:
        self._journal = journal
        self._waiting = [(job.future, job.context) for job in jobs]

    def done(self) -> bool:
        return not self.waiting()

    def waiting(self) -> int:
        return sum(not future.done() for future, _ in self._waiting)

    def set_exception(self, exception: Exception, /) -> None:
        for future, context in self._waiting:
            if not future.done():
                future.set_exception(context.run(self._journal.failed, exception))


class Crowd:
    """Takes the requests of one event loop."""

    def __init__(self, service: PredictService) -> None:
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._claiming = threading.Lock()
        self._clean = contextvars.Context()  # in which no request's marks stand
        self._gathered: list[Job] = []
        self._durable: list[Job] = []
        self._decided: dict[tuple[Any, ...], tuple[Question, Decision]] = {}
        self._forms: dict[tuple[Any, ...], tuple[PredictionForm, Principal, ServedVersion, Decision]] = {}
        self._told = self._told_before = 0  # how many were answered together last, and before that
        self._sent: list[_Together] = []  # whose entries the log has
        self._held: asyncio.TimerHandle | None = None  # ends the wait for those
        self._seen = self._empty_turns = 0  # of the crowd that gathers: how many, and turns without another

    def join(self, job: Job) -> asyncio.Future[Any]:
        """Return what `job.tell` makes of the answer, or `SENT_BACK`.

        Raises:
            StaleViewError: the model's versions changed meanwhile; nothing was written.
            LedgerUnavailableError: the entry is not, or not known to be, durable.
        """
        loop = asyncio.get_running_loop()
        job.crowd, job.future, job.context = self, loop.create_future(), contextvars.copy_context()
        if self._loop is not loop and not self._is_claimed_by(loop):
            _send_back([job])  # a crowd is of one loop
            return job.future
        self._gathered.append(job)
        if len(self._gathered) == 1:
            self._seen = self._empty_turns = 0
            loop.call_soon(self._look, context=self._clean)
        elif self._held is not None and len(self._gathered) >= self._with_the_log():
            self._release()
        return job.future

    def _is_claimed_by(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Make this loop's requests the crowd, unless another loop that runs did so first."""
        with self._claiming:
            if self._loop is not None and self._loop.is_running():
                return False
            self._loop, self._gathered, self._durable, self._sent, self._held = loop, [], [], [], None
            return True

    def durable(self, job: Job) -> None:
        """The entry of `job` is on disk; those of one batch are told so in one turn."""
        if not self._durable:
            job.get_loop().call_soon(self._finish, context=self._clean)
        self._durable.append(job)

    def failed(self, job: Job, error: Exception) -> None:
        """The entry of `job` is not known to be on disk."""
        if not job.future.done():
            if not isinstance(error, StaleViewError):
                error = job.context.run(self._service.journal.failed, error)
            job.future.set_exception(error)
        self._release()

    def _look(self) -> None:
        """At the end of a turn: go, unless others are worth waiting for.

        As long as the log has more of ours than wait here, it would keep these waiting too. After that, those
        whom the last answers went to are mostly back within a few turns.
        """
        if self._held is not None or not self._gathered:
            return
        loop, count = asyncio.get_running_loop(), len(self._gathered)
        self._empty_turns = 0 if count > self._seen else self._empty_turns + 1
        self._seen = count
        usual = self._told + self._told_before
        if count >= _LARGE:
            self._go()
        elif count < self._with_the_log():
            self._held = loop.call_later(_HELD_S, self._go, context=self._clean)
        elif count < usual and usual > _ALONE and self._empty_turns < _EMPTY_TURNS:
            loop.call_soon(self._look, context=self._clean)
        else:
            self._go()

    def _with_the_log(self) -> int:
        """How many of ours the log has; those that were told are forgotten."""
        self._sent = [together for together in self._sent if not together.done()]
        return sum(together.waiting() for together in self._sent)

    def _release(self) -> None:
        """Some of those with the log have been told: whoever was held looks again."""
        if self._held is not None:
            self._held.cancel()
            self._held, self._empty_turns = None, 0
            asyncio.get_running_loop().call_soon(self._look, context=self._clean)

    def _go(self) -> None:
        if self._held is not None:
            self._held.cancel()
            self._held = None
        jobs, self._gathered = self._gathered[:MAX_CROWD], self._gathered[MAX_CROWD:]
        if self._gathered:
            asyncio.get_running_loop().call_soon(self._go, context=self._clean)
        try:
            self._take([job for job in jobs if not job.future.done()])
        except Exception as error:
            _logger.exception("a crowd was broken off")
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(_another(error))

    def _take(self, jobs: list[Job]) -> None:
        self._decided.clear()
        for step in (self._read, self._choose, self._decide, self._encode):
            jobs = _each(step, jobs)
        jobs = self._compute(jobs)
        for step in (self._annotate, self._commit, self._prepare):
            jobs = _each(step, jobs)
        if jobs:
            self._append(jobs)

    def _append(self, jobs: list[Job]) -> None:
        journal, begun = self._service.journal, time.perf_counter()
        for job in jobs:
            job.begun = begun
        together = _Together(jobs, journal)
        try:
            journal.append_all([(job.entry, job) for job in jobs], together)
        except AuditError as error:
            together.set_exception(error)
        else:
            self._sent.append(together)

    def _read(self, job: Job) -> bool:
        asked = job.asked = job.read()
        job.is_read = True
        return not (asked.subject or asked.consent or asked.explain) and 0 < len(asked.rows) <= MAX_ROWS

    def _choose(self, job: Job) -> bool:
        service, asked = self._service, job.asked
        job.guard = service.live.guard
        job.served = service.live.choose(asked.model, asked.version, draw=True)
        job.is_chosen = True
        return True

    def _decide(self, job: Job) -> bool:
        service, asked = self._service, job.asked
        same = (asked.purpose, asked.legal_basis, asked.consent, job.taken.allowed)
        key = (id(job.principal), id(job.served), *same)
        found = self._decided.get(key)
        if found is None:
            found = job.context.run(service.decided, job.principal, asked, job.served, job.taken)
            if service.hooks.are_shared:
                self._decided[key] = found  # for this turn alone: what it rests on is as it was
        job.question, job.decision = found
        job.is_decided = True
        return job.decision.allowed

    def _encode(self, job: Job) -> bool:
        warm = self._service.warm.ready(job.served)
        if warm is None or warm.terms.cache:
            return False
        job.warm, job.site = warm, warm.site_index(job.asked.site)
        job.plain, job.encoded = encode(warm, job.asked)
        return True

    def _compute(self, jobs: list[Job]) -> list[Job]:
        groups: dict[tuple[int, int | None], list[Job]] = {}
        for job in jobs:
            groups.setdefault((id(job.warm), job.site), []).append(job)
        left = []
        for group in groups.values():
            warm, site = group[0].warm, group[0].site
            rows = [row for job in group for row in job.encoded]
            try:
                outputs = warm.forward(rows, site)
            except Exception:  # noqa: BLE001 - each meets it again alone, and tells its caller
                _send_back(group)
                continue
            start = 0
            for job in group:
                stop = start + len(job.encoded)
                try:
                    job.answers = tuple(warm.answers_of(outputs[start:stop]))
                    job.margins = warm.margins_of(outputs[start:stop])
                except Exception:  # noqa: BLE001 - as above
                    _send_back([job])
                else:
                    left.append(job)
                start = stop
        return left

    def _annotate(self, job: Job) -> bool:
        job.answering = Answering(
            principal=job.principal,
            asked=job.asked,
            served=job.served,
            decision=job.decision,
            plain=job.plain,
            encoded=job.encoded,
            answers=job.answers,
            margins=job.margins,
        )
        added = job.context.run(self._service.hooks.annotate_now, job.answering)
        if added is None:
            return False
        job.added = added
        return True

    def _commit(self, job: Job) -> bool:
        outputs = job.added.outputs(job.answers)
        if len(outputs) == 1 and not job.added.body:
            given, said, opened = commit_row(job.plain[0], outputs[0])
            job.commitments, job.opened = RowCommitment(input=given, output=said), (opened,)
        else:
            job.commitments, job.opened = commit_rows(job.plain, outputs)
        return True

    def _prepare(self, job: Job) -> bool:
        journal, answering, made = self._service.journal, job.answering, job.commitments
        if isinstance(made, Commitments):
            body = with_fields(entry_of(answering, made), job.added.body)
            job.entry = journal.prepared(body, job.guard)
        else:
            job.entry = self._form_of(answering).request(
                time=journal.now_text(),
                request_id=job.asked.request_id,
                input=made.input,
                output=made.output,
                guard=job.guard,
            )
        return True

    def _form_of(self, answering: Answering) -> PredictionForm:
        """The form of this caller's entries; what it is known by is kept, so that no other takes its id."""
        principal, served, decision = answering.principal, answering.served, answering.decision
        asked = answering.asked
        key = (id(principal), id(served), id(decision), asked.purpose, asked.site, asked.legal_basis)
        found = self._forms.get(key)
        if found is None:
            if len(self._forms) >= _FORMS:
                self._forms.clear()
            form = PredictionForm(entry_of(answering, Commitments()), actor=ACTOR)
            found = self._forms[key] = (form, principal, served, decision)
        return found[0]

    def _finish(self) -> None:
        jobs, self._durable = self._durable, []
        self._told, self._told_before = len(jobs), self._told
        jobs = [job for job in jobs if not job.future.done()]
        try:
            if jobs:
                self._tell(jobs)
        except Exception as error:  # noqa: BLE001 - their entries are durable; each of them hears of it
            for job in jobs:
                if not job.future.done():
                    job.future.set_exception(_another(error))
        self._with_the_log()
        self._release()

    def _tell(self, jobs: list[Job]) -> None:
        service = self._service
        receipts = service.receipting.receipts([job.sequenced for job in jobs])
        service.journal.durable(time.perf_counter() - jobs[0].begun)
        answered: list[tuple[Job, Answered]] = []
        for job, receipt in zip(jobs, receipts, strict=True):
            made = (job.answering, job.added, job.guard, job.sequenced, receipt, job.opened)
            try:
                answered.append((job, job.context.run(service.finished, *made)))
            except Exception as error:  # noqa: BLE001 - its caller hears of it
                job.future.set_exception(error)
        for job, answer in answered:
            try:
                job.future.set_result(job.context.run(job.tell, answer))
            except Exception as error:  # noqa: BLE001 - as above
                job.future.set_exception(error)


def _another(error: Exception) -> Exception:
    """An error of several requests, for one of them: a raised one remembers where it was raised."""
    try:
        return type(error)(*error.args)
    except Exception:  # noqa: BLE001 - it is made of more than its arguments
        return error


def _each(step: Callable[[Job], bool], jobs: list[Job]) -> list[Job]:
    left = []
    for job in jobs:
        try:
            if step(job):
                left.append(job)
                continue
        except (MalformedRequestError, RowContractError) as error:
            job.refused = error  # which alone it need not be read again to be told
        except Exception as error:  # noqa: BLE001 - it is met again alone, and told there
            _logger.debug("sent back: %s", type(error).__name__)
        _send_back([job])
    return left


def _send_back(jobs: Iterable[Job]) -> None:
    for job in jobs:
        job.future.set_result(SENT_BACK)

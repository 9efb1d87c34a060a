"""The use case `predict`: decide, answer, and let the answer go only after its entry is durable.

Order: the version that would answer (`server.live`) - the facts (`server.hooks`) - the decision
(`audit.principal`) - the rows (`server.warm`, `server.batching`) - the annotations - the entry
(`server.journal`) - the receipt (`server.receipting`). A refusal by policy is an entry too. The entry is
refused by the ledger when a transition came after the view that the decision rests on; then all of it is
done again on what the log says now. Where the request names a person, what it says of them goes to the vault
before the entry is written, and the entry holds a pseudonym and roots of commitments (`audit.disclosure`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, TypeVar

from audit.canonical import canonical_bytes
from audit.chance import entry_names
from audit.disclosure import CONTEXT, new_part
from audit.entries import Prediction, PredictionDenied, RowCommitment
from audit.errors import LedgerBusyError, StaleViewError
from audit.ledger import Guard, Sequenced
from audit.principal import (
    AccessDeniedError,
    AttributeValue,
    Authorizer,
    Decision,
    Principal,
    Question,
)
from audit.vault_records import PERSON
from federation.registry import LIVE
from server.answers import Answered, Asked, Commitments, Opened, commit_rows, encode, entry_of, never_final
from server.batching import Batching
from server.crowd import SENT_BACK, Crowd, Job
from server.errors import (
    ArtefactError,
    LedgerUnavailableError,
    MalformedRequestError,
    RowContractError,
    ServerError,
    TooBusyError,
)
from server.explaining import ExplainRefusedError, ExplainUnavailableError
from server.facts import ModelAttributes, has_legal_effect
from server.hooks import Annotation, Answering, Hooks, with_fields
from server.journal import Journal
from server.live import LiveModels, ServedVersion
from server.monitoring import Monitoring
from server.quotas import Quotas, Taken
from server.receipting import Receipting
from server.sealing import Sealing
from server.shadowing import Shadowing
from server.warm import WarmModels

QUOTA: Final = "quota-exhausted"  # the policy whose refusal is worth another try later
_TRIES: Final = 20  # transitions that may come one after the other while a request is answered
MAX_SEALED_ROWS: Final = 384  # a sealed entry holds its rows itself: two commitments each
_OF_VERSION: Final = (RowContractError, ArtefactError, ExplainRefusedError, ExplainUnavailableError)
_INLINE_ROWS: Final = 64  # more rows than this are encoded and committed to beside the event loop

Told = TypeVar("Told")


class PredictionDeniedError(AccessDeniedError):
    """The policies refused a prediction; the refusal is entry `entry`."""

    code = "predict.denied"

    def __init__(self, denied: AccessDeniedError, sequenced: Sequenced | None) -> None:
        super().__init__(denied.principal, denied.question, denied.decision)
        if sequenced is not None:
            self.entry = {"leaf_index": sequenced.leaf_index, "leaf_hash": sequenced.leaf_hash.hex()}


class QuotaExceededError(PredictionDeniedError):
    """The quota stood against it, whatever else did. The first refusal of a window is an entry, no later one:
    else who is over quota could fill the log by asking for another purpose.
    """

    code = "predict.quota"

    def __init__(self, denied: AccessDeniedError, sequenced: Sequenced | None, retry_after_s: int) -> None:
        super().__init__(denied, sequenced)
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class PredictService:
    """Answers for one log."""

    live: LiveModels
    warm: WarmModels
    authorizer: Authorizer
    journal: Journal
    receipting: Receipting
    monitoring: Monitoring
    sealing: Sealing
    hooks: Hooks = field(default_factory=Hooks)
    batching: Batching = field(default_factory=Batching)
    attributes: ModelAttributes = field(default_factory=ModelAttributes)
    shadowing: Shadowing | None = None
    quotas: Quotas | None = None
    crowd: Crowd = field(init=False)

    def __post_init__(self) -> None:
        self.crowd = Crowd(self)

    async def predict(self, principal: Principal, asked: Asked) -> Answered:
        """`answer` as it is."""
        return await self.answer(principal, lambda: asked, lambda answered: answered)

    async def answer(
        self, principal: Principal, read: Callable[[], Asked], tell: Callable[[Answered], Told]
    ) -> Told:
        """Answer what `read` returns, or refuse; return what `tell` makes of the answer.

        Both are called in the loop, beside those of other requests.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is nothing of that name.
            PredictionDeniedError: the policies refused; it is in the log.
            QuotaExceededError: the caller's quota is used up.
            RowContractError: a row is outside the charter's data contract.
            MalformedRequestError: more rows than a sealed entry or a whole quota holds.
            ArtefactError: the registry's copy of the version cannot be used.
            LedgerUnavailableError: the entry did not become durable, so there is no answer.
            TooBusyError: the model's versions kept changing.
            Exception: whatever `read` raises.
        """
        taken = Taken(True)
        if self.quotas is not None and self.quotas.limits:
            asked = _checked(read())
            _fits(asked, self.quotas.most_rows)
            try:
                taken = await self.quotas.taken(principal.id, len(asked.rows))
            except LedgerUnavailableError as error:
                if not isinstance(error.__cause__, LedgerBusyError):  # which stops its principal alone
                    self.journal.recording.failed()  # the entry goes to the same database, or disk
                raise
            read = partial(_same, asked)
        self.batching.in_flight += 1
        try:
            for _ in range(_TRIES):
                job = Job(principal, read, tell, taken)
                try:
                    told = await self.crowd.join(job)
                    if told is SENT_BACK:
                        told = tell(await self._alone(job))
                    answered: Told = told
                    return answered
                except StaleViewError:
                    await asyncio.to_thread(self.live.refresh)
                    read = partial(_same, job.asked)
            raise TooBusyError("the model's versions keep changing; try again")
        finally:
            self.batching.in_flight -= 1

    async def _alone(self, job: Job) -> Answered:
        """Answer what a crowd sent back: with the version that was drawn there, if any was."""
        if job.refused is not None and not self._may_be_the_canarys(job.refused, job):
            raise job.refused
        principal, asked = job.principal, _checked(job.asked if job.is_read else job.read())
        job.asked, job.is_read = asked, True
        if not job.is_chosen:
            job.guard = self.live.guard
            job.served = self.live.choose(asked.model, asked.version, draw=True)
        if not job.is_decided:
            job.question, job.decision = self.decided(principal, asked, job.served, job.taken)
        if not job.decision.allowed:
            self._leaves_canary(job)
        try:
            answering, added = await self._answered(job)
        except _OF_VERSION:
            if not self._leaves_canary(job):
                raise
            answering, added = await self._answered(job)
        guard, plain, many = job.guard, answering.plain, len(asked.rows) > _INLINE_ROWS
        said, sealed = added.outputs(answering.answers), None
        if asked.subject is None:
            commitments, opened = (
                await asyncio.to_thread(commit_rows, plain, said) if many else commit_rows(plain, said)
            )
            body = with_fields(entry_of(answering, commitments), added.body)
            sequenced = await self.journal.append(body, guard=guard)
        else:
            body = with_fields(entry_of(answering, Commitments()), added.body)
            sequenced, opened, sealed = await self._sealed(body, asked, plain, said, guard)
        receipt = await self.receipting.receipt(sequenced)
        return self.finished(answering, added, guard, sequenced, receipt, opened, sealed)

    async def _answered(self, job: Job) -> tuple[Answering, Annotation]:
        """Return what the chosen version says, and what is added to it; nothing is in the log yet.

        Raises:
            PredictionDeniedError: it may not answer; the refusal is in the log.
            ServerError: as `answer`.
        """
        if not job.decision.allowed:
            raise await self._refused(job)
        principal, asked, served = job.principal, job.asked, job.served
        warm = self.warm.ready(served)
        if warm is None:
            warm = await asyncio.to_thread(self.warm.get, served)
        many = len(asked.rows) > _INLINE_ROWS
        plain, encoded = await asyncio.to_thread(encode, warm, asked) if many else encode(warm, asked)
        outputs = await self.batching.run(warm, encoded, warm.site_index(asked.site), principal.id)
        answering = Answering(
            principal=principal,
            asked=asked,
            served=served,
            decision=job.decision,
            plain=plain,
            encoded=encoded,
            answers=tuple(warm.answers_of(outputs)),
            margins=warm.margins_of(outputs),
        )
        return answering, await self.hooks.annotate(answering)

    def _may_be_the_canarys(self, refused: ServerError, job: Job) -> bool:
        """Whether a crowd's refusal is of the canary's charter; if so, the request is moved as below."""
        return job.is_decided and isinstance(refused, _OF_VERSION) and self._leaves_canary(job)

    def _leaves_canary(self, job: Job) -> bool:
        """Move a request that was drawn to a canary to the live version; say whether it was one.

        Nobody is refused because of a canary: where its charter does not allow the question or the rows, or
        its file cannot be used, the live version answers or refuses as if there were no trial.
        """
        live = self.live.instead_of(job.served) if job.asked.version is None else None
        if live is None:
            return False
        self.monitoring.canary_passed.labels(live.model).inc()
        job.served = live
        job.question, job.decision = self.decided(job.principal, job.asked, live, job.taken)
        return True

    def question(self, principal: Principal, asked: Asked, served: ServedVersion, taken: Taken) -> Question:
        """Return what the policies are asked, with all the facts."""
        found = self.hooks.gather(principal, asked, served)
        context: dict[str, AttributeValue] = {"purpose": asked.purpose, **found.context}
        if not taken.allowed:
            context["over_quota"] = True
        return Question(
            action="predict",
            resource=served.model,
            attributes=self.attributes.of(served, found.resource),
            context=context,
        )

    def finished(
        self,
        answering: Answering,
        added: Annotation,
        guard: Guard,
        sequenced: Sequenced,
        receipt: dict[str, Any],
        opened: Opened,
        sealed: dict[str, str] | None = None,
    ) -> Answered:
        """Return the answer, whose entry is durable, after all have been told who watch answers."""
        served, asked = answering.served, answering.asked
        self.live.confirm(guard, sequenced.leaf_index)
        self.monitoring.predicted(served.model, len(answering.answers))
        answered = Answered(
            model=served.model,
            version=served.version,
            answers=answering.answers,
            decision=answering.decision,
            request_id=asked.request_id,
            leaf_index=sequenced.leaf_index,
            leaf_hash=sequenced.leaf_hash.hex(),
            entry_id=sequenced.event_id,
            receipt=receipt,
            opened=opened,
            sealed=sealed,
            annotations=added.shown,
            review=sequenced.event_id if has_legal_effect(served.charter) else "",
            never_final=never_final(answering.principal.role, served.transition),
        )
        self.hooks.observe(answering, answered)
        if self.shadowing is not None:
            for shadow in self.live.shadows(served.model):
                self.shadowing.ask(shadow, answering, answered.leaf_hash, self.would_allow)
        return answered

    async def _sealed(
        self,
        body: Prediction,
        asked: Asked,
        plain: Sequence[Mapping[str, Any]],
        answers: Sequence[Mapping[str, Any]],
        guard: Guard,
    ) -> tuple[Sequenced, Opened, dict[str, str]]:
        """Seal what the answer says of a person, then append the entry that commits to it.

        In this order an acknowledged entry never lacks its record. What a failed append leaves in the vault
        has no entry, was told to nobody, and is swept.
        """
        event_id, _ = entry_names(self.journal.now_text())
        said = {"legal_basis": asked.legal_basis, "consent": asked.consent}
        context = new_part(
            {"purpose": body.purpose, "request_id": body.request_id, **{k: v for k, v in said.items() if v}}
        )
        rows = [
            (new_part(dict(row)), new_part(dict(answer))) for row, answer in zip(plain, answers, strict=True)
        ]
        parts = {CONTEXT: context}
        for number, (given, answered) in enumerate(rows):
            parts[f"row.{number}.input"], parts[f"row.{number}.output"] = given, answered
        sealed = await self.sealing.seal(
            kind=PERSON, name=asked.subject or "", event_id=event_id, type="prediction", parts=parts
        )
        commitments = tuple(
            RowCommitment(input=given.root(f"row.{n}.input"), output=answered.root(f"row.{n}.output"))
            for n, (given, answered) in enumerate(rows)
        )
        entry = replace(
            body,
            purpose="",
            request_id="",
            legal_basis="",
            rows=commitments,
            subject=sealed.pseudonym,
            context=context.root(CONTEXT),
            sealed=sealed.digest,
        )
        sequenced = await self.journal.append(entry, event_id=event_id, guard=guard)
        opened = tuple(
            {
                "input_salt": given.salt.hex(),
                "output_salt": answered.salt.hex(),
                "input": canonical_bytes(dict(given.values)).decode(),
                "output": canonical_bytes(dict(answered.values)).decode(),
            }
            for given, answered in rows
        )
        told = {
            "subject": sealed.pseudonym,
            "context_salt": context.salt.hex(),
            "context": canonical_bytes(dict(context.values)).decode(),
        }
        return sequenced, opened, told

    def would_allow(self, principal: Principal, asked: Asked, version: ServedVersion) -> bool:
        """Whether the policies would let `version` answer this were it live: by its own charter's terms."""
        _, decision = self.decided(principal, asked, replace(version, state=LIVE), Taken(True))
        return decision.allowed

    def decided(
        self, principal: Principal, asked: Asked, served: ServedVersion, taken: Taken
    ) -> tuple[Question, Decision]:
        """Return what the policies were asked, and what they said."""
        question = self.question(principal, asked, served, taken)
        return question, self.authorizer.decide(principal, question)

    async def _refused(self, job: Job) -> PredictionDeniedError:
        """Make a refusal an entry; return what its caller is told."""
        principal, asked, served, taken = job.principal, job.asked, job.served, job.taken
        denied = AccessDeniedError(principal, job.question, job.decision)
        for policy in denied.decision.policies:
            self.monitoring.denials.labels("predict", policy).inc()
        is_quota = QUOTA in denied.decision.policies
        if is_quota and not (taken.allowed or taken.is_first):
            return QuotaExceededError(denied, None, taken.retry_after_s)
        sequenced = await self.journal.append(
            PredictionDenied(
                request_id=asked.request_id,
                model=served.model,
                purpose=asked.purpose,
                principal=principal.id,
                role=principal.role,
                reason="quota" if is_quota else "policy",
                policies=denied.decision.policies,
                policy_set=denied.decision.policy_set,
                version=served.version,
                legal_basis=asked.legal_basis or "",
                region=principal.region,
            ),
            guard=job.guard,
        )
        if is_quota:
            return QuotaExceededError(denied, sequenced, taken.retry_after_s)
        return PredictionDeniedError(denied, sequenced)


def _same(asked: Asked) -> Asked:
    return asked


def _fits(asked: Asked, most: int) -> None:
    """Refuse what no window has room for, however long its caller waits."""
    if len(asked.rows) > most:
        problem = f"{len(asked.rows)} rows, and the quota of a whole window is {most}: send fewer a request"
        raise MalformedRequestError(f"rows: {problem}", fields=[{"field": "rows", "problem": problem}])


def _checked(asked: Asked) -> Asked:
    if asked.subject is not None and len(asked.rows) > MAX_SEALED_ROWS:
        problem = f"{len(asked.rows)} rows about one person; at most {MAX_SEALED_ROWS} fit in one entry"
        raise MalformedRequestError(f"rows: {problem}", fields=[{"field": "rows", "problem": problem}])
    if asked.consent is not None and asked.subject is None:
        problem = "names the consent of nobody: give `subject` too, so that it goes to the vault"
        raise MalformedRequestError(f"consent: {problem}", fields=[{"field": "consent", "problem": problem}])
    return asked

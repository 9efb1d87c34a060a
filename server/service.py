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
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from audit.canonical import canonical_bytes
from audit.commitments import commit, new_salt
from audit.disclosure import CONTEXT, new_part
from audit.encoding import EncodingError, PlainRow, plain_row
from audit.entries import Prediction, PredictionDenied, RowCommitment
from audit.errors import StaleViewError
from audit.ledger import Guard, Sequenced
from audit.principal import (
    AccessDeniedError,
    AttributeValue,
    Authorizer,
    Decision,
    Principal,
    Question,
    require,
)
from audit.row_tree import RowTree
from audit.vault_records import PERSON
from server.batching import Batching
from server.errors import MalformedRequestError, RowContractError, TooBusyError
from server.facts import ModelAttributes, has_legal_effect
from server.hooks import Answering, Hooks, with_fields
from server.journal import Journal
from server.live import LiveModels, ServedVersion
from server.monitoring import Monitoring
from server.quotas import Quotas, Taken
from server.receipting import Receipting
from server.sealing import Sealing
from server.shadowing import Shadowing
from server.warm import WarmModel, WarmModels
from server.watching import Level

QUOTA: Final = "quota-exhausted"  # the policy whose refusal is worth another try later
_TRIES: Final = 20  # transitions that may come one after the other while a request is answered
MAX_SEALED_ROWS: Final = 384  # a sealed entry holds its rows itself: two commitments each
_INLINE_ROWS: Final = 64  # more rows than this are encoded and committed to beside the event loop

Opened = tuple[dict[str, str], ...]


class PredictionDeniedError(AccessDeniedError):
    """The policies refused a prediction; the refusal is entry `entry`."""

    code = "predict.denied"

    def __init__(self, denied: AccessDeniedError, sequenced: Sequenced | None) -> None:
        super().__init__(denied.principal, denied.question, denied.decision)
        if sequenced is not None:
            self.entry = {"leaf_index": sequenced.leaf_index, "leaf_hash": sequenced.leaf_hash.hex()}


class QuotaExceededError(PredictionDeniedError):
    """Nothing but the quota stood against it. The first refusal of a window is an entry, no later one."""

    code = "predict.quota"

    def __init__(self, denied: AccessDeniedError, sequenced: Sequenced | None, retry_after_s: int) -> None:
        super().__init__(denied, sequenced)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request for answers."""

    model: str
    purpose: str
    rows: Sequence[Mapping[str, Any]]
    site: str | None = None
    version: str | None = None  # a digest, "live" or "candidate"; None: live, or a canary by its share
    subject: str | None = None  # the caller's own id for the person that the rows are about
    legal_basis: str | None = None  # one of audit.serving_bodies.LEGAL_BASES
    consent: str | None = None  # the caller's reference of the person's consent; to the vault
    explain: bool = False  # attribute each answer to its features
    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """The answers and all that proves them."""

    model: str
    version: str
    answers: tuple[dict[str, Any], ...]  # numbers as decimal text
    decision: Decision
    request_id: str
    leaf_index: int
    leaf_hash: str
    entry_id: str  # by which `/v1/receipts` knows it
    receipt: dict[str, Any]
    opened: Opened
    sealed: dict[str, str] | None = None  # of a named person: pseudonym, and what opens the context
    level: Level = "sequenced"
    proof: str | None = None  # C2SP tlog-proof, above "sequenced"
    annotations: Mapping[str, Any] = field(default_factory=dict)  # what `server.hooks` added
    review: str = ""  # what names this decision at /v1/reviews, where a person must review it; else ""


@dataclass(frozen=True, slots=True)
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

    async def predict(self, principal: Principal, asked: Asked) -> Answered:
        """Answer, or refuse.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is nothing of that name.
            PredictionDeniedError: the policies refused; it is in the log.
            QuotaExceededError: the caller's quota is used up.
            RowContractError: a row is outside the charter's data contract.
            MalformedRequestError: more rows than a sealed entry holds.
            ArtefactError: the registry's copy of the version cannot be used.
            LedgerUnavailableError: the entry did not become durable, so there is no answer.
            TooBusyError: the model's versions kept changing.
        """
        if asked.subject is not None and len(asked.rows) > MAX_SEALED_ROWS:
            problem = f"{len(asked.rows)} rows about one person; at most {MAX_SEALED_ROWS} fit in one entry"
            raise MalformedRequestError(f"rows: {problem}", fields=[{"field": "rows", "problem": problem}])
        if asked.consent is not None and asked.subject is None:
            problem = "names the consent of nobody: give `subject` too, so that it goes to the vault"
            raise MalformedRequestError(
                f"consent: {problem}", fields=[{"field": "consent", "problem": problem}]
            )
        taken = Taken(True)
        if self.quotas is not None and self.quotas.limits:
            taken = await asyncio.to_thread(self.quotas.take, principal.id, len(asked.rows))
        self.batching.in_flight += 1
        try:
            for _ in range(_TRIES):
                try:
                    return await self._on_present_view(principal, asked, taken)
                except StaleViewError:
                    await asyncio.to_thread(self.live.refresh)
            raise TooBusyError(f"the versions of {asked.model} keep changing; try again")
        finally:
            self.batching.in_flight -= 1

    async def _on_present_view(self, principal: Principal, asked: Asked, taken: Taken) -> Answered:
        guard = self.live.guard
        served = self.live.choose(asked.model, asked.version, draw=True)
        decision = await self._decide(principal, asked, served, guard, taken)
        warm = self.warm.ready(served)
        if warm is None:
            warm = await asyncio.to_thread(self.warm.get, served)
        many = len(asked.rows) > _INLINE_ROWS
        plain, encoded = await asyncio.to_thread(_encode, warm, asked) if many else _encode(warm, asked)
        answers = await self._answers(warm, encoded, warm.site_index(asked.site))
        answering = Answering(
            principal=principal,
            asked=asked,
            served=served,
            decision=decision,
            plain=plain,
            encoded=encoded,
            answers=answers,
        )
        added = await self.hooks.annotate(answering)
        outputs, sealed = added.outputs(answers), None
        if asked.subject is None:
            commitments, opened = (
                await asyncio.to_thread(_commit, plain, outputs) if many else _commit(plain, outputs)
            )
            body = with_fields(_entry(answering, commitments), added.body)
            sequenced = await self.journal.append(body, guard=guard)
        else:
            body = with_fields(_entry(answering, _Commitments()), added.body)
            sequenced, opened, sealed = await self._sealed(body, asked, plain, outputs, guard)
        self.live.confirm(guard, sequenced.leaf_index)
        receipt = await self.receipting.receipt(sequenced)
        self.monitoring.predicted(served.model, len(answers))
        answered = Answered(
            model=served.model,
            version=served.version,
            answers=answers,
            decision=decision,
            request_id=asked.request_id,
            leaf_index=sequenced.leaf_index,
            leaf_hash=sequenced.leaf_hash.hex(),
            entry_id=sequenced.event_id,
            receipt=receipt,
            opened=opened,
            sealed=sealed,
            annotations=added.shown,
            review=sequenced.event_id if has_legal_effect(served.charter) else "",
        )
        self.hooks.observe(answering, answered)
        if self.shadowing is not None:
            for shadow in self.live.shadows(served.model):
                self.shadowing.ask(shadow, answering, answered.leaf_hash)
        return answered

    async def _answers(
        self, warm: WarmModel, encoded: Sequence[Sequence[float]], site: int | None
    ) -> tuple[dict[str, Any], ...]:
        """What the version says of encoded rows: a function of the three alone, of no request or person."""
        return tuple(warm.answers_of(await self.batching.run(warm, encoded, site)))

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
        event_id = secrets.token_hex(16)
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

    async def _decide(
        self, principal: Principal, asked: Asked, served: ServedVersion, guard: Guard, taken: Taken
    ) -> Decision:
        found = self.hooks.gather(principal, asked, served)
        context: dict[str, AttributeValue] = {"purpose": asked.purpose, **found.context}
        if not taken.allowed:
            context["over_quota"] = True
        question = Question(
            action="predict",
            resource=served.model,
            attributes=self.attributes.of(served, found.resource),
            context=context,
        )
        try:
            return require(self.authorizer, principal, question)
        except AccessDeniedError as denied:
            for policy in denied.decision.policies:
                self.monitoring.denials.labels("predict", policy).inc()
            is_quota = denied.decision.policies == (QUOTA,)
            if is_quota and not taken.is_first:
                raise QuotaExceededError(denied, None, taken.retry_after_s) from denied
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
                guard=guard,
            )
            if is_quota:
                raise QuotaExceededError(denied, sequenced, taken.retry_after_s) from denied
            raise PredictionDeniedError(denied, sequenced) from denied


def _encode(warm: WarmModel, asked: Asked) -> tuple[list[dict[str, Any]], list[list[float]]]:
    quick = [warm.encoder.read_plain(row) for row in asked.rows]
    if None not in quick:
        read = [found for found in quick if found is not None]
        return [plain for plain, _ in read], [encoded for _, encoded in read]
    try:
        plain = [plain_row(row) for row in asked.rows]
    except EncodingError as error:
        fields = [{"field": found.field, "problem": found.message} for found in error.problems]
        raise RowContractError(str(error), fields=fields) from error
    return plain, warm.encode(plain)


@dataclass(frozen=True, slots=True)
class _Commitments:
    """What an entry holds of its rows: one stands in it, many are leaves of a tree."""

    rows: tuple[RowCommitment, ...] = ()
    row_count: int = 0
    rows_root: str = ""


def _entry(answering: Answering, rows: _Commitments) -> Prediction:
    asked, served, decision = answering.asked, answering.served, answering.decision
    principal = answering.principal
    return Prediction(
        request_id=asked.request_id,
        model=served.model,
        version=served.version,
        charter=served.charter_digest,
        transition=served.transition,
        purpose=asked.purpose,
        principal=principal.id,
        role=principal.role,
        site=asked.site or "",
        policies=decision.policies,
        policy_set=decision.policy_set,
        rows=rows.rows,
        row_count=rows.row_count,
        rows_root=rows.rows_root,
        legal_basis=asked.legal_basis or "",
        region=principal.region,
    )


def _commit(
    plain: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> tuple[_Commitments, Opened]:
    """Return the commitments to each row and answer, and what opens them."""
    commitments: list[RowCommitment] = []
    opened: list[dict[str, str]] = []
    for row, answer in zip(plain, answers, strict=True):
        input_text = row.canonical() if type(row) is PlainRow else canonical_bytes(row)
        output_text = canonical_bytes(answer)
        input_salt, output_salt = new_salt(), new_salt()
        commitments.append(
            RowCommitment(
                input=commit("input", input_salt, input_text),
                output=commit("output", output_salt, output_text),
            )
        )
        opened.append(
            {
                "input_salt": input_salt.hex(),
                "output_salt": output_salt.hex(),
                "input": input_text.decode(),
                "output": output_text.decode(),
            }
        )
    if len(commitments) == 1:
        return _Commitments(rows=tuple(commitments)), tuple(opened)
    tree = RowTree(commitments)
    for number, row in enumerate(opened):
        row["row"], row["path"] = str(number), tree.path(number)
    return _Commitments(row_count=len(commitments), rows_root=tree.root), tuple(opened)

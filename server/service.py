"""The use case `predict`: decide, answer, and let the answer go only after its entry is durable.

Order: the version that would answer (`server.live`) - the decision (`audit.principal`) - the rows
(`server.warm`) - the entry (`server.journal`) - the receipt (`server.receipting`). A refusal by policy is
an entry too. Where the request names a person, what it says of them goes to the vault before the entry is
written, and the entry holds a pseudonym and roots of commitments (`audit.disclosure`).
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from audit.canonical import canonical_bytes
from audit.commitments import commit
from audit.disclosure import CONTEXT, new_part
from audit.encoding import EncodingError, plain_row
from audit.entries import Prediction, PredictionDenied, RowCommitment
from audit.ledger import Sequenced
from audit.principal import AccessDeniedError, Authorizer, Decision, Principal, Question, require
from audit.vault_records import PERSON
from server.errors import RowContractError
from server.hooks import Answering, Hooks, with_fields
from server.journal import Journal
from server.live import LiveModels, ServedVersion
from server.monitoring import Monitoring
from server.receipting import Receipting
from server.sealing import Sealing
from server.warm import WarmModel, WarmModels
from server.watching import Level

_INLINE_ROWS: Final = 16  # more rows than this are computed beside the event loop


class PredictionDeniedError(AccessDeniedError):
    """The policies refused a prediction; the refusal is entry `entry`."""

    code = "predict.denied"

    def __init__(self, denied: AccessDeniedError, sequenced: Sequenced) -> None:
        super().__init__(denied.principal, denied.question, denied.decision)
        self.entry = {"leaf_index": sequenced.leaf_index, "leaf_hash": sequenced.leaf_hash.hex()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request for answers."""

    model: str
    purpose: str
    rows: Sequence[Mapping[str, Any]]
    site: str | None = None
    version: str | None = None
    subject: str | None = None  # the caller's own id for the person that the rows are about
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
    receipt: dict[str, Any]
    opened: tuple[dict[str, str], ...]
    sealed: dict[str, str] | None = None  # of a named person: pseudonym, and what opens the context
    level: Level = "sequenced"
    proof: str | None = None  # C2SP tlog-proof, above "sequenced"
    annotations: Mapping[str, Any] = field(default_factory=dict)  # what `server.hooks` added


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

    async def predict(self, principal: Principal, asked: Asked) -> Answered:
        """Answer, or refuse.

        Raises:
            ModelNotFoundError, VersionNotFoundError: there is nothing of that name.
            PredictionDeniedError: the policies refused; it is in the log.
            RowContractError: a row is outside the charter's data contract.
            ArtefactError: the registry's copy of the version cannot be used.
            LedgerUnavailableError: the entry did not become durable, so there is no answer.
        """
        served = self.live.answering(asked.model, asked.version)
        decision = await self._decide(principal, asked, served)
        warm = self.warm.get(served)
        if len(asked.rows) > _INLINE_ROWS:
            plain, encoded, answers = await asyncio.to_thread(_answer, warm, asked)
        else:
            plain, encoded, answers = _answer(warm, asked)
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
        body = Prediction(
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
            rows=(),
        )
        body, outputs = with_fields(body, added.body), added.outputs(answers)
        sealed = None
        if asked.subject is None:
            commitments, opened = _commit(plain, outputs)
            sequenced = await self.journal.append(replace(body, rows=commitments))
        else:
            sequenced, opened, sealed = await self._sealed(body, asked.subject, plain, outputs)
        receipt = await self.receipting.receipt(sequenced)
        self.monitoring.predicted_rows.labels(served.model).inc(len(answers))
        answered = Answered(
            model=served.model,
            version=served.version,
            answers=tuple(answers),
            decision=decision,
            request_id=asked.request_id,
            leaf_index=sequenced.leaf_index,
            leaf_hash=sequenced.leaf_hash.hex(),
            receipt=receipt,
            opened=opened,
            sealed=sealed,
            annotations=added.shown,
        )
        self.hooks.observe(answering, answered)
        return answered

    async def _sealed(
        self,
        body: Prediction,
        subject: str,
        plain: Sequence[Mapping[str, Any]],
        answers: Sequence[Mapping[str, Any]],
    ) -> tuple[Sequenced, tuple[dict[str, str], ...], dict[str, str]]:
        """Seal what the answer says of a person, then append the entry that commits to it.

        In this order an acknowledged entry never lacks its record. What a failed append leaves in the vault
        has no entry, was told to nobody, and is swept.
        """
        event_id = secrets.token_hex(16)
        context = new_part({"purpose": body.purpose, "request_id": body.request_id})
        rows = [
            (new_part(dict(row)), new_part(dict(answer))) for row, answer in zip(plain, answers, strict=True)
        ]
        parts = {CONTEXT: context}
        for number, (given, answered) in enumerate(rows):
            parts[f"row.{number}.input"], parts[f"row.{number}.output"] = given, answered
        sealed = await self.sealing.seal(
            kind=PERSON, name=subject, event_id=event_id, type="prediction", parts=parts
        )
        commitments = tuple(
            RowCommitment(input=given.root(f"row.{n}.input"), output=answered.root(f"row.{n}.output"))
            for n, (given, answered) in enumerate(rows)
        )
        entry = replace(
            body,
            purpose="",
            request_id="",
            rows=commitments,
            subject=sealed.pseudonym,
            context=context.root(CONTEXT),
            sealed=sealed.digest,
        )
        sequenced = await self.journal.append(entry, event_id=event_id)
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

    async def _decide(self, principal: Principal, asked: Asked, served: ServedVersion) -> Decision:
        found = self.hooks.gather(principal, asked, served)
        question = Question(
            action="predict",
            resource=served.model,
            attributes={
                "purposes": served.purposes,
                "state": served.state,
                "epsilon_micro": served.epsilon_micro,
                "epsilon_limit_micro": served.epsilon_limit_micro,
                **found.resource,
            },
            context={"purpose": asked.purpose, **found.context},
        )
        try:
            return require(self.authorizer, principal, question)
        except AccessDeniedError as denied:
            for policy in denied.decision.policies:
                self.monitoring.denials.labels("predict", policy).inc()
            sequenced = await self.journal.append(
                PredictionDenied(
                    request_id=asked.request_id,
                    model=served.model,
                    purpose=asked.purpose,
                    principal=principal.id,
                    role=principal.role,
                    reason="policy",
                    policies=denied.decision.policies,
                    policy_set=denied.decision.policy_set,
                )
            )
            raise PredictionDeniedError(denied, sequenced) from denied


def _answer(
    warm: WarmModel, asked: Asked
) -> tuple[list[dict[str, Any]], list[list[float]], list[dict[str, Any]]]:
    try:
        plain = [plain_row(row) for row in asked.rows]
    except EncodingError as error:
        fields = [{"field": found.field, "problem": found.message} for found in error.problems]
        raise RowContractError(str(error), fields=fields) from error
    encoded = warm.encode(plain)
    return plain, encoded, warm.answers(encoded, warm.site_index(asked.site))


def _commit(
    plain: Sequence[Mapping[str, Any]], answers: Sequence[Mapping[str, Any]]
) -> tuple[tuple[RowCommitment, ...], tuple[dict[str, str], ...]]:
    commitments, opened = [], []
    for row, answer in zip(plain, answers, strict=True):
        input_text, output_text = canonical_bytes(dict(row)), canonical_bytes(dict(answer))
        input_salt, output_salt = secrets.token_bytes(32), secrets.token_bytes(32)
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
    return tuple(commitments), tuple(opened)

"""The use case `predict`: decide, answer, and let the answer go only after its entry is durable.

Order: the version that would answer (`server.live`) - the decision (`audit.principal`) - the rows
(`server.warm`) - the entry (`server.journal`) - the receipt (`server.receipting`). A refusal by policy is
an entry too.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from audit.canonical import canonical_bytes
from audit.commitments import commit
from audit.encoding import EncodingError, plain_row
from audit.entries import Prediction, PredictionDenied, RowCommitment
from audit.ledger import Sequenced
from audit.principal import AccessDeniedError, Authorizer, Decision, Principal, Question, require
from server.errors import RowContractError
from server.journal import Journal
from server.live import LiveModels, ServedVersion
from server.monitoring import Monitoring
from server.receipting import Receipting
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
    level: Level = "sequenced"
    proof: str | None = None  # C2SP tlog-proof, above "sequenced"


@dataclass(frozen=True, slots=True)
class PredictService:
    """Answers for one log."""

    live: LiveModels
    warm: WarmModels
    authorizer: Authorizer
    journal: Journal
    receipting: Receipting
    monitoring: Monitoring

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
            plain, answers = await asyncio.to_thread(_answer, warm, asked)
        else:
            plain, answers = _answer(warm, asked)
        commitments, opened = _commit(plain, answers)
        sequenced = await self.journal.append(
            Prediction(
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
                rows=commitments,
            )
        )
        receipt = await self.receipting.receipt(sequenced)
        self.monitoring.predicted_rows.labels(served.model).inc(len(answers))
        return Answered(
            model=served.model,
            version=served.version,
            answers=tuple(answers),
            decision=decision,
            request_id=asked.request_id,
            leaf_index=sequenced.leaf_index,
            leaf_hash=sequenced.leaf_hash.hex(),
            receipt=receipt,
            opened=opened,
        )

    async def _decide(self, principal: Principal, asked: Asked, served: ServedVersion) -> Decision:
        question = Question(
            action="predict",
            resource=served.model,
            attributes={
                "purposes": served.purposes,
                "state": served.state,
                "epsilon_micro": served.epsilon_micro,
                "epsilon_limit_micro": served.epsilon_limit_micro,
            },
            context={"purpose": asked.purpose},
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


def _answer(warm: WarmModel, asked: Asked) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    try:
        plain = [plain_row(row) for row in asked.rows]
    except EncodingError as error:
        fields = [{"field": found.field, "problem": found.message} for found in error.problems]
        raise RowContractError(str(error), fields=fields) from error
    encoded = warm.encode(plain)
    return plain, warm.answers(encoded, warm.site_index(asked.site))


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

"""A federation whose charter may ask for more, and which reviews decisions and changes its access rules."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from typing import Any

from audit.entries import ZERO_DIGEST, Prediction, decode_entry, signing_payload
from audit.keys import SigningKey
from audit.merkle import hash_leaf
from audit.serving_bodies import PolicyChanged, PredictionReviewed
from audit.verify import Report
from tests.audit_verify.world import World

RULES = '@id("consumer-may-predict") permit (principal, action, resource);'


class Court(World):
    """A federation whose charter may ask for more, and which reviews and changes rules."""

    def __init__(self, body: dict[str, Any] | None = None, **terms: Any) -> None:
        lie = {"prediction": lambda _, given: dataclasses.replace(given, **(body or {}))}
        super().__init__(rounds=2, charter_changes=lambda document: document.update(terms), before=lie)

    def told(self, change: Any = None) -> tuple[int, list[dict[str, str]]]:
        digest = self.train()
        live = self.approve(digest, self.register(digest))
        if change is not None:
            self.append(change(self))
        return self.predict(digest, live)

    def review(self, index: int, *, key: SigningKey | None = None, **changed: Any) -> None:
        leaf = self.log.leaves[index]
        stored = decode_entry(leaf)
        prediction: Prediction = stored.body
        body = PredictionReviewed(
            decision=stored.event_id, prediction=hash_leaf(leaf).hex(), model=prediction.model,
            version=prediction.version, outcome="confirmed", reason="", principal="p-officer", role="officer",
            officer="" if key is None else key.text, signature="",
        )  # fmt: skip
        body = dataclasses.replace(body, **changed)
        self.append(body if key is None else sealed(body, key))

    def judged(self, index: int, opened: Any) -> Report:
        return self.report(self.evidence(index, opened=opened))


def sealed(body: Any, key: SigningKey) -> Any:
    return dataclasses.replace(body, signature=base64.b64encode(key.sign(*signing_payload(body))).decode())


def rules(world: Court, *, text: str = RULES, key: SigningKey | None = None, **changed: Any) -> PolicyChanged:
    officer = key or world.officer
    body = PolicyChanged(
        policy_set=hashlib.sha256(text.encode()).hexdigest(), schema_digest="ab" * 32, text=text,
        previous_change=ZERO_DIGEST, officer=officer.text, reason="", signature="",
    )  # fmt: skip
    return sealed(dataclasses.replace(body, **changed), officer)

"""The operator's desk: a log in memory, its key, the files, and hooks to lie with before or after signing."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.entries import TYPE_OF as ENTRY_TYPES
from audit.entries import (
    ZERO_DIGEST,
    decode_entry,
    encode_entry,
    new_entry,
    signing_payload,
)
from audit.keys import SigningKey
from audit.merkle import hash_leaf, root_of
from audit.notes import NoteSigner
from audit.receipts import issue_receipts
from audit.service import export_evidence
from audit.verify import Report, verify_evidence
from tests.audit_verify.hospitals import NOW, ORIGIN, Hospital
from tests.audit_verify.memory_log import MemoryLog, columns

Hook = Callable[[Any, Any], Any]  # (world, body) -> body


class Office:
    """Signs and logs bodies, has checkpoints cosigned, exports evidence and has it judged."""

    def __init__(
        self, *, before: dict[str, Hook] | None, after: dict[str, Hook] | None, log_key: SigningKey | None
    ) -> None:
        self.before, self.after = before or {}, after or {}
        self.log, self.blobs = MemoryLog(), {}
        self.log_key = log_key or SigningKey.generate()
        self.hospitals: list[Hospital] = []
        self.time = "2026-11-23T11:00:00Z"  # of the entries to come

    @property
    def log_signer(self) -> NoteSigner:
        return NoteSigner(ORIGIN, self.log_key)

    def put(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def sign(self, body: Any, key: SigningKey, name: str = "signature") -> Any:
        domain, payload = signing_payload(body)
        return dataclasses.replace(body, **{name: base64.b64encode(key.sign(domain, payload)).decode()})

    def lie(self, body: Any) -> Any:
        hook = self.before.get(ENTRY_TYPES[type(body)])
        return hook(self, body) if hook else body

    def append(self, body: Any, actor: str = "operator") -> tuple[int, str]:
        """Log a body (after its `after` hook); return index and leaf hash, or (-1, zeros) when left out."""
        hook = self.after.get(ENTRY_TYPES[type(body)])
        body = hook(self, body) if hook else body
        if body is None:
            return -1, ZERO_DIGEST
        leaf = encode_entry(new_entry(body, actor=actor, time=self.time))
        self.log.leaves.append(leaf)
        return len(self.log.leaves) - 1, hash_leaf(leaf).hex()

    def replace_leaf(self, index: int, change: Callable[[Any], Any]) -> None:
        """Rewrite history: change the body of a leaf in place."""
        entry = decode_entry(self.log.leaves[index])
        self.log.leaves[index] = encode_entry(dataclasses.replace(entry, body=change(entry.body)))

    def find(self, kind: str, number: int = 0) -> int:
        found = [i for i, leaf in enumerate(self.log.leaves) if columns(leaf).type == kind]
        return found[number]

    def log_hash(self, kind: str, number: int) -> str:
        return hash_leaf(self.log.leaves[self.find(kind, number)]).hex()

    def blobs_of_last_run(self) -> str:
        """The weights that the last run.completed names."""
        leaves = [leaf for leaf in self.log.leaves if columns(leaf).type == "run.completed"]
        return decode_entry(leaves[-1]).body.weights

    def hospital(self, name: str) -> Hospital:
        return next(hospital for hospital in self.hospitals if hospital.name == name)

    # what leaves the federation

    def publish(self, *, witnesses: Sequence[str] | None = None, at: datetime = NOW) -> bytes:
        """Sign the log as it is now and have it cosigned; keep and return the note."""
        checkpoint = Checkpoint(ORIGIN, self.log.tree_size, root_of(self.log.hashes))
        note = sign_checkpoint(checkpoint, self.log_signer)
        lines = [
            cosign(note, hospital.note_signer, int((at - timedelta(seconds=30)).timestamp()))
            for hospital in self.hospitals
            if witnesses is None or hospital.name in witnesses
        ]
        note = add_signatures(note, lines)
        self.log.notes = [note]
        return note

    def evidence(self, index: int, *, opened: Any = None, receipt: bool = False) -> bytes:
        if not self.log.notes:
            self.publish()
        fields = None
        if receipt:
            fields = self.receipt(index)
        return export_evidence(self.log, self.blobs.get, leaf_index=index, opened=opened, receipt=fields)

    def receipt(self, index: int) -> dict[str, Any]:
        leaf = (index, hash_leaf(self.log.leaves[index]))
        times = {"time": "2026-11-23T11:00:00Z", "merge_deadline": "2026-11-23T11:05:00Z"}
        return dict(issue_receipts(self.log_key, ORIGIN, [leaf], **times)[0].to_json())

    @property
    def policy(self) -> str:
        lines = [f"log {self.log_signer.vkey}"]
        lines += [f"witness {h.name} {h.note_signer.vkey}" for h in self.hospitals]
        names = " ".join(h.name for h in self.hospitals)
        return "\n".join([*lines, f"group sites 2 {names}", "quorum sites", ""])

    def report(self, data: bytes, **options: Any) -> Report:
        options.setdefault("policy_text", self.policy)
        return verify_evidence(data, **{"now": NOW, **options})

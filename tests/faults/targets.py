"""The parsers of bytes that strangers send: good examples to start from, and the errors that each declares.

A target's `parse` also holds what a parser promises of input that it takes: where a form is the only one,
writing the value again gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

from audit.canonical import canonical_bytes, parse_canonical
from audit.checkpoints import Checkpoint, add_signatures, cosign, sign_checkpoint
from audit.cose import issue_cose_receipt, verify_cose_receipt
from audit.entries import EntryError, LogCreated, columns_of, decode_entry, encode_entry, new_entry
from audit.errors import (
    AuditError,
    BadSignatureError,
    CanonicalError,
    KeyFormatError,
    MalformedCheckpointError,
    MalformedJsonError,
    MalformedNoteError,
    MalformedPolicyError,
    MalformedProofError,
    MalformedReceiptError,
    NoKnownSignatureError,
    NotCanonicalError,
    ProofError,
    WitnessRequestError,
)
from audit.evidence import Evidence, EvidenceError, build_zip, read_evidence, read_zip, write_evidence
from audit.keys import SigningKey
from audit.merkle import hash_leaf, inclusion_proof_of, prefix_proof, root_of, source_of
from audit.misbehaviour import Misbehaviour, MisbehaviourError
from audit.notes import KeyType, NoteSigner, NoteVerifier, open_note, parse_note
from audit.receipts import Receipt, issue_receipts
from audit.tiles import Tile, TileError, decode_bundle, encode_bundle
from audit.tlog_policy import Policy
from audit.tlog_proof import TlogProof
from audit.witness_request import AddCheckpoint

ORIGIN: Final = "hospital.example/fuzzed"
LOG: Final = NoteSigner(ORIGIN, SigningKey.generate())
SITE: Final = NoteSigner("site-a", SigningKey.generate(), KeyType.COSIGNATURE)
LEAVES: Final = [hash_leaf(b"%d" % n) for n in range(40)]
EDITED: Final = [*LEAVES[:4], hash_leaf(b"edited"), *LEAVES[5:]]
KNOWN: Final = (LOG.verifier, SITE.verifier)


@dataclass(frozen=True)
class Target:
    name: str
    parse: Callable[[bytes], object]
    declared: tuple[type[AuditError], ...]
    seeds: Sequence[bytes]

    def feed(self, data: bytes) -> bool:
        """Return whether the input was taken; whatever is not declared escapes."""
        try:
            self.parse(data)
        except self.declared:
            return False
        return True


def signed(leaves: Sequence[bytes]) -> bytes:
    note = sign_checkpoint(Checkpoint(ORIGIN, len(leaves), root_of(list(leaves))), LOG)
    return add_signatures(note, [cosign(note, SITE, 1_700_000_000)])


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")  # as a file name or an argument may come


def _note(data: bytes) -> None:
    parsed = parse_note(data)
    assert parsed.text + b"\n" + b"".join(line.format() for line in parsed.signatures) == data
    open_note(data, KNOWN)


def _vkey(data: bytes) -> None:
    text = _text(data)
    assert NoteVerifier.parse(text).vkey == text


def _checkpoint(data: bytes) -> None:
    assert Checkpoint.parse(data).body() == data


def _tile_path(data: bytes) -> None:
    text = _text(data)
    assert Tile.parse(text).path == text


def _bundle(data: bytes) -> None:
    assert encode_bundle(decode_bundle(data, 4)) == data


def _proof(data: bytes) -> None:
    assert TlogProof.parse(data).format() == data


def _policy(data: bytes) -> None:
    policy = Policy.parse(_text(data))
    assert Policy.parse(policy.format()) == policy
    policy.evaluate(witness.name for witness in policy.witnesses)


def _request(data: bytes) -> None:
    assert AddCheckpoint.parse(data).format() == data


def _receipt(data: bytes) -> None:
    receipt = Receipt.parse(data)
    assert Receipt.parse(receipt.encode()) == receipt


def _misbehaviour(data: bytes) -> None:
    found = Misbehaviour.parse(data)
    assert found.encode() == data
    found.contradiction()


def _evidence(data: bytes) -> None:
    assert write_evidence(read_evidence(data))


def _member(data: bytes) -> None:
    """One member replaced, and every digest made right: what lies behind the checks of the container."""
    name = MEMBERS[data[0] % len(MEMBERS)] if data else MEMBERS[0]
    files = {**read_zip(_EVIDENCE[0]), name: data[1:]}
    if name != "manifest.json":
        manifest = parse_canonical(files["manifest.json"])
        digests = {**manifest["files"], name: sha256(data[1:]).hexdigest()}  # type: ignore[call-overload,dict-item,index]
        files["manifest.json"] = canonical_bytes({**manifest, "files": digests})  # type: ignore[dict-item]
    read_evidence(build_zip(files))


def _canonical(data: bytes) -> None:
    assert canonical_bytes(parse_canonical(data)) == data


def _entry(data: bytes) -> None:
    assert encode_entry(decode_entry(data)) == data
    columns_of(data)


def _cose(data: bytes) -> None:
    verify_cose_receipt(data, leaf_hash=LEAVES[6], key=LOG.key.verify_key)


def _seeds_of_evidence() -> list[bytes]:
    leaf = encode_entry(new_entry(LogCreated(origin=ORIGIN, log_key=LOG.vkey), actor="me", time=_TIME))
    whole = write_evidence(
        Evidence(
            scope="entry",
            leaf_index=0,
            leaf_hash=hash_leaf(leaf).hex(),
            checkpoint=signed([hash_leaf(leaf), *LEAVES]),
            entries={0: leaf},
            proofs={0: tuple(inclusion_proof_of([hash_leaf(leaf), *LEAVES], 0))},
        )
    )
    return [whole, build_zip({"checkpoint": b"c", "manifest.json": b"{}", "entries/0.json": b"{}"})]


def _seeds_of_members() -> list[bytes]:
    files = read_zip(_EVIDENCE[0])
    opened = {"input_salt": "aa", "output_salt": "bb", "input": "{}", "output": "{}"}
    files["opened.json"] = canonical_bytes({"rows": [opened, opened]})
    files["receipt.json"] = _RECEIPTS[0].encode()
    files["policy.txt"] = _POLICY.encode()
    return [bytes([number]) + files[name] for number, name in enumerate(MEMBERS)]


_TIME: Final = "2026-11-23T22:00:00Z"
_RECEIPTS = issue_receipts(
    LOG.key, ORIGIN, list(enumerate(LEAVES)), time=_TIME, merge_deadline="2026-11-24T22:00:00Z"
)
_PROOF = TlogProof(
    leaf_index=6, hashes=tuple(inclusion_proof_of(LEAVES, 6)), checkpoint_note=signed(LEAVES), extra=b"more"
)
_POLICY = "\n".join(
    [
        f"log {LOG.vkey} https://log.example",
        f"witness a {SITE.vkey}",
        f"witness b {NoteSigner('site-b', SigningKey.generate(), KeyType.COSIGNATURE).vkey}",
        "group g any a",
        "group sites 2 g b",
        "quorum sites",
    ]
)
_LEAF = encode_entry(new_entry(LogCreated(origin=ORIGIN, log_key=LOG.vkey), actor="me", time=_TIME))
_REWRITE = Misbehaviour(
    kind="rewrite",
    notes=(signed(LEAVES[:9]), signed(EDITED)),
    paths=(tuple(prefix_proof(source_of(EDITED), 9, len(EDITED))),),
)
_PROMISE = Misbehaviour(kind="receipt", notes=(signed(LEAVES[:3]),), leaf_index=5, receipt=_RECEIPTS[5])
_COSE = issue_cose_receipt(
    LOG.key.unsafe_sign_raw,
    Checkpoint(ORIGIN, len(LEAVES), root_of(LEAVES)),
    6,
    LEAVES[6],
    inclusion_proof_of(LEAVES, 6),
)
MEMBERS: Final = (
    "manifest.json", "proofs.json", "checkpoint", "entries/0.json", "opened.json", "receipt.json",
    "policy.txt",
)  # fmt: skip
_EVIDENCE = _seeds_of_evidence()
JSON_ERRORS: Final = (MalformedJsonError, CanonicalError, NotCanonicalError)

TARGETS: Final = {
    target.name: target
    for target in (
        Target("note", _note, (MalformedNoteError, BadSignatureError, NoKnownSignatureError),
               [signed(LEAVES), signed([]), b"text\n\n\xe2\x80\x94 a AAAAAAA=\n"]),
        Target("vkey", _vkey, (KeyFormatError,), [LOG.vkey.encode(), SITE.vkey.encode()]),
        Target("checkpoint", _checkpoint, (MalformedCheckpointError,),
               [Checkpoint(ORIGIN, n, root_of(LEAVES[:n])).body() for n in (0, 1, 40)]),
        Target("tile path", _tile_path, (TileError,),
               [b"tile/0/000", b"tile/63/x001/x234/067", b"tile/entries/x999/000.p/255", b"tile/7/123.p/1"]),
        Target("entry bundle", _bundle, (TileError,), [encode_bundle([b"", b"a", b"{}" * 40, b"z" * 300])]),
        Target("tlog-proof", _proof, (MalformedProofError,), [_PROOF.format()]),
        Target("policy", _policy, (MalformedPolicyError,), [_POLICY.encode()]),
        Target("add-checkpoint", _request, (WitnessRequestError,),
               [AddCheckpoint(old_size=6, proof=tuple(LEAVES[:6]), note=signed(LEAVES)).format(),
                AddCheckpoint(old_size=0, proof=(), note=signed(LEAVES)).format()]),
        Target("receipt", _receipt, (MalformedReceiptError,), [_RECEIPTS[5].encode(), _RECEIPTS[0].encode()]),
        Target("misbehaviour file", _misbehaviour, (MisbehaviourError,),
               [_REWRITE.encode(), _PROMISE.encode(),
                Misbehaviour(kind="split", notes=(signed(LEAVES), signed(EDITED))).encode()]),
        Target("evidence file", _evidence, (EvidenceError,), _EVIDENCE),
        Target("evidence members", _member, (EvidenceError,), _seeds_of_members()),
        Target("canonical JSON", _canonical, JSON_ERRORS,
               [_LEAF, b'{"a":[1,-5,"x\\n"],"b":{"c":"\xc3\xa9"}}', b"[]", b'"\\u001f"']),
        Target("entry", _entry, (EntryError,), [_LEAF]),
        Target("COSE receipt", _cose, (MalformedProofError, ProofError, BadSignatureError), [_COSE]),
    )
}  # fmt: skip

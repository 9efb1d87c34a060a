"""The evidence file: a zip in exactly one form, so that not one of its bytes is free.

Members are stored (not compressed), sorted by name, with fixed dates, and listed with their SHA-256 in
`manifest.json`. The reader walks the members itself, within caps, and accepts the file only when writing
what it read gives the same bytes: no second directory, no hidden member, no bomb. Any zip program can
open the file.

    manifest.json  checkpoint  proofs.json  entries/<index>.json  artefacts/<sha256>
    receipt.json  opened.json  disclosed.json  policy.txt (for display only; nothing in it is believed)
"""

from __future__ import annotations

import base64
import hashlib
import re
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from audit.canonical import canonical_bytes, parse_canonical
from audit.disclosure import Disclosed, DisclosureError, disclosed_document, parse_disclosed
from audit.errors import AuditError
from audit.merkle import hash_leaf

FORMAT: Final = "affidavit-evidence/1"
SCOPES: Final = ("prediction", "version", "run", "entry")
_SCOPE_OF: Final = {
    "prediction": "prediction",
    "version.registered": "version",
    "version.transition": "version",
    "run.completed": "run",
}
MAX_BYTES: Final = 64 << 20
MAX_FILES: Final = 20_000
MAX_PROOF_HASHES: Final = 63

_LOCAL: Final = struct.Struct("<4sHHHHHLLLHH")
_CENTRAL: Final = struct.Struct("<4sHHHHHHLLLHHHHHLL")
_END: Final = struct.Struct("<4sHHHHLLH")
_DATE: Final = 0x21  # 1980-01-01
_NAME = re.compile(
    r"manifest\.json|checkpoint|proofs\.json|receipt\.json|opened\.json|policy\.txt"
    r"|disclosed\.json|entries/(?:0|[1-9][0-9]{0,15})\.json|artefacts/[0-9a-f]{64}"
)
_DIGEST = re.compile(r"[0-9a-f]{64}")
_INDEX = re.compile(r"0|[1-9][0-9]{0,15}")


class EvidenceError(AuditError):
    """The bytes are not an evidence file; `member` is the part at fault."""

    code = "evidence.malformed"

    def __init__(self, member: str, problem: str) -> None:
        super().__init__(f"{member}: {problem}")
        self.member, self.problem = member, problem


class EvidenceTooLargeError(EvidenceError):
    code = "evidence.too_large"


class EvidenceDigestError(EvidenceError):
    """A member's bytes are not those that the manifest or its own name states."""

    code = "evidence.digest"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """An evidence file's content. Nothing in it is believed yet."""

    scope: str
    leaf_index: int
    leaf_hash: str
    checkpoint: bytes
    entries: Mapping[int, bytes]
    proofs: Mapping[int, tuple[bytes, ...]]
    artefacts: Mapping[str, bytes] = field(default_factory=dict)
    receipt: bytes | None = None
    opened: tuple[Mapping[str, str], ...] | None = None
    policy: str | None = None
    disclosed: Disclosed | None = None


def scope_of(entry_type: str) -> str:
    """Return how far a file about an entry of this type must reach; nobody may choose less."""
    return _SCOPE_OF.get(entry_type, "entry")


def write_evidence(evidence: Evidence) -> bytes:
    """Return the evidence file.

    Raises:
        EvidenceTooLargeError: it is over the caps.
    """
    files: dict[str, bytes] = {"checkpoint": evidence.checkpoint}
    for index, data in evidence.entries.items():
        files[f"entries/{index}.json"] = data
    for digest, data in evidence.artefacts.items():
        files[f"artefacts/{digest}"] = data
    files["proofs.json"] = canonical_bytes(
        {
            str(index): [base64.b64encode(hash_).decode() for hash_ in proof]
            for index, proof in evidence.proofs.items()
        }
    )
    if evidence.receipt is not None:
        files["receipt.json"] = evidence.receipt
    if evidence.opened is not None:
        files["opened.json"] = canonical_bytes({"rows": [dict(row) for row in evidence.opened]})
    if evidence.disclosed is not None:
        files["disclosed.json"] = canonical_bytes(disclosed_document(evidence.disclosed))
    if evidence.policy is not None:
        files["policy.txt"] = evidence.policy.encode()
    files["manifest.json"] = canonical_bytes(
        {
            "format": FORMAT,
            "scope": evidence.scope,
            "subject": {"leaf_index": evidence.leaf_index, "leaf_hash": evidence.leaf_hash},
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
        }
    )
    return build_zip(files)


def read_evidence(data: bytes) -> Evidence:
    """Read an evidence file, checking every digest it states.

    Raises:
        EvidenceError: not such a file, or one that was packed again.
        EvidenceTooLargeError: over the caps, before anything is copied.
        EvidenceDigestError: a member is not the bytes that its manifest line or its name states.
    """
    files = read_zip(data)
    manifest = _json(files, "manifest.json", {"format", "scope", "subject", "files"})
    subject, listed = manifest["subject"], manifest["files"]
    if manifest["format"] != FORMAT or manifest["scope"] not in SCOPES:
        raise EvidenceError("manifest.json", f"is not {FORMAT} of scope {', '.join(SCOPES)}")
    if not isinstance(subject, dict) or set(subject) != {"leaf_index", "leaf_hash"}:
        raise EvidenceError("manifest.json", "the subject has exactly leaf_index and leaf_hash")
    index, leaf_hash = subject["leaf_index"], subject["leaf_hash"]
    if type(index) is not int or index < 0 or not isinstance(leaf_hash, str):
        raise EvidenceError("manifest.json", "the subject is not a leaf")
    if not isinstance(listed, dict) or set(listed) != set(files) - {"manifest.json"}:
        raise EvidenceError("manifest.json", "does not list exactly the other members")
    for name, digest in listed.items():
        if hashlib.sha256(files[name]).hexdigest() != digest:
            raise EvidenceDigestError(name, f"is not the bytes of SHA-256 {str(digest)[:64]}")
    for name in ("checkpoint", "proofs.json"):
        if name not in files:
            raise EvidenceError(name, "is not in the file")
    entries, artefacts = {}, {}
    for name, content in files.items():
        folder, _, rest = name.partition("/")
        if folder == "entries":
            entries[int(rest.removesuffix(".json"))] = content
        elif folder == "artefacts":
            if hashlib.sha256(content).hexdigest() != rest:
                raise EvidenceDigestError(name, "is named by another SHA-256 than its own")
            artefacts[rest] = content
    if index not in entries or hash_leaf(entries[index]).hex() != leaf_hash:
        raise EvidenceDigestError("manifest.json", "the subject is not the entry of that index in the file")
    return Evidence(
        scope=manifest["scope"],
        leaf_index=index,
        leaf_hash=leaf_hash,
        checkpoint=files["checkpoint"],
        entries=dict(sorted(entries.items())),
        proofs=_proofs(files, entries),
        artefacts=artefacts,
        receipt=files.get("receipt.json"),
        opened=_opened(files) if "opened.json" in files else None,
        policy=files["policy.txt"].decode("utf-8", "replace") if "policy.txt" in files else None,
        disclosed=_disclosed(files, entries) if "disclosed.json" in files else None,
    )


def build_zip(files: Mapping[str, bytes]) -> bytes:
    """Return the one zip of `files`.

    Raises:
        EvidenceError: a name the format does not have.
        EvidenceTooLargeError: over the caps.
    """
    body, directory, offset = [], [], 0
    if len(files) > MAX_FILES:
        raise EvidenceTooLargeError("file", f"{len(files)} members; at most {MAX_FILES}")
    for name, data in sorted(files.items()):
        if not _NAME.fullmatch(name):
            raise EvidenceError(repr(name[:80]), "is not a name of this format")
        raw, crc, size = name.encode(), zlib.crc32(data), len(data)
        local = _LOCAL.pack(b"PK\3\4", 20, 0, 0, 0, _DATE, crc, size, size, len(raw), 0)
        central = _CENTRAL.pack(
            b"PK\1\2",
            0x0314,
            20,
            0,
            0,
            0,
            _DATE,
            crc,
            size,
            size,
            len(raw),
            0,
            0,
            0,
            0,
            0o100644 << 16,
            offset,
        )
        body += [local, raw, data]
        directory += [central, raw]
        offset += len(local) + len(raw) + size
        if offset > MAX_BYTES:
            raise EvidenceTooLargeError(name, f"the file would be over {MAX_BYTES} bytes")
    tail = b"".join(directory)
    end = _END.pack(b"PK\5\6", 0, 0, len(files), len(files), len(tail), offset, 0)
    if offset + len(tail) + len(end) > MAX_BYTES:
        raise EvidenceTooLargeError("file", f"would be over {MAX_BYTES} bytes")
    return b"".join([*body, tail, end])


def read_zip(data: bytes) -> dict[str, bytes]:
    """Return the members of a zip that `build_zip` would write byte for byte.

    Raises:
        EvidenceError, EvidenceTooLargeError: anything else; nothing is decompressed.
    """
    if len(data) > MAX_BYTES:
        raise EvidenceTooLargeError("file", f"{len(data)} bytes; at most {MAX_BYTES}")
    if data[:2] != b"PK":
        raise EvidenceError("file", "is not a zip")
    files: dict[str, bytes] = {}
    position = 0
    while data[position : position + 4] == b"PK\3\4":
        start = position + _LOCAL.size
        if start > len(data):
            raise EvidenceError("file", "is cut short")
        _, _, flags, method, _, _, _, size, whole, length, extra = _LOCAL.unpack_from(data, position)
        if flags or method or extra or size != whole:
            raise EvidenceError("file", "was packed again by another program; use it as it was exported")
        name = data[start : start + length].decode("latin-1")
        if not _NAME.fullmatch(name) or name in files:
            raise EvidenceError(repr(name[:80]), "is not a name of this format, or occurs twice")
        if len(files) >= MAX_FILES:
            raise EvidenceTooLargeError("file", f"more than {MAX_FILES} members")
        position = start + length + size
        if position > len(data):
            raise EvidenceError(name, "reaches beyond the end of the file")
        files[name] = data[start + length : position]
    if build_zip(files) != data:
        raise EvidenceError("file", "was changed or packed again; use it as it was exported")
    return files


def _json(files: Mapping[str, bytes], name: str, fields: set[str] | None) -> dict[str, Any]:
    if name not in files:
        raise EvidenceError(name, "is not in the file")
    try:
        value = parse_canonical(files[name])
    except AuditError as error:
        raise EvidenceError(name, str(error)) from error
    if not isinstance(value, dict) or (fields is not None and set(value) != fields):
        raise EvidenceError(name, f"does not have exactly the fields {sorted(fields or ())}")
    return value


def _proofs(files: Mapping[str, bytes], entries: Mapping[int, bytes]) -> dict[int, tuple[bytes, ...]]:
    proofs: dict[int, tuple[bytes, ...]] = {}
    for key, hashes in _json(files, "proofs.json", None).items():
        if not _INDEX.fullmatch(key) or int(key) not in entries:
            raise EvidenceError("proofs.json", f"{key[:40]!r} is not the index of an entry in the file")
        if not isinstance(hashes, list) or len(hashes) > MAX_PROOF_HASHES:
            raise EvidenceError("proofs.json", f"{key}: is not a list of at most {MAX_PROOF_HASHES} hashes")
        proofs[int(key)] = tuple(_hash(text, key) for text in hashes)
    return proofs


def _hash(text: Any, key: str) -> bytes:
    try:
        raw = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError:
        raw = b""
    if len(raw) != 32 or base64.b64encode(raw).decode() != text:
        raise EvidenceError("proofs.json", f"{key}: holds what is not the base64 of 32 bytes")
    return raw


def _disclosed(files: Mapping[str, bytes], entries: Mapping[int, bytes]) -> Disclosed:
    document = _json(files, "disclosed.json", None)
    try:
        disclosed = parse_disclosed(document)
    except DisclosureError as error:
        raise EvidenceError("disclosed.json", str(error)) from error
    for index in disclosed:
        if index not in entries:
            raise EvidenceError("disclosed.json", f"opens leaf {index}, which is not in the file")
    return disclosed


def _opened(files: Mapping[str, bytes]) -> tuple[Mapping[str, str], ...]:
    rows: Sequence[Any] = _json(files, "opened.json", {"rows"})["rows"]
    fields = {"input_salt", "output_salt", "input", "output"}
    of_a_tree = fields | {"row", "path"}
    if not isinstance(rows, list):
        raise EvidenceError("opened.json", "rows is not a list")
    for row in rows:
        if (
            not isinstance(row, dict)
            or set(row) not in (fields, of_a_tree)
            or not all(isinstance(v, str) for v in row.values())
        ):
            raise EvidenceError(
                "opened.json",
                f"a row has exactly the text fields {sorted(fields)}, and row and path where it "
                "is one of many",
            )
    return tuple(rows)

from __future__ import annotations

import hashlib
import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from audit.canonical import canonical_bytes
from audit.evidence import (
    MAX_BYTES,
    EvidenceDigestError,
    EvidenceError,
    EvidenceTooLargeError,
    build_zip,
    read_evidence,
    read_zip,
    write_evidence,
)
from audit.verify import Verdict


def packed(files, *, compression=zipfile.ZIP_STORED, comment=b""):
    """A zip of the same members by Python's own zipfile."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.comment = comment
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def test_any_zip_program_opens_the_file(honest):
    with zipfile.ZipFile(io.BytesIO(honest.data)) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == sorted(archive.namelist())
        assert archive.read("checkpoint") == read_evidence(honest.data).checkpoint


def test_the_same_content_gives_the_same_bytes(honest):
    assert write_evidence(read_evidence(honest.data)) == honest.data


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"",
        lambda data: b"PK",
        lambda data: b"PK\3\4",
        lambda data: b"not a zip at all",
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"\0" + data,
        lambda data: data + data,
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"policy", b"polizy"),
        lambda data: packed(read_zip(data)),
        lambda data: packed(read_zip(data), compression=zipfile.ZIP_DEFLATED),
        lambda data: packed(read_zip(data), comment=b"hello"),
        lambda data: data[:26] + struct.pack("<H", 60000) + data[28:],
        lambda data: data[:18] + struct.pack("<LL", 2**32 - 1, 2**32 - 1) + data[26:],
    ],
)
def test_a_file_in_any_other_form_is_refused(honest, change):
    with pytest.raises(EvidenceError):
        read_evidence(change(honest.data))


@pytest.mark.parametrize(
    "name",
    ["../manifest.json", "/etc/passwd", "entries/../x.json", "entries/01.json", "entries/1.txt", "C:\\x",
     "artefacts/" + "A" * 64, "manifest.json\0", "readme", "", "ENTRIES/1.json"],
)  # fmt: skip
def test_a_name_that_the_format_does_not_have_is_refused_both_ways(name):
    with pytest.raises(EvidenceError):
        build_zip({name: b"x"})
    raw = name.encode()
    local = struct.pack("<4sHHHHHLLLHH", b"PK\3\4", 20, 0, 0, 0, 33, zlib.crc32(b"x"), 1, 1, len(raw), 0)
    with pytest.raises(EvidenceError):
        read_zip(local + raw + b"x")


def test_a_member_twice_is_refused():
    once = build_zip({"checkpoint": b"a"})
    body = once[: once.index(b"PK\1\2")]
    with pytest.raises(EvidenceError, match="twice"):
        read_zip(body + once)


def test_a_bomb_costs_no_memory(honest):
    bomb = packed({"checkpoint": b"\0" * (64 << 20)}, compression=zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    with pytest.raises(EvidenceError):
        read_zip(bomb)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_too_many_bytes_or_members_are_refused_early():
    with pytest.raises(EvidenceTooLargeError):
        read_zip(b"PK\3\4" + bytes(MAX_BYTES))
    with pytest.raises(EvidenceTooLargeError):
        build_zip({f"entries/{index}.json": b"" for index in range(20_001)})


def remade(data, change):
    """The evidence with its members changed and everything written again, manifest included."""
    files = dict(read_zip(data))
    change(files)
    manifest = json.loads(files["manifest.json"])
    manifest["files"] = {
        name: hashlib.sha256(content).hexdigest()
        for name, content in files.items()
        if name != "manifest.json"
    }
    files["manifest.json"] = canonical_bytes(manifest)
    return build_zip(files)


def set_file(name, data):
    return lambda files: files.__setitem__(name, data)


@pytest.mark.parametrize(
    "change",
    [
        set_file("proofs.json", b"{}x"),
        set_file("proofs.json", b'{"0":["AA=="]}'),
        set_file("proofs.json", b'{"0":"AA=="}'),
        set_file("proofs.json", b'{"00":[]}'),
        set_file("proofs.json", b'{"999999":[]}'),
        set_file("proofs.json", b'{"0":[],"0":[]}'),
        set_file("proofs.json", b'{"0":[1]}'),
        set_file("opened.json", b"[]"),
        set_file("opened.json", b'{"rows":[1]}'),
        set_file("opened.json", b'{"rows":[{"input":"x"}]}'),
        set_file("artefacts/" + "0" * 64, b"x"),
        lambda files: files.pop("checkpoint"),
        lambda files: files.pop("proofs.json"),
    ],
)
def test_a_malformed_member_is_refused_by_name(honest, change):
    with pytest.raises(EvidenceError):
        read_evidence(remade(honest.data, change))


@pytest.mark.parametrize(
    "manifest",
    [
        {"format": "affidavit-evidence/2"},
        {"scope": "everything"},
        {"scope": ["prediction"]},
        {"subject": {"leaf_index": 0}},
        {"subject": {"leaf_index": -1, "leaf_hash": "x"}},
        {"subject": {"leaf_index": 10**9, "leaf_hash": "ab" * 32}},
        {"subject": {"leaf_index": 3, "leaf_hash": "ab" * 32}},
        {"files": {}},
        {"files": []},
        {"more": 1},
    ],
)
def test_a_malformed_manifest_is_refused(honest, manifest):
    files = dict(read_zip(honest.data))
    files["manifest.json"] = canonical_bytes({**json.loads(files["manifest.json"]), **manifest})
    with pytest.raises(EvidenceError):
        read_evidence(build_zip(files))


def test_a_member_of_other_bytes_than_listed_is_refused(honest):
    files = dict(read_zip(honest.data))
    name = next(name for name in files if name.startswith("entries/"))
    files[name] += b" "
    with pytest.raises(EvidenceDigestError, match=name):
        read_evidence(build_zip(files))


@given(st.binary(max_size=400))
def test_random_bytes_raise_only_the_declared_error(data):
    for candidate in (data, b"PK\3\4" + data):
        with pytest.raises(EvidenceError):
            read_evidence(candidate)


def test_hostile_bytes_give_a_report_and_never_an_exception(honest):
    report = honest.world.report(b"PK\3\4" + bytes(500))
    assert (report.verdict, report.failures[0].code) == (Verdict.INVALID, "evidence.malformed")
    assert "INVALID" in report.text()


def test_every_entry_removed_makes_the_file_less_than_valid(honest):
    evidence = read_evidence(honest.data)
    for gone in evidence.entries:
        entries = {index: data for index, data in evidence.entries.items() if index != gone}
        proofs = {index: proof for index, proof in evidence.proofs.items() if index != gone}
        try:
            data = write_evidence(replace(evidence, entries=entries, proofs=proofs))
            verdict = honest.world.report(data).verdict
        except EvidenceError:
            continue
        assert verdict in (Verdict.INCOMPLETE, Verdict.INVALID), gone


def test_every_artefact_that_is_needed_is_missed_when_it_is_gone(honest):
    """The weights are rebuilt by replay, so their file alone may be absent."""
    evidence = read_evidence(honest.data)
    spared = 0
    for gone in evidence.artefacts:
        artefacts = {digest: data for digest, data in evidence.artefacts.items() if digest != gone}
        report = honest.world.report(write_evidence(replace(evidence, artefacts=artefacts)))
        spared += report.verdict is Verdict.VALID
        assert report.verdict in (Verdict.INCOMPLETE, Verdict.VALID)
    assert spared == 1


def test_proofs_of_other_leaves_fail(honest):
    evidence = read_evidence(honest.data)
    proofs = {**evidence.proofs, 5: evidence.proofs[4]}
    report = honest.world.report(write_evidence(replace(evidence, proofs=proofs)))
    assert report.failures[0].title == "Every entry is in the log"
    assert report.failures[0].entry == 5


def test_nobody_may_choose_to_prove_less_than_the_subject_needs(honest):
    for kind in ("prediction", "version.transition", "version.registered", "run.completed"):
        evidence = read_evidence(honest.world.evidence(honest.world.find(kind)))
        for scope in {"prediction", "version", "run", "entry"} - {evidence.scope}:
            report = honest.world.report(write_evidence(replace(evidence, scope=scope)))
            assert (report.verdict, report.failures[0].code) == (Verdict.INVALID, "verify.scope")


@pytest.mark.parametrize("step", range(8))
def test_a_flipped_byte_is_always_caught(honest, step):
    for position in range(step * 7, len(honest.data), len(honest.data) // 12):
        changed = bytearray(honest.data)
        changed[position] ^= 1 << (position % 8)
        report = honest.world.report(bytes(changed))
        assert report.verdict is Verdict.INVALID, position
